"""Any layout to any layout, on simulated worlds: N ranks plan and write, M ranks on another mesh plan and read."""

import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Placement, Replicate, Shard

from meshes import coordinates, layouts_on, local_shape, meshes, shapes
from shardckpt.box import Box, contains, relative_to, slices
from shardckpt.codecs import DIGEST_BLOCK
from shardckpt.errors import ConflictingStateError
from shardckpt.planner import Held, ShardPlan, Wanted, plan_load, plan_save
from shardckpt.reader.fetch import PAGE, Extent, cells_of, ranges, union
from shardckpt.state.placements import parts_of
from shardckpt.storage import BLOCK

ITEMSIZE = {"int8": 1, "int32": 4, "int64": 8}


class World(NamedTuple):
    """Some tensors, and what each rank of a mesh holds of them. A rank past the mesh, or left out, lacks a tensor."""

    held: list[list[Held]]
    mesh: list[int]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {one.fqn: one.shape for rank in self.held for one in rank}


def boxes_of(
    shape: tuple[int, ...], mesh: Sequence[int], at: Sequence[int], placements: Sequence[Placement]
) -> tuple[Box, ...]:
    """As `local_tensor` gives them."""
    parts = parts_of(shape, mesh, at, placements, local_shape(shape, mesh, at, placements))
    return tuple(part.box for part in parts if part.box.volume)


@st.composite
def worlds(draw: st.DrawFn, tensors: dict[str, tuple[tuple[int, ...], str]]) -> World:
    """One layout after another for the tensors (shape and dtype by name), on one mesh, or on a part of the world."""
    mesh = draw(meshes())
    more = draw(st.sampled_from([0, 0, 1, 3]))
    held: list[list[Held]] = [[] for _ in range(prod(mesh) + more)]
    for fqn, (shape, dtype) in tensors.items():
        placements = draw(layouts_on(shape, mesh))
        # The mesh may lie anywhere in the world; ranks outside know of the tensor, or don't.
        order = draw(st.permutations(range(len(held)))) if more else range(len(held))
        knows = draw(st.booleans())
        for rank in order[prod(mesh) :]:
            if knows:
                held[rank].append(Held(fqn, shape, dtype, (), split=True))
        for rank, at in zip(order, coordinates(mesh), strict=False):
            held[rank].append(Held(fqn, shape, dtype, boxes_of(shape, mesh, at, placements), split=True))
    return World(held, mesh)


@st.composite
def resharded(draw: st.DrawFn) -> tuple[World, World]:
    """The same tensors in two worlds."""
    dtypes = st.sampled_from(sorted(ITEMSIZE))
    tensors = {f"t{number}": (draw(shapes()), draw(dtypes)) for number in range(draw(st.integers(1, 4)))}
    return draw(worlds(tensors)), draw(worlds(tensors))


def truth(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(prod(shape)).reshape(shape) + 1


def write(world: World, plans: Sequence[ShardPlan]) -> dict[str, list[tuple[Box, np.ndarray]]]:
    """Each rank writes, from the memory that it has alone, what its plan says: the pieces by tensor."""
    stored: defaultdict[str, list[tuple[Box, np.ndarray]]] = defaultdict(list)
    for plan, mine in zip(plans, world.held, strict=True):
        boxes = {one.fqn: one.boxes for one in mine}
        for item in plan.items:
            whole = boxes[item.fqn][item.held]
            assert contains(whole, item.box)
            memory = truth(world.shapes[item.fqn])[slices(whole)]
            stored[item.fqn].append((item.box, memory[slices(relative_to(whole, item.box))]))
    return stored


@settings(max_examples=300)
@given(resharded(), st.sampled_from([1, 8, 64, 1 << 20]))
def test_any_layout_fills_any_other(pair: tuple[World, World], min_piece: int) -> None:
    """Each element is stored once, and arrives once, with its value, at every rank that wants it."""
    source, target = pair
    stored = write(source, plan_save(source.held, ITEMSIZE, min_piece=min_piece))
    for fqn, shape in source.shapes.items():
        times = np.zeros(shape, int)
        for box, _ in stored[fqn]:
            times[slices(box)] += 1
        assert (times == 1).all()
    for rank in target.held:
        wanted = [Wanted(one.fqn, box) for one in rank for box in one.boxes]
        memory = [np.zeros(want.box.lengths, int) for want in wanted]
        elements = 0
        for item in plan_load(wanted, lambda fqn: [box for box, _ in stored[fqn]]):
            fqn, box = wanted[item.wanted]
            held, piece = stored[fqn][item.shard]
            into = slices(relative_to(box, item.overlap))
            assert not memory[item.wanted][into].any()  # the values start at 1
            memory[item.wanted][into] = piece[slices(relative_to(held, item.overlap))]
            elements += item.overlap.volume
        for want, got in zip(wanted, memory, strict=True):
            assert (got == truth(source.shapes[want.fqn])[slices(want.box)]).all()
        assert elements == sum(want.box.volume for want in wanted)


@settings(max_examples=150)
@given(meshes(), st.data())
def test_replicas_share_the_writing(mesh: list[int], data: st.DataObject) -> None:
    """Of data that all replicas of a group hold, nobody writes more than the mean and one smallest piece."""
    # Rows of one element can be cut anywhere, so nothing but the smallest piece limits how level it gets.
    lengths = data.draw(st.lists(st.integers(0, 3000), min_size=1, max_size=4))
    held: list[list[Held]] = [[] for _ in coordinates(mesh)]
    for number, length in enumerate(lengths):
        for rank in held:
            rank.append(Held(f"t{number}", (length,), "int8", (Box((0,), (length,)),), split=True))
    min_piece = data.draw(st.sampled_from([16, 64]))
    loads = [sum(item.nbytes for item in plan.items) for plan in plan_save(held, ITEMSIZE, min_piece=min_piece)]
    mean = sum(lengths) / len(held)
    assert sum(loads) == sum(lengths)
    if mean >= min_piece:
        assert max(loads) <= mean + min_piece


@settings(max_examples=100)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 2000))
def test_hybrid_shards_are_split_over_their_replicas(replicas: int, parts: int, rows: int) -> None:
    """On a replicate-and-shard mesh the replicas of each shard write a part of it each, whole rows only."""
    mesh, shape = [replicas, parts], (rows, 4)
    held = [
        [Held("w", shape, "int8", boxes_of(shape, mesh, at, [Replicate(), Shard(0)]), split=True)]
        for at in coordinates(mesh)
    ]
    plans = plan_save(held, ITEMSIZE, min_piece=16)
    for part in range(parts):
        group = [
            sum(item.nbytes for item in plans[rank].items) for rank, at in enumerate(coordinates(mesh)) if at[1] == part
        ]
        whole = sum(box.volume for box in held[part][0].boxes)
        assert sum(group) == whole
        if whole >= 16 * replicas:
            assert max(group) <= whole / replicas + 16


@settings(max_examples=150)
@given(resharded(), st.randoms(use_true_random=False))
def test_every_rank_plans_the_same(pair: tuple[World, World], rng: random.Random) -> None:
    """A plan doesn't depend on the order in which a rank happens to list its tensors, nor on who computes it."""
    held = pair[0].held
    plans = plan_save(held, ITEMSIZE, min_piece=8)
    assert plan_save([rng.sample(rank, len(rank)) for rank in held], ITEMSIZE, min_piece=8) == plans
    assert plan_save([tuple(rank) for rank in held], ITEMSIZE, min_piece=8) == plans


PLAN = """
from torch.distributed.tensor import Replicate, Shard
from test_planner_layouts import ITEMSIZE, boxes_of, coordinates
from shardckpt.planner import Held, plan_save
mesh = [2, 3]
layouts = [[Replicate(), Shard(0)], [Shard(1), Shard(0)], [Shard(0), Replicate()], [Replicate(), Replicate()]]
held = [
    [Held(f"t{n}", (7, 5), "int32", boxes_of((7, 5), mesh, at, p), True) for n, p in enumerate(layouts * 3)]
    for at in coordinates(mesh)
]
print(plan_save(held, ITEMSIZE, min_piece=8))
"""


def test_plans_do_not_depend_on_the_hash_seed() -> None:
    """Processes of one run have different hash seeds, and must come to one plan."""
    paths = os.pathsep.join(path for path in sys.path if path)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PLAN],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "4711")
    ]
    plans = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert plans[0] == plans[1]
    assert "WriteItem" in plans[0]


@st.composite
def harmed(draw: st.DrawFn, held: list[list[Held]]) -> tuple[str, int, list[list[Held]]]:
    """One rank's word on one tensor changed: (the tensor, the rank, what the ranks now say)."""
    rank, index = draw(st.sampled_from([(r, i) for r, mine in enumerate(held) for i in range(len(mine))]))
    one = held[rank][index]
    kind = draw(st.sampled_from(["moved", "dropped", "grown", "shrunk", "shape", "dtype", "twice", "dimensions"]))
    boxes = list(one.boxes)
    if kind == "shape":
        one = one._replace(shape=(*one.shape[:-1], one.shape[-1] + 1) if one.shape else (1,))
    elif kind == "dtype":
        one = one._replace(dtype=draw(st.sampled_from(sorted(set(ITEMSIZE) - {one.dtype}))))
    elif kind == "dimensions":
        one = one._replace(boxes=(*boxes, Box((0,) * (len(one.shape) + 1), (1,) * (len(one.shape) + 1))))
    elif kind == "twice" or not boxes or not one.shape:
        one = one._replace(boxes=())
    else:
        at, dim = draw(st.integers(0, len(boxes) - 1)), draw(st.integers(0, len(one.shape) - 1))
        offsets, lengths = list(boxes[at].offsets), list(boxes[at].lengths)
        if kind == "moved":
            offsets[dim] += draw(st.sampled_from([-1, 1, 5]))
        else:
            lengths[dim] += {"grown": 1, "shrunk": -1, "dropped": -lengths[dim]}[kind]
        boxes[at] = Box(tuple(offsets), tuple(lengths))
        one = one._replace(boxes=tuple(boxes))
    mine = [*held[rank][:index], one, *held[rank][index + 1 :]]
    if kind == "twice":
        mine.append(one)
    return one.fqn, rank, [*held[:rank], mine, *held[rank + 1 :]]


@settings(max_examples=400)
@given(st.data())
def test_ranks_that_contradict_each_other_are_refused(data: st.DataObject) -> None:
    """One rank is wrong about one tensor: either all the others hold enough of it, or the error names it and ranks."""
    world = data.draw(resharded())[0]
    fqn, rank, held = data.draw(harmed(world.held))
    try:
        plans = plan_save(held, ITEMSIZE, min_piece=8)
    except ConflictingStateError as error:
        assert repr(fqn) in str(error)
        # Where nobody is left who holds any of it, there is nobody to be named.
        assert "rank" in str(error)
        return
    shape = next(one.shape for one in held[rank] if one.fqn == fqn)
    times = np.zeros(shape, int)
    for plan in plans:
        for item in plan.items:
            if item.fqn == fqn:
                times[slices(item.box)] += 1
    assert (times == 1).all()


@settings(max_examples=60)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(40, 160),
    st.integers(1, 9000),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 1 << 22),
)
def test_resharding_along_the_saved_axis_reads_what_is_wanted(
    sources: int, targets: int, mib: int, columns: int, itemsize: int, before: int
) -> None:
    """In pieces of 40 MiB and more, readers of rows that were saved in rows read at most 1.05 times their bytes."""
    rows = -(-mib * (1 << 20) * max(sources, targets) // (columns * itemsize))
    shape = (rows, columns)
    stored = [box for at in coordinates([sources]) for box in boxes_of(shape, [sources], at, [Shard(0)])]
    needed = read = 0
    for at in coordinates([targets]):
        wanted = [Wanted("w", box) for box in boxes_of(shape, [targets], at, [Shard(0)])]
        needed += sum(want.box.volume for want in wanted) * itemsize
        for item in plan_load(wanted, lambda _: stored):
            piece = stored[item.shard]
            cells = union(cells_of(piece.lengths, relative_to(piece, item.overlap), itemsize))
            # Each in a file of its own, behind other entries.
            extent = Extent(PAGE + before * itemsize, piece.volume * itemsize, None, cells, None)
            read += sum(-(-one.stop // PAGE) * PAGE - one.start for one in ranges([extent]))
    assert needed == prod(shape) * itemsize
    assert needed <= read <= 1.05 * needed


@settings(max_examples=100)
@given(st.data())
def test_each_cell_is_read_once(data: st.DataObject) -> None:
    """However many parts of a stored box a rank wants, no cell of it comes twice, and each part lies in those read."""
    shape = tuple(data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=2)))
    mesh = data.draw(meshes())
    at = data.draw(st.sampled_from(list(coordinates(mesh))))
    placements = data.draw(layouts_on(shape, mesh))
    boxes = boxes_of(shape, mesh, at, placements)
    cells = union(run for box in boxes for run in cells_of(shape, box, 8))
    extent = Extent(data.draw(st.integers(0, 1 << 20)), prod(shape) * 8, None, cells, None)
    runs = [run for one in ranges([extent]) for run in one.runs]
    read = [cell for run in runs for cell in range(run.first, run.stop)]
    assert read == sorted(set(read)) == [cell for first, stop in cells for cell in range(first, stop)]
    assert all(run.start_byte == extent.start_of(run.first) for run in runs)
    for box in boxes:
        first = int(np.ravel_multi_index(box.offsets, shape))
        last = int(np.ravel_multi_index([end - 1 for end in box.ends], shape))
        assert {first * 8 // DIGEST_BLOCK, last * 8 // DIGEST_BLOCK} <= set(read)


@settings(max_examples=200)
@given(st.integers(1, 20 * DIGEST_BLOCK), st.integers(0, 1 << 20), st.integers(1, 4 * BLOCK // PAGE))
def test_entries_are_cut_where_ranges_are_long_or_short(nbytes: int, offset: int, pages: int) -> None:
    """An entry of any size is read once, by ranges of a few cells (local disks) or of many blocks (object stores)."""
    cells = [(0, -(-nbytes // DIGEST_BLOCK))]
    found = list(ranges([Extent(offset, nbytes, None, cells, None)], most=pages * PAGE))
    runs = [run for one in found for run in one.runs]
    assert [cell for run in runs for cell in range(run.first, run.stop)] == list(range(*cells[0]))
    for one in found:
        assert one.stop - one.start <= pages * PAGE or (one.runs[0].stop - one.runs[0].first == len(one.runs) == 1)
