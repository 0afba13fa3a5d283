"""Placements: which part of a tensor a rank of a mesh holds. Pure: sizes and a coordinate in, boxes out."""

import itertools
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


class Part(NamedTuple):
    """One box of what a rank holds; both boxes have the same lengths."""

    box: Box
    """In coordinates of the whole tensor."""
    local: Box
    """In coordinates of the rank's own, local tensor."""


def parts_of(
    shape: tuple[int, ...], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> list[Part]:
    """What the rank at ``coordinate`` of a mesh holds of a tensor; nothing, or several parts of a ``_StridedShard``.

    The placements apply one after the other, mesh dimension by mesh dimension. Source of the chunking:
    ``Shard._split_tensor`` (torch.chunk) and ``_StridedShard`` (each of split_factor pieces chunked on its own) in
    torch/distributed/tensor/placement_types.py.

    Raises ValueError, whose text continues "the tensor has", for a placement that is no part of a whole.
    """
    runs: list[Runs] = [[(0, size)] for size in shape]
    for placement, chunks, index in zip(placements, mesh_shape, coordinate, strict=True):
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
    placed = [_placed(_joined(dim_runs)) for dim_runs in runs]
    return [
        Part(
            Box(tuple(start for start, _, _ in combination), tuple(length for _, length, _ in combination)),
            Box(tuple(position for _, _, position in combination), tuple(length for _, length, _ in combination)),
        )
        for combination in itertools.product(*placed)
    ]


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
    """(start, length, position in local memory) of each run."""
    positions = itertools.accumulate((length for _, length in runs), initial=0)
    return [(start, length, position) for (start, length), position in zip(runs, positions, strict=False)]
