"""Plans on simulated worlds: what N ranks write and M ranks read, checked element by element."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.box import Box, contains, covers_exactly, full_box, intersect, relative_to, slices
from shardckpt.errors import ConflictingStateError, CorruptCheckpointError, UsageError
from shardckpt.planner import MIN_PIECE, Held, ReadItem, ShardPlan, Wanted, WriteItem, plan_load, plan_save

ITEMSIZE = {"bool": 1, "bfloat16": 2, "float32": 4, "complex128": 16}

Layout = list[tuple[Box, ...]]
"""The boxes that each rank holds of one tensor."""


def cut_rows(shape: tuple[int, ...], dim: int, parts: int) -> list[Box]:
    """As DTensor shards: parts of equal length, rounded up, the last ones shorter or empty."""
    n = shape[dim]
    step = -(-n // parts) or 1
    edges = [min(n, part * step) for part in range(parts + 1)]
    return [
        Box(
            tuple(edges[part] if d == dim else 0 for d in range(len(shape))),
            tuple(edges[part + 1] - edges[part] if d == dim else length for d, length in enumerate(shape)),
        )
        for part in range(parts)
    ]


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], world: int) -> Layout:
    """Some way in which training libraries spread a tensor over ranks."""
    kinds = ["replicated", "some ranks"]
    if shape:
        kinds += ["sharded", "hybrid", "grid", "strided"]
    kind = draw(st.sampled_from(kinds))
    if kind == "replicated":
        return [(full_box(shape),)] * world
    if kind == "some ranks":
        holders = draw(st.sets(st.integers(0, world - 1), min_size=1))
        return [(full_box(shape),) if rank in holders else () for rank in range(world)]
    dim = draw(st.integers(0, len(shape) - 1))
    if kind == "sharded":
        return [(box,) for box in cut_rows(shape, dim, world)]
    parts = draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    if kind == "hybrid":
        boxes = cut_rows(shape, dim, parts)
        return [(boxes[rank % parts],) for rank in range(world)]
    if kind == "grid":
        other = draw(st.integers(0, len(shape) - 1))
        columns = cut_rows(shape, other, world // parts)
        cells = [intersect(row, column) for row in cut_rows(shape, dim, parts) for column in columns]
        if other != dim:
            return [(cell,) if cell else () for cell in cells]
    rows = cut_rows(shape, dim, max(1, shape[dim]))
    return [tuple(rows[rank::world]) for rank in range(world)]


@st.composite
def worlds(draw: st.DrawFn, most: int = 8) -> list[list[Held]]:
    """What the ranks of some run hold."""
    size = draw(st.integers(1, most))
    ranks: list[list[Held]] = [[] for _ in range(size)]
    for number in range(draw(st.integers(0, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
        split = draw(st.sampled_from([True, True, False, None]))
        for rank, boxes in enumerate(draw(layouts(shape, size))):
            if boxes or draw(st.booleans()):
                said = rank % 2 == 0 if split is None else split
                ranks[rank].append(Held(f"t{number}", shape, dtype, boxes, said))
    return ranks


def written(plans: Sequence[ShardPlan]) -> dict[str, list[Box]]:
    found: dict[str, list[Box]] = {}
    for plan in plans:
        for item in plan.items:
            found.setdefault(item.fqn, []).append(item.box)
    return found


def data_parallel(world: int, shapes: Sequence[tuple[int, ...]], dtype: str = "float32") -> list[list[Held]]:
    return [[Held(f"t{n}", s, dtype, (full_box(s),), split=True) for n, s in enumerate(shapes)]] * world


@settings(max_examples=200)
@given(worlds(), st.sampled_from([1, 16, 64, MIN_PIECE]))
def test_every_element_is_written_once_by_one_that_holds_it(ranks: list[list[Held]], min_piece: int) -> None:
    """Nothing is lost, nothing is written twice, no piece is a crumb, and no entry of a shard lies unaligned."""
    plans = plan_save(ranks, ITEMSIZE, min_piece=min_piece)
    assert len(plans) == len(ranks)
    held = [{one.fqn: one for one in rank} for rank in ranks]
    for plan, mine in zip(plans, held, strict=True):
        offset = 0
        for item in plan.items:
            tensor = mine[item.fqn]
            whole = tensor.boxes[item.held]
            assert contains(whole, item.box)
            assert item.nbytes == item.box.volume * ITEMSIZE[tensor.dtype] > 0
            assert item.box == whole or item.nbytes >= min_piece
            assert offset % ITEMSIZE[tensor.dtype] == 0
            offset += item.nbytes
    for one in {one.fqn: one for rank in ranks for one in rank}.values():
        assert covers_exactly(one.shape, written(plans).get(one.fqn, [])).exact


@given(worlds())
def test_what_may_differ_comes_whole_from_the_lowest_holder(ranks: list[list[Held]]) -> None:
    """Buffers that drifted apart are never stitched together from several ranks; a split needs every holder's word."""
    plans = plan_save(ranks, ITEMSIZE, min_piece=1)
    holders: dict[tuple[str, Box], list[tuple[int, bool]]] = {}
    for rank, mine in enumerate(ranks):
        for held in mine:
            for box in held.boxes:
                holders.setdefault((held.fqn, box), []).append((rank, held.split))
    for (fqn, box), who in holders.items():
        if box.volume and not all(split for _, split in who):
            writers = [
                rank for rank, plan in enumerate(plans) for item in plan.items if (item.fqn, item.box) == (fqn, box)
            ]
            assert writers == [min(rank for rank, _ in who)]


@given(worlds(), st.randoms(use_true_random=False))
def test_plans_depend_on_nothing_but_what_is_held(ranks: list[list[Held]], rng: random.Random) -> None:
    """Ranks plan alone and must agree, whatever order their own dictionaries were in."""
    plans = plan_save(ranks, ITEMSIZE, min_piece=16)
    assert plan_save([[*rank] for rank in ranks], ITEMSIZE, min_piece=16) == plans
    shuffled = [rng.sample(rank, len(rank)) for rank in ranks]
    assert plan_save(shuffled, ITEMSIZE, min_piece=16) == plans


@given(worlds())
def test_layouts_that_repeat_are_planned_as_if_each_were_alone(ranks: list[list[Held]]) -> None:
    """Thousands of tensors that are laid out alike are worked out once; the plan must not show it."""
    ranks = [[held._replace(fqn=f"{held.fqn}.{copy}") for held in mine for copy in range(3)] for mine in ranks]
    plans = plan_save(ranks, ITEMSIZE, min_piece=16)

    def anew(box: Box) -> Box:
        return Box((*box.offsets,), (*box.lengths,))

    apart = [
        [held._replace(shape=(*held.shape,), boxes=tuple([anew(box) for box in held.boxes])) for held in mine]
        for mine in ranks
    ]
    assert plan_save(apart, ITEMSIZE, min_piece=16) == plans
    for rank, plan in enumerate(plans):
        alone = plan_save(ranks, ITEMSIZE, rank=rank, min_piece=16)
        assert alone[rank] == plan
        assert len(alone) == len(plans)


@given(worlds())
def test_planning_a_plan_changes_nothing(ranks: list[list[Held]]) -> None:
    """Ranks that hold just what a plan gave them are each given just that."""
    plans = plan_save(ranks, ITEMSIZE, min_piece=16)
    known = {one.fqn: one for rank in ranks for one in rank}
    again: list[list[Held]] = []
    for plan in plans:
        boxes: dict[str, list[Box]] = {}
        for item in plan.items:
            boxes.setdefault(item.fqn, []).append(item.box)
        again.append([known[fqn]._replace(boxes=tuple(found), split=True) for fqn, found in boxes.items()])
    repeated = plan_save(again, ITEMSIZE, min_piece=16)
    assert [[item[:2] for item in plan.items] for plan in repeated] == [[i[:2] for i in plan.items] for plan in plans]


def test_entries_run_from_the_widest_dtype_to_the_narrowest() -> None:
    """Without gaps, which safetensors forbids, order is what aligns every entry; within a dtype it follows names."""
    ranks = [
        [Held(name, (3,), dtype, (full_box((3,)),), split=False) for name, dtype in zip("dcba", ITEMSIZE, strict=True)]
    ]
    (plan,) = plan_save([[*ranks[0], ranks[0][0]._replace(fqn="aa")]], ITEMSIZE)
    assert [item.fqn for item in plan.items] == ["a", "b", "c", "aa", "d"]


def test_a_strided_shard_is_written_box_by_box() -> None:
    """A rank may hold several parts of one tensor; each item says from which of them it is taken."""
    rows = cut_rows((8, 2), 0, 8)
    ranks = [[Held("w", (8, 2), "float32", tuple(rows[rank::4]), split=True)] for rank in range(4)]
    plans = plan_save(ranks, ITEMSIZE)
    assert plans[0].items == (WriteItem("w", rows[0], 0, 8), WriteItem("w", rows[4], 1, 8))
    assert plans[3].items == (WriteItem("w", rows[3], 0, 8), WriteItem("w", rows[7], 1, 8))


def test_nothing_to_write() -> None:
    """No tensors, empty tensors and no boxes of empty tensors are all complete states."""
    assert plan_save([[], []], ITEMSIZE) == [ShardPlan(()), ShardPlan(())]
    empty = Held("e", (0, 4), "float32", (full_box((0, 4)),), split=True)
    assert plan_save([[empty], [empty._replace(boxes=())]], ITEMSIZE) == [ShardPlan(()), ShardPlan(())]


W = Held("layer.w", (4, 4), "float32", (full_box((4, 4)),), split=True)
TOP, BOTTOM = cut_rows((4, 4), 0, 2)


@pytest.mark.parametrize(
    ("ranks", "parts"),
    [
        ([[W], [], [W._replace(shape=(4, 5))]], ["shape (4, 4) on rank 0", "(4, 5) on rank 2"]),
        ([[W], [W], [W._replace(dtype="bfloat16")]], ["dtype float32 on ranks 0, 1", "bfloat16 on rank 2"]),
        ([[], [W, W]], ["rank 1", "twice"]),
        ([[W], [W._replace(boxes=(TOP,))]], ["[0:4,0:4] on rank 0", "[0:2,0:4] on rank 1", "overlap"]),
        ([[W._replace(boxes=(TOP, Box((1, 0), (3, 4))))]], ["[0:2,0:4] on rank 0", "[1:4,0:4] on rank 0"]),
        ([[W._replace(boxes=(TOP,))]] * 3, ["8 of its 16 elements", "ranks 0, 1, 2"]),
        ([[W._replace(boxes=())], []], ["16 of its 16 elements"]),
        ([[W._replace(boxes=(Box((2, 0), (4, 4)),))]], ["[2:6,0:4] on rank 0"]),
        ([[W._replace(boxes=(Box((0,), (16,)),))]], ["[0:16] on rank 0"]),
        ([[W._replace(boxes=(TOP,))]] * 20, ["ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"]),
    ],
)
def test_disagreement_names_the_tensor_and_the_ranks(ranks: list[list[Held]], parts: list[str]) -> None:
    """Whoever reads the error knows which tensor to look at and on which ranks."""
    with pytest.raises(ConflictingStateError) as caught:
        plan_save(ranks, ITEMSIZE)
    for part in ["'layer.w'", *parts]:
        assert part in str(caught.value)


def test_an_unknown_dtype_is_refused() -> None:
    """A dtype without a size can't be planned, and isn't a KeyError."""
    with pytest.raises(UsageError, match=r"'layer\.w' has dtype 'qint8'"):
        plan_save([[W._replace(dtype="qint8")]], ITEMSIZE)


@settings(max_examples=200)
@given(st.data(), worlds(), st.integers(1, 8), st.sampled_from([1, 16, MIN_PIECE]))
def test_any_world_reads_what_any_world_wrote(
    data: st.DataObject, ranks: list[list[Held]], readers: int, min_piece: int
) -> None:
    """Saved on N ranks in one layout, loaded on M in another, every element arrives at its place, once."""
    known = {one.fqn: one for rank in ranks for one in rank}
    shards = written(plan_save(ranks, ITEMSIZE, min_piece=min_piece))
    truth = {fqn: np.arange(prod(one.shape)).reshape(one.shape) for fqn, one in known.items()}
    stored = {fqn: [truth[fqn][slices(box)] for box in boxes] for fqn, boxes in shards.items()}
    wanted = [
        Wanted(fqn, box)
        for fqn, one in known.items()
        for boxes in data.draw(layouts(one.shape, readers))
        for box in boxes
    ]
    local = [np.full(want.box.lengths, -1) for want in wanted]
    filled = [np.zeros(want.box.lengths, int) for want in wanted]
    items = plan_load(wanted, lambda fqn: shards.get(fqn, []))
    assert items == sorted(items)
    for item in items:
        fqn, box = wanted[item.wanted]
        source = stored[fqn][item.shard][slices(relative_to(shards[fqn][item.shard], item.overlap))]
        local[item.wanted][slices(relative_to(box, item.overlap))] = source
        filled[item.wanted][slices(relative_to(box, item.overlap))] += 1
    for want, got, count in zip(wanted, local, filled, strict=True):
        assert (got == truth[want.fqn][slices(want.box)]).all()
        assert (count == 1).all()


def one_tensor(*boxes: Box) -> Callable[[str], Sequence[Box]]:
    return {"layer.w": boxes}.__getitem__


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "16 of the 16 elements of .0:4,0:4."),
        ([TOP], "8 of the 16 elements"),
        ([TOP, TOP, BOTTOM], r"overlap: \[0:2,0:4\] and \[0:2,0:4\]"),
        ([TOP, Box((1, 0), (2, 4))], r"overlap: \[0:2,0:4\] and \[1:3,0:4\]"),
        ([TOP, Box((2, 0), (-2, -4))], "8 of the 16 elements"),
        ([Box((0,), (16,))], "without 2 dimensions"),
        ([TOP, Box((2, 0), (2,))], "without 2 dimensions"),
        ([*cut_rows((4, 4), 1, 4), *cut_rows((4, 4), 0, 8), Box((0, 3), (4, 1))], "overlap"),
        ([Box((1 << 62, n), (1 << 62, 1)) for n in range(20)], "16 of the 16 elements"),
    ],
)
def test_stored_boxes_that_do_not_fill_the_wanted_one(shards: list[Box], message: str) -> None:
    """A forged or damaged manifest can't leave memory unset or fill it twice."""
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        plan_load([Wanted("layer.w", full_box((4, 4)))], one_tensor(*shards))
    assert "'layer.w'" in str(caught.value)


def test_only_what_is_wanted_is_read() -> None:
    """A rank that needs one row of many touches the shard that has it, and an empty part needs none."""
    rows = cut_rows((1000, 3), 0, 500)
    want = [Wanted("layer.w", Box((501, 1), (2, 2))), Wanted("layer.w", Box((1000, 0), (0, 3)))]
    assert plan_load(want, one_tensor(*rows)) == [
        ReadItem(0, 250, Box((501, 1), (1, 2))),
        ReadItem(0, 251, Box((502, 1), (1, 2))),
    ]


def test_scalars_are_found() -> None:
    """A 0-dim tensor is looked up like any other, and its doubles are noticed, however many there are."""
    scalar = full_box(())
    assert plan_load([Wanted("layer.w", scalar)], one_tensor(scalar)) == [ReadItem(0, 0, scalar)]
    with pytest.raises(CorruptCheckpointError, match="overlap"):
        plan_load([Wanted("layer.w", scalar)], one_tensor(*[scalar] * 20))


@pytest.mark.timeout(30)
def test_large_plans_are_fast() -> None:
    """20,000 tensors, or 10,000 shards of one, are planned in a moment; quadratic time would take minutes."""
    shapes = [(n % 5 * 700 + 1, 1024) for n in range(20_000)]
    ranks = data_parallel(4, shapes)
    shards = written(plan_save(ranks, ITEMSIZE))
    assert sum(map(len, shards.values())) < 20_004
    wanted = [Wanted(held.fqn, held.boxes[0]) for held in ranks[0]]
    assert len(plan_load(wanted, shards.__getitem__)) < 20_004
    rows = cut_rows((30_000, 8), 0, 10_000)
    wanted = [Wanted("layer.w", Box((3 * n + 1, 0), (3, 8))) for n in range(9_999)]
    items = plan_load(wanted, one_tensor(*rows))
    assert Counter(item.wanted for item in items) == dict.fromkeys(range(9_999), 2)
