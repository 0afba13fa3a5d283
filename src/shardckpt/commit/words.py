"""The commit record held against what the ranks wrote: it has no digest itself, but each rank's word has one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from shardckpt.errors import CorruptCheckpointError
from shardckpt.filenames import MANIFEST, save_id_of
from shardckpt.manifest import Manifest, ObjectEntry, RankWord, decode_rank_word
from shardckpt.reader.shards import ShardFile
from shardckpt.state import merge
from shardckpt.storage import Storage
from shardckpt.workers import for_each

Json = Any


def has_words(manifest: Manifest) -> bool:
    """Whether the manifests of the ranks have the values of this save.

    Those of a save that shares the shards of another are that one's.
    """
    return bool(manifest.files) and all(save_id_of(file.manifest) == manifest.save_id for file in manifest.files)


def suffice(manifest: Manifest, words: Mapping[int, RankWord]) -> bool:
    """Whether what these ranks wrote is all of the state: rank 0 speaks of all that it has, and mostly nobody of more.

    Where containers of other ranks are in the state too, it takes the words of all.
    """
    return len(words) == len(manifest.files) or (0 in words and _equal(words[0].state, manifest.state))


def contradictions(manifest: Manifest, words: Mapping[int, RankWord]) -> Iterator[str]:
    """What the commit record says otherwise than the ranks, by number, whose words it was put together of."""
    if 0 in words and suffice(manifest, words):
        is_all = _equal(words[0].state, manifest.state)
        said = {0: words[0]} if is_all else words
        if not is_all and not _equal(_merged([words[rank].state for rank in sorted(words)]), manifest.state):
            yield "has another state than the ranks"
        objects: dict[str, ObjectEntry] = {}
        for rank in sorted(said, reverse=True):
            objects |= said[rank].objects
        if any(manifest.objects.get(place) != entry for place, entry in objects.items()):
            yield "has other objects than the ranks"
    for rank, word in words.items():
        own = word.per_rank
        if own is None:
            continue
        for place, node in own.nodes.items():
            nodes = manifest.per_rank.get(place, {})
            if rank not in nodes or not _equal(nodes[rank], node):
                yield f"has another value at {place!r} than rank {rank}"
        if any(manifest.objects.get(place) != entry for place, entry in own.objects.items()):
            yield f"has other objects than rank {rank}"
        if any(manifest.aliases.get(alias) != name for alias, name in own.aliases.items()):
            yield f"has other names of tensors than rank {rank}"


def check_words(manifest: Manifest, storage: Storage, ranks: Sequence[int]) -> int:
    """Read what some ranks wrote, or all if it takes that, and hold the commit record against it.

    Returns the bytes read.
    Raises CorruptCheckpointError where it says otherwise, or a rank's manifest is damaged or missing.
    """
    if not has_words(manifest):
        return 0
    words = _read(manifest, storage, ranks)
    if 0 in words and not suffice(manifest, words):
        words |= _read(manifest, storage, [rank for rank in range(len(manifest.files)) if rank not in words])
    for what in contradictions(manifest, words):
        raise CorruptCheckpointError(
            f"{storage.url}/{MANIFEST} is damaged: it {what} wrote in the manifests beside it. Load another checkpoint."
        )
    return sum(manifest.files[rank].manifest_size for rank in words)


def _read(manifest: Manifest, storage: Storage, ranks: Sequence[int]) -> dict[int, RankWord]:
    words = {}

    def read(rank: int) -> None:
        file = manifest.files[rank]
        words[rank] = decode_rank_word(ShardFile(storage, file).word_bytes(), f"{storage.url}/{file.manifest}")

    for_each(ranks, read, threads=storage.width, name="words")
    return words


def _merged(states: Sequence[Json]) -> Json:
    """What the commit would have made of them; nothing where they are no states, which nobody has checked."""
    found = None
    try:
        for state in states:
            if state is not None:
                found = state if found is None else merge(found, state)
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError):
        return None
    return found


def _equal(one: Json, other: Json) -> bool:
    # As JSON, since to Python 1, 1.0 and True are equal; the order of keys is not what counts.
    return _encoded(one) == _encoded(other)


def _encoded(node: Json) -> bytes:
    return msgspec.json.encode(node, order="deterministic")
