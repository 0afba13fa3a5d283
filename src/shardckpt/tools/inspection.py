"""What is in a checkpoint, by its manifest alone: no shard is read, and nothing is unpickled."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardckpt.codecs import ITEMSIZE
from shardckpt.manifest import Manifest, TensorEntry
from shardckpt.options import Path
from shardckpt.state.names import unique
from shardckpt.storage import split
from shardckpt.tools.opened import begun, committed, nbytes_of, open_checkpoint, step_of
from shardckpt.tools.tree import Node, tree_of, walk


@dataclass(frozen=True)
class Shard:
    """A stored part of a tensor."""

    rank: int
    """Whose file holds it."""
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    nbytes: int
    """Stored."""


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    """Of its elements; None of compression."""
    stored_nbytes: int
    codec: str | None
    location: str
    aliases: list[str]
    """Other names of it."""
    shards: list[Shard]


@dataclass(frozen=True)
class RankFile:
    """What one rank wrote of the tensors."""

    rank: int
    file: str
    nbytes: int
    """Of the file."""
    share: float
    """Of all ranks' bytes; even ranks have ``1 / world_size``."""
    entries: int
    """Tensors, or parts of them, in it."""


@dataclass(frozen=True)
class Pickled:
    """An object that a load unpickles, where ``weights_only`` lets it."""

    path: str
    file: str
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint as its manifest describes it. Sizes are bytes, times Unix seconds."""

    path: str
    save_id: str
    format_version: int
    created: str
    """UTC, ISO 8601: the commit."""
    save_seconds: float | None
    """From the call to the commit by rank 0's clock; None where the save id does not tell."""
    step: int | None
    """As the state says, else the name."""
    world_size: int
    writer: dict[str, str]
    nbytes: int
    tensor_nbytes: int
    """Of all elements, uncompressed."""
    ranks: list[RankFile]
    tensors: list[TensorInfo]
    values: dict[str, Any]
    """Plain values by place, as the manifest has them: JSON, with the tags that docs/format.md lists."""
    objects: list[Pickled]
    per_rank: list[str]
    """Places that differ by rank."""
    tree: Node


def inspect(path: Path, *, storage_options: Mapping[str, Any] | None = None) -> Inspection:
    """Describe the checkpoint at ``path``; reads its manifest only. Raises what opening a checkpoint does."""
    opened = open_checkpoint(path, storage_options)
    manifest = opened.manifest
    aliases: defaultdict[str, list[str]] = defaultdict(list)
    for alias, name in manifest.aliases.items():
        aliases[name].append(alias)
    tensors = [_tensor(name, entry, aliases[name]) for name, entry in manifest.tensors.items()]
    tree = tree_of(manifest)
    plain: dict[str, Any] = {}
    for node in walk(tree):
        if node.kind == "value":
            plain[unique(node.path, plain.__contains__)] = node.value
    start, end = begun(manifest), committed(manifest)
    return Inspection(
        path=opened.path,
        save_id=manifest.save_id,
        format_version=manifest.version,
        created=manifest.created,
        save_seconds=None if start is None or end is None else round(end - start, 3),
        step=step_of(manifest, split(opened.path)[1]),
        world_size=manifest.world_size,
        writer=manifest.writer,
        nbytes=nbytes_of(manifest),
        tensor_nbytes=sum(tensor.nbytes for tensor in tensors),
        ranks=_ranks(manifest),
        tensors=tensors,
        values=plain,
        objects=[Pickled(place, entry.file, entry.nbytes) for place, entry in manifest.objects.items()],
        per_rank=[*manifest.per_rank],
        tree=tree,
    )


def _tensor(name: str, entry: TensorEntry, aliases: list[str]) -> TensorInfo:
    columns = zip(entry.file, entry.starts, entry.lengths, entry.nbytes, strict=True)
    raw = math.prod(entry.shape) * ITEMSIZE.get(entry.dtype, 0)
    return TensorInfo(
        name=name,
        dtype=entry.dtype,
        shape=entry.shape,
        nbytes=raw or sum(entry.nbytes),
        stored_nbytes=sum(entry.nbytes),
        codec=entry.codec,
        location=entry.location,
        aliases=aliases,
        shards=[Shard(rank, starts, lengths, nbytes) for rank, starts, lengths, nbytes in columns],
    )


def _ranks(manifest: Manifest) -> list[RankFile]:
    total = sum(file.size for file in manifest.files)
    entries = [0] * len(manifest.files)
    for tensor in manifest.tensors.values():
        for rank in tensor.file:
            entries[rank] += 1
    return [
        RankFile(rank, file.name, file.size, file.size / total if total else 0.0, entries[rank])
        for rank, file in enumerate(manifest.files)
    ]
