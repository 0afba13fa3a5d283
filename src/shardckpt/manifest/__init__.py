"""The typed manifests of format v1: what they say, how they are written, and what is refused on reading.

Two kinds of JSON file lie in a checkpoint. ``rank-NNNNN-<save_id>.json`` is one rank's word on its shard: what landed
where, with the digests to prove it. ``manifest.json`` is the commit record: the skeleton of the state and, for each
tensor, the shards that hold it. A directory without the second is not a checkpoint.

Nothing here does I/O. Parsing treats its input as hostile: every name, size and box is checked before anyone uses it.
"""

from shardckpt.manifest.checks import MAX_MANIFEST_BYTES
from shardckpt.manifest.coding import COMPRESS_ABOVE, decode_manifest, decode_rank_manifest, decode_rank_word, encode
from shardckpt.manifest.records import (
    FORMAT,
    PER_RANK,
    VERSION,
    FileEntry,
    Manifest,
    ObjectEntry,
    RankManifest,
    RankValues,
    RankWord,
    ShardEntry,
    TensorEntry,
    TensorHead,
)

__all__ = [
    "COMPRESS_ABOVE",
    "FORMAT",
    "MAX_MANIFEST_BYTES",
    "PER_RANK",
    "VERSION",
    "FileEntry",
    "Manifest",
    "ObjectEntry",
    "RankManifest",
    "RankValues",
    "RankWord",
    "ShardEntry",
    "TensorEntry",
    "TensorHead",
    "decode_manifest",
    "decode_rank_manifest",
    "decode_rank_word",
    "encode",
]
