"""Meshes and layouts on them, for properties of what ranks hold."""

import itertools
from collections.abc import Iterable, Sequence
from math import prod

import torch
from hypothesis import strategies as st
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

MOST_RANKS = 18


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Scalars, vectors and more, with dimensions that are empty, of length 1, and that no mesh divides."""
    return st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 12, 13]), max_size=4).map(tuple)


def meshes() -> st.SearchStrategy[list[int]]:
    """Of one to three dimensions, and not too many ranks."""
    return st.lists(st.integers(1, 6), min_size=1, max_size=3).filter(lambda mesh: prod(mesh) <= MOST_RANKS)


def coordinates(mesh: Sequence[int]) -> Iterable[tuple[int, ...]]:
    """Of each rank, in order of rank."""
    return itertools.product(*map(range, mesh))


@st.composite
def layouts_on(
    draw: st.DrawFn, shape: tuple[int, ...], mesh: Sequence[int], *, strided: bool = True
) -> list[Placement]:
    """A placement for each dimension of a mesh; ``strided`` ones among them, if wished, as FSDP gives them."""
    kinds: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
    placements = [draw(st.sampled_from(kinds)) for _ in mesh]
    for dim in reversed(range(len(mesh))):
        placement = placements[dim]
        if strided and isinstance(placement, Shard) and draw(st.booleans()):
            factor = prod(
                size
                for size, inner in zip(mesh[dim + 1 :], placements[dim + 1 :], strict=True)
                if getattr(inner, "dim", None) == placement.dim
            )
            if factor > 1:
                placements[dim] = _StridedShard(placement.dim, split_factor=factor)
    return placements


def local_shape(
    shape: tuple[int, ...], mesh: Sequence[int], at: Sequence[int], placements: Sequence[Placement]
) -> tuple[int, ...]:
    """What a rank's part is shaped like, cut as torch.chunk does, strided placements as FSDP2 means them."""
    order = list(zip(mesh, at, placements, strict=True))
    plain = [item for item in order if not isinstance(item[2], _StridedShard)]
    plain += [item for item in reversed(order) if isinstance(item[2], _StridedShard)]
    sizes = list(shape)
    for count, index, placement in plain:
        dim = getattr(placement, "dim", None)
        if dim is not None:
            chunks = torch.empty(sizes[dim], device="meta").chunk(count)
            sizes[dim] = len(chunks[index]) if index < len(chunks) else 0
    return tuple(sizes)
