"""Placements: which part of a tensor a rank of a mesh holds. Pure: sizes and a coordinate in, boxes out."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from shardckpt.box import Box

try:
    from torch.distributed.tensor.placement_types import _StridedShard
except ImportError:
    _StridedShard = None  # type: ignore[assignment, misc]

Runs = list[tuple[int, int]]
"""Runs of one dimension, (start, length) in global coordinates, in the order in which they lie in local memory."""


Order = list[tuple[int, Placement]]
"""Dimensions of a mesh, each with its placement, in the order in which they cut a tensor."""


class Part(NamedTuple):
    """One box of what a rank holds; both boxes have the same lengths."""

    box: Box
    """In coordinates of the whole tensor."""
    local: Box
    """In coordinates of the rank's own, local tensor."""


def parts_of(
    shape: tuple[int, ...],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
    local_shape: tuple[int, ...],
) -> list[Part]:
    """What the rank at ``coordinate`` of a mesh holds of a tensor; nothing, or several parts of a ``_StridedShard``.

    ``local_shape`` is the shape of the rank's own, local tensor.

    Raises ValueError, whose text continues "the tensor has", for a placement that is no part of a whole, and where the
    placements say that the local tensor has another shape.
    """
    lengths: tuple[int, ...] = ()
    # FSDP's way first: where the two agree in shape, and not in what the shape holds, such tensors come from FSDP.
    for order in (_as_fsdp_cuts(placements, mesh_shape), _by_mesh(placements)):
        runs = [_joined(dim_runs) for dim_runs in _cut(shape, mesh_shape, coordinate, order)]
        lengths = tuple(sum(length for _, length in dim_runs) for dim_runs in runs)
        if lengths == local_shape or 0 == math.prod(lengths) == math.prod(local_shape):
            return [
                Part(
                    Box(tuple(start for start, _, _ in combination), tuple(length for _, length, _ in combination)),
                    Box(tuple(place for _, _, place in combination), tuple(length for _, length, _ in combination)),
                )
                for combination in itertools.product(*map(_placed, runs))
            ]
    raise ValueError(
        f"a local part of shape {local_shape} at {tuple(coordinate)} of a mesh of shape {tuple(mesh_shape)}, where its"
        f" shape {shape} and placements {tuple(placements)} make it {lengths}"
    )


def _by_mesh(placements: Sequence[Placement]) -> Order:
    """Mesh dimension by mesh dimension, as DTensor defines its placements and ``distribute_tensor`` applies them."""
    return list(enumerate(placements))


def _as_fsdp_cuts(placements: Sequence[Placement], mesh_shape: Sequence[int]) -> Order:
    """What FSDP2 does to a parameter that tensor parallelism has cut already, and then describes by ``_StridedShard``.

    It cuts each of the parts once more. Where the sizes are uneven, that is not what the description says: of 7 rows on
    a 3x2 mesh it gives the last one to (2, 1), where reading by mesh dimension gives it to (2, 0). Source:
    ``_init_sharded_param`` in torch/distributed/fsdp/_fully_shard/_fsdp_param.py, which states the split factor too.
    """
    order = _by_mesh(placements)
    for mesh_dim, placement in reversed(order[:]):
        if _StridedShard is None or not isinstance(placement, _StridedShard):
            continue
        inner = [dim for dim, other in order if dim > mesh_dim and getattr(other, "dim", None) == placement.dim]
        if placement.split_factor == math.prod(mesh_shape[dim] for dim in inner):
            order.remove((mesh_dim, placement))
            order.append((mesh_dim, Shard(placement.dim)))
    return order


def _cut(shape: tuple[int, ...], mesh_shape: Sequence[int], coordinate: Sequence[int], order: Order) -> list[Runs]:
    """The runs of each dimension that are left after each placement has been applied, in this order.

    Source of the chunking: ``Shard._split_tensor`` (torch.chunk) and ``_StridedShard`` (each of split_factor pieces
    chunked on its own) in torch/distributed/tensor/placement_types.py.
    """
    runs: list[Runs] = [[(0, size)] for size in shape]
    for mesh_dim, placement in order:
        chunks, index = mesh_shape[mesh_dim], coordinate[mesh_dim]
        if isinstance(placement, Replicate):
            continue
        if _StridedShard is not None and isinstance(placement, _StridedShard):
            dim, factor = placement.dim, int(placement.split_factor)
            pieces = [_chunk(runs[dim], factor, piece) for piece in range(factor)]
            runs[dim] = [run for piece in pieces for run in _chunk(piece, chunks, index)]
        elif isinstance(placement, Shard):
            runs[placement.dim] = _chunk(runs[placement.dim], chunks, index)
        else:
            reason = (
                "its value is a sum that has not been reduced yet; call `redistribute` to Replicate() or Shard() first"
                if isinstance(placement, Partial)
                else "this version does not know that placement"
            )
            raise ValueError(f"the placement {placement!r}: {reason}")
    return runs


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


def _joined(runs: Runs) -> Runs:
    """Neighbouring runs made one, so that contiguous shards are one box."""
    joined: Runs = []
    for start, length in runs:
        if joined and joined[-1][0] + joined[-1][1] == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return joined


def _placed(runs: Runs) -> list[tuple[int, int, int]]:
    """(start, length, place in the local tensor) of each run."""
    positions = itertools.accumulate((length for _, length in runs), initial=0)
    return [(start, length, position) for (start, length), position in zip(runs, positions, strict=False)]
