"""What differs by rank: written whole by its rank, and known to no other before rank 0 commits.

So ten thousand ranks with tensors of their own still describe one state to each other, and plans stay good when such a
tensor changes its shape.
"""

import sys
from dataclasses import dataclass

import msgspec

from shardckpt import filenames
from shardckpt.codecs import ITEMSIZE, digest, digests_text
from shardckpt.manifest import ObjectEntry, RankValues, TensorHead
from shardckpt.safetensors_format import entry_key
from shardckpt.staging import Source
from shardckpt.state import Flattened, LocalTensor
from shardckpt.storage import Storage


@dataclass(frozen=True)
class Own:
    """What one rank stores of its own, less the tensors themselves."""

    values: RankValues
    objects: dict[str, bytes]
    """Pickled, by path."""


def describe(flat: Flattened, world_size: int) -> Own | None:
    """What this rank of ``world_size`` says of its own values; None where it has none."""
    if flat.own is None:
        return None
    heads = {
        name: TensorHead(leaf.dtype, leaf.shape, sys.intern(location_of(leaf, world_size)))
        for name, leaf in flat.own.tensors.items()
    }
    return Own(RankValues(flat.own.skeleton, heads, flat.own.aliases), flat.own.objects)


def location_of(leaf: LocalTensor, world_size: int) -> str:
    """The tag of ``torch.load``; of several ranks' tensors only the type of device, since each has another."""
    return leaf.location if world_size == 1 else leaf.location.partition(":")[0]


def own_sources(flat: Flattened) -> list[Source]:
    """The entries of this rank's shard that no other rank knows of, with their memory."""
    if flat.own is None:
        return []
    return [
        Source(entry_key(leaf.fqn, leaf.shape, box), leaf.fqn, leaf.dtype, box, view, box.volume * ITEMSIZE[leaf.dtype])
        for leaf in flat.own.tensors.values()
        for box, view in zip(leaf.boxes, leaf.views, strict=True)
    ]


def put_objects(storage: Storage, rank: int, save_id: str, objects: dict[str, bytes]) -> dict[str, ObjectEntry]:
    """Store pickled objects back to back in one file; returns where each lies, by path."""
    if not objects:
        return {}
    name = filenames.objects_name(rank, save_id)
    entries = {}
    offset = 0
    for path, data in objects.items():
        entries[path] = ObjectEntry(name, offset, len(data), digests_text([digest(data)]))
        offset += len(data)
    storage.put(name, b"".join(objects.values()), replace=False)
    return entries


def with_objects(own: Own, entries: dict[str, ObjectEntry]) -> RankValues:
    """The values with the places of their objects, once those are stored."""
    return msgspec.structs.replace(own.values, objects={path: entries[path] for path in own.objects})
