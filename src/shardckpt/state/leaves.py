"""The kinds of tensor, and what one rank holds of each: the only place that asks what kind a tensor is.

Every kind that is stored as raw bytes becomes a `LocalTensor`: global shape, dtype, and one local view per box.
Boxes, plural: a rank of a ``_StridedShard`` holds several runs of rows.
"""

import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from shardckpt.box import Box, full_box
from shardckpt.codecs import DTYPE_NAMES
from shardckpt.errors import UnserialisableError

try:
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
except ImportError:  # torch built without distributed, or a release that dropped it
    ShardedTensor = None  # type: ignore[assignment, misc]

try:
    from torch.distributed.tensor.placement_types import _StridedShard
except ImportError:
    _StridedShard = None  # type: ignore[assignment, misc]

_PLAIN_TYPES: Final = {Tensor, torch.nn.Parameter, torch.nn.Buffer}


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """What this rank holds of one tensor.

    ``views[i]`` is the local data of ``boxes[i]`` (global coordinates) and has the shape ``boxes[i].lengths``; both are
    empty on a rank that holds nothing. ``split`` says that holders of one box hold equal data, so that each may write a
    part of it. ``location`` is the tag of ``torch.load``.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[Box, ...]
    views: tuple[Tensor, ...]
    split: bool
    location: str


def is_raw_tensor(value: Any) -> bool:
    """Whether a tensor's bytes are its value: not so for quantized, nested, sparse and unknown subclasses."""
    if is_distributed(value):
        return True
    return (
        type(value) in _PLAIN_TYPES
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_nested
        and value.dtype in DTYPE_NAMES
    )


def is_uninitialised(value: Any) -> bool:
    """Whether a tensor is a lazy module's parameter that has no shape yet."""
    # By type: `isinstance` asks their metaclass, which is slow for each of 20,000 tensors.
    return type(value) in (UninitializedParameter, UninitializedBuffer)


def is_distributed(value: Any) -> bool:
    """Whether a tensor says itself which part of it this rank holds."""
    return isinstance(value, DTensor) or _is_sharded_tensor(value)


def _is_sharded_tensor(value: Any) -> bool:
    return ShardedTensor is not None and isinstance(value, ShardedTensor)


def local_tensor(fqn: str, tensor: Tensor, *, split: bool) -> LocalTensor:
    """What this rank holds of ``tensor``.

    Raises UnserialisableError for a tensor without data (meta, fake) and for a DTensor with a ``Partial`` placement.
    """
    shape = tuple(tensor.shape)
    whole = full_box(shape)
    boxes, views = [whole], [tensor.detach()]
    if isinstance(tensor, DTensor):
        boxes, views = _dtensor_parts(fqn, tensor)
        split = True
    elif _is_sharded_tensor(tensor):
        boxes, views = _sharded_tensor_parts(tensor)
    if tensor.device.type == "meta" or any(view.device.type == "meta" for view in views):
        raise UnserialisableError(
            f"tensor {fqn!r} is on the meta device and has no data. Materialise it first, for instance with"
            " `module.to_empty(device=...)`."
        )
    pieces = boxes != [whole]
    if pieces or not whole.volume:
        held = [(box, view) for box, view in zip(boxes, views, strict=True) if box.volume]
        boxes, views = [box for box, _ in held], [view for _, view in held]
    dtype, location = DTYPE_NAMES[tensor.dtype], _location(tensor, pieces=pieces)
    return LocalTensor(fqn, shape, dtype, tuple(boxes), tuple(views), split, location)


def memory_key(tensor: Tensor) -> Hashable | None:
    """Equal for two tensors that are one view of one memory (tied weights); None where that cannot be said."""
    if isinstance(tensor, DTensor):
        local = memory_key(tensor.to_local())
        return None if local is None else (local, tensor.device_mesh, tensor.placements, tuple(tensor.shape))
    if type(tensor) not in _PLAIN_TYPES or tensor.device.type == "meta" or tensor.numel() == 0:
        return None
    pointer = tensor.data_ptr()
    return (
        tensor.device,
        pointer,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def storage_key(tensor: Tensor) -> Hashable | None:
    """Equal for tensors that share a storage, whatever their views of it."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if type(local) not in _PLAIN_TYPES or local.device.type == "meta" or local.layout is not torch.strided:
        return None
    return (local.device, local.untyped_storage().data_ptr())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor do, so that writing them is undefined."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return type(local) in _PLAIN_TYPES and any(
        stride == 0 and size > 1 for stride, size in zip(local.stride(), local.shape, strict=True)
    )


def _location(tensor: Tensor, *, pieces: bool) -> str:
    # A tensor pieced together from several ranks belongs to none of their devices in particular.
    device = tensor.device
    return device.type if pieces or device.type == "cpu" else str(device)


Runs = list[tuple[int, int]]
"""Runs of one dimension, (start, length) in global coordinates, in the order in which they lie in local memory."""


def _take(runs: Runs, start: int, stop: int) -> Runs:
    """The part [start, stop) of the concatenation of ``runs``."""
    taken, position = [], 0
    for first, length in runs:
        low, high = max(start, position), min(stop, position + length)
        if low < high:
            taken.append((first + low - position, high - low))
        position += length
    return taken


def _chunk(runs: Runs, chunks: int, index: int) -> Runs:
    """Chunk ``index`` of ``torch.chunk(runs, chunks)``; chunks past the end are empty."""
    total = sum(length for _, length in runs)
    size = -(-total // chunks)
    return _take(runs, index * size, min((index + 1) * size, total))


def _dtensor_parts(fqn: str, tensor: DTensor) -> tuple[list[Box], list[Tensor]]:
    """Boxes and views of a DTensor: its placements applied to each dimension, mesh dimension by mesh dimension.

    Source of the chunking: ``Shard._split_tensor`` (torch.chunk) and ``_StridedShard`` (each of
    split_factor pieces chunked on its own) in torch/distributed/tensor/placement_types.py.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return [], []
    runs: list[Runs] = [[(0, size)] for size in tensor.shape]
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        chunks, index = mesh.size(mesh_dim), coordinate[mesh_dim]
        if _StridedShard is not None and isinstance(placement, _StridedShard):
            dim, factor = placement.dim, int(placement.split_factor)
            parts = [_chunk(runs[dim], factor, part) for part in range(factor)]
            runs[dim] = [run for part in parts for run in _chunk(part, chunks, index)]
        elif isinstance(placement, Shard):
            runs[placement.dim] = _chunk(runs[placement.dim], chunks, index)
        else:
            reason = (
                "its value is a sum that has not been reduced yet; call `redistribute` to Replicate() or Shard() first"
                if isinstance(placement, Partial)
                else "this version does not know that placement"
            )
            raise UnserialisableError(f"DTensor {fqn!r} has the placement {placement!r}: {reason}.")
    return _boxes_and_views([_joined(dim_runs) for dim_runs in runs], tensor.to_local().detach())


def _joined(runs: Runs) -> Runs:
    """Neighbouring runs made one, so that contiguous shards are one box."""
    joined: Runs = []
    for start, length in runs:
        if joined and joined[-1][0] + joined[-1][1] == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return joined


def _boxes_and_views(runs: list[Runs], local: Tensor) -> tuple[list[Box], list[Tensor]]:
    boxes, views = [], []
    placed = []
    for dim_runs in runs:
        positions = itertools.accumulate((length for _, length in dim_runs), initial=0)
        placed.append(
            [(start, length, position) for (start, length), position in zip(dim_runs, positions, strict=False)]
        )
    for combination in itertools.product(*placed):
        view = local
        for dim, (_, length, position) in enumerate(combination):
            view = view.narrow(dim, position, length)
        boxes.append(Box(tuple(c[0] for c in combination), tuple(c[1] for c in combination)))
        views.append(view)
    return boxes, views


def _sharded_tensor_parts(tensor: Any) -> tuple[list[Box], list[Tensor]]:
    shards = tensor.local_shards()
    boxes = [Box(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes)) for shard in shards]
    return boxes, [shard.tensor.detach() for shard in shards]
