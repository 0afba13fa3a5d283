"""Writing and describing shards in one process, for tests of what stands on them."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import shardckpt
from shardckpt.box import Box, full_box
from shardckpt.codecs import DTYPE_NAMES, ITEMSIZE, digest, digests_text
from shardckpt.filenames import rank_manifest_name, shard_name
from shardckpt.manifest import (
    FileEntry,
    Manifest,
    RankManifest,
    TensorEntry,
    encode,
)
from shardckpt.reader import Target
from shardckpt.safetensors_format import entry_key
from shardckpt.staging import Source, StagingPool, copyable, stage
from shardckpt.storage import Storage
from shardckpt.writer import ShardWriter

SAVE_ID = "0123456789ab"


def source(fqn: str, tensor: torch.Tensor, box: Box | None = None, shape: Sequence[int] | None = None) -> Source:
    """`tensor` as the part `box` of a tensor of `shape`; by default it is all of it."""
    whole = tuple(tensor.shape if shape is None else shape)
    part = full_box(whole) if box is None else box
    dtype = DTYPE_NAMES[tensor.dtype]
    return Source(entry_key(fqn, whole, part), fqn, dtype, part, tensor, part.volume * ITEMSIZE[dtype])


def in_order(sources: Sequence[Source]) -> list[Source]:
    """As a plan has them: the widest elements first."""
    return sorted(sources, key=lambda source: (-ITEMSIZE[source.dtype], source.key))


def write_shard(
    storage: Storage,
    sources: Sequence[Source],
    *,
    pool: StagingPool,
    rank: int = 0,
    codec: tuple[str, int] | None = None,
    limit: int | None = None,
    threads: int = 2,
) -> RankManifest:
    """Stage in this thread while another writes, as a save does; raises what the writing thread raises."""
    writer = ShardWriter(
        storage, shard_name(rank, SAVE_ID), SAVE_ID, rank, sources, pool=pool, codec=codec, threads=threads
    )
    outcome: list[RankManifest | BaseException] = []

    def run() -> None:
        try:
            outcome.append(writer.run())
        except BaseException as error:  # noqa: BLE001 - it is raised again by the caller
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        stage(sources, pool, limit=limit, first_block_offset=writer.first_block_offset, emit=writer.emit)
    except BaseException as error:  # noqa: BLE001 - it is raised again by the caller
        writer.cancel(error)
    else:
        writer.finish()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def publish(storage: Storage, ranks: Sequence[RankManifest], shapes: Mapping[str, Sequence[int]]) -> Manifest:
    """Put the manifests of all ranks, and return the one of the checkpoint."""
    files: list[FileEntry] = []
    tensors: dict[str, TensorEntry] = {}
    for rank in ranks:
        data = encode(rank)
        name = rank_manifest_name(rank.rank, SAVE_ID)
        storage.put(name, data, replace=True)
        for entry in rank.entries.values():
            shape = tuple(shapes[entry.fqn])
            tensor = tensors.setdefault(entry.fqn, TensorEntry(entry.dtype, shape, [], [], [], [], []))
            if entry.nbytes:
                columns = (tensor.file, tensor.offset, tensor.nbytes, tensor.starts, tensor.lengths)
                row = (len(files), entry.offset, entry.nbytes, entry.starts, entry.lengths)
                for column, value in zip(columns, row, strict=True):
                    column.append(value)  # type: ignore[attr-defined]
        files.append(FileEntry(rank.file, rank.size, name, len(data), digests_text([digest(data)])))
    return Manifest(
        save_id=SAVE_ID,
        created="2026-01-01T00:00:00Z",
        world_size=len(files),
        writer={"shardckpt": shardckpt.__version__},
        files=files,
        state=None,
        tensors=tensors,
    )


def save(storage: Storage, tensors: Mapping[str, torch.Tensor], pool: StagingPool, **options: Any) -> Manifest:
    """A checkpoint of whole tensors from one rank."""
    storage.prepare()
    sources = in_order([source(fqn, tensor) for fqn, tensor in tensors.items()])
    written = write_shard(storage, sources, pool=pool, **options)
    return publish(storage, [written], {fqn: tensor.shape for fqn, tensor in tensors.items()})


def whole(fqn: str, tensor: torch.Tensor) -> Target:
    return Target(fqn, full_box(tensor.shape), tensor)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's elements: equal also where NaNs aren't."""
    elements = copyable(tensor.detach())
    return torch.empty(elements.shape, dtype=elements.dtype).copy_(elements).view(-1).view(torch.uint8)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Elements of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    return torch.randint(high, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


@contextmanager
def small_grid() -> Iterator[None]:
    """Blocks of 16 KiB and digest blocks of 1 KiB, so that small tensors meet every boundary that large ones do."""
    small = {
        "BLOCK": 16 << 10,
        "DIGEST_BLOCK": 1 << 10,
        "SMALL": 1 << 9,
        "GAP": 1 << 9,
        "MAX_CELL": 12 << 10,
        "CACHED_STEP": 2 << 10,
    }
    modules = [
        shardckpt.storage.base,
        shardckpt.codecs,
        shardckpt.staging.memory,
        shardckpt.staging.copying,
        shardckpt.staging.filling,
        shardckpt.writer.cells,
        shardckpt.writer.output,
        shardckpt.writer.streams,
        shardckpt.reader.fetch,
        shardckpt.reader.shards,
        shardckpt.reader.parts,
        shardckpt.reader.targets,
    ]
    patches = [
        mock.patch.object(module, name, value)
        for module in modules
        for name, value in small.items()
        if hasattr(module, name)
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
