"""What the manifests say: the records of format v1."""

from typing import Any, Final

import msgspec

from shardckpt.box import Box
from shardckpt.errors import UnsupportedFormatError

FORMAT: Final = "shardckpt"
VERSION: Final = 1
PER_RANK: Final = "per_rank"
FEATURES: Final = frozenset({PER_RANK})
"""What a manifest may require of a reader, as far as this one knows it."""

Json = Any
"""A JSON value. The skeleton of the state is one; ``shardckpt.state.values`` gives it meaning."""


class ShardEntry(msgspec.Struct, omit_defaults=True):
    """One entry of a rank's shard. Offsets and sizes are bytes; ``offset`` counts from the start of the file."""

    fqn: str
    dtype: str
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    offset: int
    nbytes: int
    digests: str
    """xxh3-64 of each block of stored bytes, 16 hex digits each, concatenated."""
    codec: str | None = None
    frames: list[int] | None = None
    """Sizes of the compressed frames, in order; present exactly when ``codec`` is."""


class ObjectEntry(msgspec.Struct):
    """One pickled object: where its bytes lie and their digest."""

    file: str
    offset: int
    nbytes: int
    digest: str


class TensorHead(msgspec.Struct, frozen=True, omit_defaults=True):
    """What all shards of a tensor have in common."""

    dtype: str
    shape: tuple[int, ...]
    location: str = "cpu"


class RankValues(msgspec.Struct, omit_defaults=True):
    """What one rank saved at the places that differ by rank, with the tensors and objects that only it knows of."""

    nodes: dict[str, Json]
    """By place."""
    tensors: dict[str, TensorHead] = {}
    aliases: dict[str, str] = {}
    objects: dict[str, ObjectEntry] = {}


class RankManifest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one rank wrote."""

    format: str = FORMAT
    version: int = msgspec.field(default_factory=lambda: VERSION)  # a plain default would be left out when encoded
    save_id: str
    rank: int
    file: str
    size: int
    header_nbytes: int
    header_digest: str
    entries: dict[str, ShardEntry]
    """By the key under which the shard's safetensors header lists them."""
    state: Json = None
    """This rank's skeleton, where it has containers that rank 0's lacks."""
    objects: dict[str, ObjectEntry] = {}
    """Pickled objects of this rank's skeleton, by path."""
    per_rank: RankValues | None = None

    def __post_init__(self) -> None:
        check_format(self.format, self.version)


class RankWord(msgspec.Struct):
    """What a rank's manifest says besides where its tensors lie: by far the smaller part of many."""

    state: Json = None
    objects: dict[str, ObjectEntry] = {}
    per_rank: RankValues | None = None


class FileEntry(msgspec.Struct):
    """A shard and the manifest of the rank that wrote it; sizes in bytes."""

    name: str
    size: int
    manifest: str
    manifest_size: int
    manifest_digest: str


class TensorEntry(msgspec.Struct, omit_defaults=True):
    """A tensor and its shards. The lists are columns, one element a shard; ``starts`` and ``lengths`` are its box."""

    dtype: str
    shape: tuple[int, ...]
    file: list[int]
    """Index into ``Manifest.files``."""
    offset: list[int]
    nbytes: list[int]
    starts: list[tuple[int, ...]]
    lengths: list[tuple[int, ...]]
    codec: str | None = None
    location: str = "cpu"
    """Location tag in the sense of ``torch.load``: where the tensor lived when it was saved."""

    def boxes(self) -> list[Box]:
        return [Box(start, length) for start, length in zip(self.starts, self.lengths, strict=True)]


class Manifest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The commit record of a checkpoint."""

    format: str = FORMAT
    version: int = msgspec.field(default_factory=lambda: VERSION)  # as in `RankManifest`
    requires: list[str] = []
    """Features of v1 that a reader must know to read this right; those that came after it was first written."""
    save_id: str
    created: str
    """UTC, ISO 8601."""
    world_size: int
    writer: dict[str, str]
    files: list[FileEntry]
    state: Json
    tensors: dict[str, TensorEntry]
    aliases: dict[str, str] = {}
    """Names of tensors that share another's memory, by the name under which that one is stored."""
    objects: dict[str, ObjectEntry] = {}
    per_rank: dict[str, dict[int, Json]] = {}
    """For each place that differs by rank the nodes of those ranks that had one."""

    def __post_init__(self) -> None:
        check_format(self.format, self.version)
        if unknown := [name for name in self.requires if name not in FEATURES]:
            raise UnsupportedFormatError(f"it requires {unknown}, which this shardckpt lacks. Upgrade shardckpt.")

    def resolve(self, fqn: str) -> TensorEntry | None:
        """The entry of a tensor, through its alias; None where the checkpoint lacks it."""
        return self.tensors.get(self.aliases.get(fqn, fqn))

    def file_names(self) -> list[str]:
        """Every file the manifest names, itself not among them."""
        names = [name for file in self.files for name in (file.name, file.manifest)]
        return names + sorted({entry.file for entry in self.objects.values()})


def check_format(format: str, version: int) -> None:
    """Raise ValueError for what is no manifest of ours, UnsupportedFormatError for one of a newer version."""
    if format != FORMAT:
        raise ValueError(f"`format` is {format!r}, not {FORMAT!r}")
    if version > VERSION:
        raise UnsupportedFormatError(
            f"written in format v{version}, and this shardckpt reads up to v{VERSION}. Upgrade shardckpt."
        )
    if version < 1:
        raise ValueError(f"there is no format v{version}")
