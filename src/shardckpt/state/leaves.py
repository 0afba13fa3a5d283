"""The kinds of tensor, and what one rank holds of each: the only place that asks what kind a tensor is.

Every kind that is stored as raw bytes becomes a `LocalTensor`: global shape, dtype, and one local view per box.
Boxes, plural: a rank of a ``_StridedShard`` holds several runs of rows.
"""

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from shardckpt.box import Box, full_box, slices
from shardckpt.codecs import DTYPE_NAMES
from shardckpt.errors import ConflictingStateError, UnserialisableError
from shardckpt.state.distributed import is_dtensor, is_sharded_tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from shardckpt.state.placements import Part

_PLAIN_TYPES: Final = {Tensor, torch.nn.Parameter, torch.nn.Buffer}


class LocalTensor(NamedTuple):
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


class Kind(NamedTuple):
    """What ordinary tensors of one shape, dtype and device have in common; see `LocalTensor`."""

    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[Box, ...]
    location: str


def ordinary(value: Tensor) -> Kind | None:
    """The kind of a tensor that says all about itself, and is whole and has data on this rank; None for any other.

    For what ordinary tensors are, it says what `is_raw_tensor`, `local_tensor` and `check_data` say, and sooner.
    """
    if (
        type(value) not in _PLAIN_TYPES
        or value.layout is not torch.strided
        or value.is_quantized
        or value.is_nested
        or value.is_meta
    ):
        return None
    return _kind(value.shape, value.dtype, value.device)


@lru_cache(maxsize=4096)
def _kind(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Kind | None:
    if dtype not in DTYPE_NAMES:
        return None
    whole = full_box(shape)
    return Kind(tuple(shape), DTYPE_NAMES[dtype], (whole,) if whole.volume else (), _location(device, pieces=False))


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


def layout_name(value: Tensor) -> str:
    """A tensor's layout as the skeleton names it."""
    return str(value.layout).removeprefix("torch.")


def is_uninitialised(value: Any) -> bool:
    """Whether a tensor is a lazy module's parameter that has no shape yet."""
    # By type: `isinstance` asks their metaclass, which is slow for each of 20,000 tensors.
    return type(value) in (UninitializedParameter, UninitializedBuffer)


def is_distributed(value: Any) -> bool:
    """Whether a tensor says itself which part of it this rank holds."""
    return is_dtensor(value) or is_sharded_tensor(value)


def local_parts(tensor: Tensor) -> list[Tensor]:
    """The memory on this rank of a tensor for which `is_distributed` is true."""
    return [tensor.to_local()] if is_dtensor(tensor) else [shard.tensor for shard in tensor.local_shards()]  # type: ignore[attr-defined]


def local_tensor(fqn: str, tensor: Tensor, *, split: bool) -> LocalTensor:
    """What this rank holds of ``tensor``; of one on the meta device, what it would hold.

    Raises UnserialisableError for a DTensor with a ``Partial`` placement, or whose local part is not what its
    placements say; ConflictingStateError for a ShardedTensor of that kind.
    """
    kind = ordinary(tensor)
    if kind is not None:
        return of_kind(fqn, tensor, kind, split=split)
    shape = tuple(tensor.shape)
    whole = full_box(shape)
    if is_dtensor(tensor):
        boxes, views = _dtensor_parts(fqn, tensor)
        split = True
    elif is_sharded_tensor(tensor):
        boxes, views = _sharded_tensor_parts(fqn, tensor)
    else:
        boxes, views = [whole], [tensor.detach()]
    pieces = boxes != [whole]
    if pieces or not whole.volume:
        held = [(box, view) for box, view in zip(boxes, views, strict=True) if box.volume]
        boxes, views = [box for box, _ in held], [view for _, view in held]
    dtype, location = DTYPE_NAMES[tensor.dtype], _location(tensor.device, pieces=pieces)
    return LocalTensor(fqn, shape, dtype, tuple(boxes), tuple(views), split, location)


def of_kind(fqn: str, tensor: Tensor, kind: Kind, *, split: bool) -> LocalTensor:
    """What this rank holds of a tensor that is ``ordinary``."""
    shape, dtype, boxes, location = kind
    return LocalTensor(fqn, shape, dtype, boxes, (tensor.detach(),) if boxes else (), split, location)


def is_meta(tensor: Tensor) -> bool:
    """Whether a tensor is on the meta device, and could be given data; a ShardedTensor cannot."""
    return not is_sharded_tensor(tensor) and tensor.is_meta


def check_data(fqn: str, tensor: Tensor, views: Sequence[Tensor]) -> None:
    """Raise UnserialisableError for a tensor without data; ``views`` are those of its `LocalTensor`."""
    if tensor.device.type == "meta" or any(view.device.type == "meta" for view in views):
        raise UnserialisableError(
            f"tensor {fqn!r} is on the meta device and has no data. Load a checkpoint into it, or materialise it with"
            " `module.to_empty(device=...)`."
        )


def memory_key(tensor: Tensor) -> Hashable | None:
    """Equal for two tensors that are one view of one memory (tied weights); None where that cannot be said."""
    if is_dtensor(tensor):
        local = memory_key(_local(tensor))
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


def address(tensor: Tensor) -> int:
    """Where a tensor's memory on this rank begins, equal wherever `memory_key` is; 0 where that is None."""
    local = _local(tensor) if is_dtensor(tensor) else tensor
    if type(local) not in _PLAIN_TYPES or local.is_meta or local.layout is not torch.strided or not local.numel():
        return 0
    return local.data_ptr()


def storage_key(tensor: Tensor) -> Hashable | None:
    """Equal for tensors that share a storage, whatever their views of it."""
    local = _local(tensor) if is_dtensor(tensor) else tensor
    if type(local) not in _PLAIN_TYPES or local.device.type == "meta" or local.layout is not torch.strided:
        return None
    return (local.device, local.untyped_storage().data_ptr())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor do, so that writing them is undefined."""
    local = _local(tensor) if is_dtensor(tensor) else tensor
    return (
        type(local) in _PLAIN_TYPES
        and not local.is_contiguous()
        and any(stride == 0 and size > 1 for stride, size in zip(local.stride(), local.shape, strict=True))
    )


def _location(device: torch.device, *, pieces: bool) -> str:
    # A tensor pieced together from several ranks belongs to none of their devices in particular.
    return device.type if pieces or device.type == "cpu" else str(device)


def _dtensor_parts(fqn: str, tensor: "DTensor") -> tuple[list[Box], list[Tensor]]:
    """Boxes and views of a DTensor; both are empty on a rank that is not in its mesh."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return [], []
    local = _local(tensor).detach()
    try:
        parts = _parts(tuple(tensor.shape), mesh.shape, tuple(coordinate), tensor.placements, tuple(local.shape))
    except ValueError as error:
        raise UnserialisableError(f"DTensor {fqn!r} has {error}.") from error
    # Indexing costs microseconds, thousands of times over; one part is all there is.
    views = [local] if len(parts) == 1 else [local[slices(part.local)] for part in parts]
    return [part.box for part in parts], views


@lru_cache(maxsize=4096)  # layers repeat: thousands of tensors have a few dozen different layouts
def _parts(*layout: Any) -> "list[Part]":
    from shardckpt.state.placements import parts_of  # imports DTensors, which others may do without

    return parts_of(*layout)


def _local(tensor: "DTensor") -> Tensor:
    # In grad mode it records an operation, which takes ten times as long; and to leave that mode takes four times.
    if not torch.is_grad_enabled():
        return tensor.to_local()
    with torch.no_grad():
        return tensor.to_local()


def _sharded_tensor_parts(fqn: str, tensor: Any) -> tuple[list[Box], list[Tensor]]:
    boxes, views = [], []
    for shard in tensor.local_shards():
        box = Box(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes))
        if tuple(shard.tensor.shape) != box.lengths:
            raise ConflictingStateError(
                f"a shard of ShardedTensor {fqn!r} at {box.offsets} has shape {box.lengths} by its metadata, and"
                f" {tuple(shard.tensor.shape)} by its data"
            )
        boxes.append(box)
        views.append(shard.tensor.detach())
    return boxes, views
