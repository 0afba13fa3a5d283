"""What a rank of a mesh holds: as torch cuts it, for every mesh, layout and shape, without a process."""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from meshes import coordinates, layouts_on, local_shape, meshes, shapes
from shardckpt.box import covers_exactly, full_box, slices
from shardckpt.state.placements import Part, parts_of


def cut_by_torch(full: Tensor, mesh: Sequence[int], at: Sequence[int], placements: Sequence[Placement]) -> Tensor:
    """The local tensor, cut by torch's own code for each placement, one mesh dimension after the other."""
    for size, index, placement in zip(mesh, at, placements, strict=True):
        if not isinstance(placement, Replicate):
            full = placement._split_tensor(full, size, with_padding=False)[0][index]  # type: ignore[attr-defined]
    return full


def assemble(parts: Sequence[Part], full: Tensor, local: tuple[int, ...]) -> Tensor:
    """The local tensor that the parts describe, each of whose elements some part has; -1 where none has."""
    made = torch.full(local, -1)
    for part in parts:
        assert (made[slices(part.local)] == -1).all()
        made[slices(part.local)] = full[slices(part.box)]
    return made


@settings(max_examples=400)
@given(st.data())
def test_parts_are_what_torch_cuts(data: st.DataObject) -> None:
    """Element by element, for up to four dimensions, three of a mesh, several of them on one of the tensor."""
    shape, mesh = data.draw(shapes()), data.draw(meshes())
    placements = data.draw(layouts_on(shape, mesh, strided=False))
    full = torch.arange(prod(shape)).view(shape)
    for at in coordinates(mesh):
        local = cut_by_torch(full, mesh, at, placements)
        parts = parts_of(shape, mesh, at, placements, tuple(local.shape))
        assert len(parts) <= 1
        if local.numel():
            assert torch.equal(assemble(parts, full, tuple(local.shape)), local)
            assert parts[0].box.lengths == tuple(local.shape)
        else:
            assert sum(part.box.volume for part in parts) == 0


@settings(max_examples=200)
@given(st.data())
def test_strided_parts_are_what_torch_cuts(data: st.DataObject) -> None:
    """With split factors that no FSDP gives, the placements mean what torch's own code for them does."""
    rows, size, factor = (data.draw(st.integers(0, 40)), data.draw(st.integers(1, 6)), data.draw(st.integers(2, 6)))
    shape, placements = (rows, 2), [_StridedShard(0, split_factor=factor)]
    full = torch.arange(rows * 2).view(shape)
    for at in range(size):
        local = cut_by_torch(full, [size], [at], placements)
        parts = parts_of(shape, [size], [at], placements, tuple(local.shape))
        assert torch.equal(assemble(parts, full, tuple(local.shape)), local)
        starts = {part.box.offsets[0] for part in parts}
        assert not any(part.box.offsets[0] + part.box.lengths[0] in starts for part in parts if part.box.volume)


def fsdp_layouts(tensor_parallel: int, data_parallel: int) -> Iterator[tuple[list[int], list[Placement], int]]:
    """(mesh, placements, the mesh dimension of data parallelism) of FSDP2 or HSDP on rows that are cut already."""
    strided = _StridedShard(0, split_factor=tensor_parallel)
    yield [data_parallel, tensor_parallel], [strided, Shard(0)], 0
    yield [2, data_parallel, tensor_parallel], [Replicate(), strided, Shard(0)], 1


@pytest.mark.parametrize("tensor_parallel", [2, 3, 4])
@pytest.mark.parametrize("data_parallel", [1, 2, 3, 4, 5])
def test_fsdp_over_tensor_parallelism_holds_its_own_rows(tensor_parallel: int, data_parallel: int) -> None:
    """FSDP2 cuts each part of tensor parallelism once more: with uneven rows too, its ranks hold what they say."""
    for rows in range(24):
        full = torch.arange(rows)
        for mesh, placements, dim in fsdp_layouts(tensor_parallel, data_parallel):
            held = []
            for at in coordinates(mesh):
                local = cut_by_torch(full, mesh[::-1], at[::-1], [Shard(0), Shard(0), Replicate()][: len(mesh)])
                parts = parts_of((rows,), mesh, at, placements, tuple(local.shape))
                assert torch.equal(assemble(parts, full, tuple(local.shape)), local), (rows, mesh, at)
                held += [part.box for part in parts if at[:dim] == (0,) * dim and part.box.volume]
            assert covers_exactly((rows,), held).exact


def test_three_cuts_of_one_dimension() -> None:
    """Tensor parallelism within experts within FSDP: each rank holds its part of a part of a part."""
    mesh = [2, 3, 2]
    placements = [_StridedShard(0, split_factor=6), _StridedShard(0, split_factor=2), Shard(0)]
    for rows in range(30):
        full = torch.arange(rows)
        for at in coordinates(mesh):
            local = cut_by_torch(full, mesh[::-1], at[::-1], [Shard(0)] * 3)
            parts = parts_of((rows,), mesh, at, placements, tuple(local.shape))
            assert torch.equal(assemble(parts, full, tuple(local.shape)), local), (rows, at)


@settings(max_examples=200)
@given(st.data())
def test_a_mesh_holds_everything(data: st.DataObject) -> None:
    """Whatever the layout, the ranks of a mesh together hold each element, and equal or disjoint boxes."""
    shape, mesh = data.draw(shapes()), data.draw(meshes())
    placements = data.draw(layouts_on(shape, mesh))
    counts = np.zeros(shape, int)
    boxes = set()
    for at in coordinates(mesh):
        local = local_shape(shape, mesh, at, placements)
        parts = parts_of(shape, mesh, at, placements, local)
        boxes |= {part.box for part in parts if part.box.volume}
        assert sum(part.box.volume for part in parts) == prod(local)
    for box in boxes:
        counts[slices(box)] += 1
    assert (counts == 1).all()


def test_a_rank_that_holds_everything_holds_one_box() -> None:
    """Replicated, or alone on its mesh: no seams where nothing is cut."""
    for placement in (Replicate(), Shard(0), Shard(1), _StridedShard(0, split_factor=3)):
        assert parts_of((6, 4), [1], [0], [placement], (6, 4)) == [Part(full_box((6, 4)), full_box((6, 4)))]


@pytest.mark.parametrize("local", [(3, 4), (2, 3), (0, 4), (2,)])
def test_a_local_part_of_another_shape_is_refused(local: tuple[int, ...]) -> None:
    """A DTensor that was put together with a wrong global shape, or on the wrong mesh, is told both sides."""
    with pytest.raises(ValueError, match=r"shape \(.*\) at \(1,\).*shape \(4, 4\).*Shard.*make it \(2, 4\)"):
        parts_of((4, 4), [2], [1], [Shard(0)], local)


def test_nothing_held_has_any_shape() -> None:
    """Of a part without elements it doesn't matter how it is empty."""
    for local in ((0, 3), (0,), (2, 0)):
        assert sum(part.box.volume for part in parts_of((2, 3), [4], [3], [Shard(0)], local)) == 0


def test_what_is_no_part_of_a_whole_is_refused() -> None:
    """A sum that has not been reduced has no value yet."""
    with pytest.raises(ValueError, match="'sum'|Partial.*has not been reduced"):
        parts_of((2,), [2], [0], [Partial()], (2,))
