"""Every element of some tensors, in bounded memory and in the order of the files, so that each is read about once."""

from collections.abc import Collection, Iterator, Sequence
from operator import add
from typing import Final

import torch
from torch import Tensor

from shardckpt.box import Box, boxes_of_range
from shardckpt.codecs import ITEMSIZE, torch_dtype
from shardckpt.manifest import Manifest
from shardckpt.planner import Wanted
from shardckpt.reader import Reading, ReadPlan, Target
from shardckpt.staging import StagingPool
from shardckpt.tools.opened import Opened

BATCH: Final = 64 << 20
"""Bytes of tensors that one batch holds; the buffers of its reading hold about as much again."""


def batches(manifest: Manifest, names: Collection[str]) -> Iterator[list[Wanted]]:
    """All elements of the stored tensors ``names``, each once, as boxes of `BATCH` bytes together at most.

    Those that lie in one file come after each other. Tensors without elements have none.
    """
    stored = [
        (tensor.file[shard], tensor.offset[shard], name, shard)
        for name in names
        for tensor in (manifest.tensors[name],)
        for shard in range(len(tensor.file))
    ]
    batch: list[Wanted] = []
    nbytes = 0
    for _, _, name, shard in sorted(stored):
        tensor = manifest.tensors[name]
        starts, lengths = tensor.starts[shard], tensor.lengths[shard]
        torch_dtype(tensor.dtype)  # says what is to be done where this torch or this version lacks it
        itemsize = ITEMSIZE[tensor.dtype]
        volume = Box(starts, lengths).volume
        # A batch's bytes are whole blocks under a digest, so that none is read twice.
        for start in range(0, volume, BATCH // itemsize):
            stop = min(volume, start + BATCH // itemsize)
            if nbytes + (stop - start) * itemsize > BATCH:
                yield batch
                batch, nbytes = [], 0
            nbytes += (stop - start) * itemsize
            batch += [
                Wanted(name, Box(tuple(map(add, starts, box.offsets)), box.lengths))
                for box in boxes_of_range(lengths, start, stop)
            ]
    if batch:
        yield batch


def read(opened: Opened, wanted: Sequence[Wanted], pool: StagingPool) -> list[Tensor]:
    """Those regions as tensors of the stored dtypes, read by ``pool``'s memory and verified.

    Raises CorruptCheckpointError that names the tensor, the file and the byte; StorageError.
    """
    plan = ReadPlan(opened.manifest, opened.storage, wanted)
    plan.check()
    dtypes = [torch_dtype(opened.manifest.tensors[plan.stored_name(item.fqn)].dtype) for item in wanted]
    tensors = [torch.empty(item.box.lengths, dtype=dtype) for item, dtype in zip(wanted, dtypes, strict=True)]
    targets = [Target(name, box, tensor) for (name, box), tensor in zip(wanted, tensors, strict=True)]
    Reading(plan, targets, pool=pool).alone()
    return tensors
