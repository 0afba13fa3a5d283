"""The plan of an exchange: pure, so checked element by element on random layouts."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any
from unittest import mock

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.box import Box, boxes_of_range, full_box, intersect, relative_to, slices
from shardckpt.errors import CorruptCheckpointError
from shardckpt.planner import Wanted
from shardckpt.reader import exchange, fetch, gains, wants
from shardckpt.reader.exchange import Exchange, Part
from shardckpt.reader.gains import Trial
from shardckpt.reader.wants import Stored, View, Wants, wants_of

CELL = 64
MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def _small_cells() -> Iterator[None]:
    """Cells of 64 bytes, so that small tensors have many."""
    with ExitStack() as stack:
        for module in (exchange, fetch, gains, wants):
            stack.enter_context(mock.patch.object(module, "DIGEST_BLOCK", CELL))
        yield


def cut(shape: tuple[int, ...], dim: int, parts: int) -> list[Box]:
    """As torch cuts a dimension: parts of equal length but the last, and perhaps some empty."""
    step = max(1, -(-shape[dim] // parts))
    found = []
    for part in range(parts):
        start, stop = min(part * step, shape[dim]), min((part + 1) * step, shape[dim])
        offsets, lengths = [0] * len(shape), list(shape)
        offsets[dim], lengths[dim] = start, stop - start
        found.append(Box(tuple(offsets), tuple(lengths)))
    return found


class Tensor:
    def __init__(self, shape: tuple[int, ...], boxes: Sequence[Box], itemsize: int) -> None:
        self.shape = shape
        self.boxes = [box for box in boxes if box.volume]
        self.itemsize = itemsize

    def stored(self, first_file: int) -> list[Stored]:
        offsets = [4096 + 1000 * index for index in range(len(self.boxes))]
        return [
            Stored(first_file + index % 2, offset, box, self.itemsize)
            for index, (offset, box) in enumerate(zip(offsets, self.boxes, strict=True))
        ]


@st.composite
def tensors(draw: Any) -> Tensor:
    """As rows, as columns, or whole; of any shape down to no dimension and no element."""
    shape = tuple(draw(st.lists(st.integers(0, 13), max_size=3)))
    itemsize = draw(st.sampled_from((1, 2, 4, 8)))
    if not shape or draw(st.booleans()):
        return Tensor(shape, [full_box(shape)], itemsize)
    return Tensor(shape, cut(shape, draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 4))), itemsize)


@st.composite
def regions(draw: Any, shape: tuple[int, ...], ranks: int) -> list[list[Box]]:
    """What each rank wants: alike, parts, anything with overlaps, or nothing."""
    kind = draw(st.sampled_from(("all", "cut", "any", "some")))
    if kind == "all" or not shape:
        return [[full_box(shape)]] * ranks
    if kind == "cut":
        return [[box] for box in cut(shape, draw(st.integers(0, len(shape) - 1)), ranks)]
    if kind == "some":
        holders = draw(st.sets(st.integers(0, ranks - 1)))
        return [[full_box(shape)] if rank in holders else [] for rank in range(ranks)]

    def box() -> Box:
        starts = tuple(draw(st.integers(0, length)) for length in shape)
        lengths = (draw(st.integers(0, length - start)) for start, length in zip(starts, shape, strict=True))
        return Box(starts, tuple(lengths))

    return [[box() for _ in range(draw(st.integers(0, 3)))] for _ in range(ranks)]


class Case:
    """A checkpoint and what every rank wants of it."""

    def __init__(self, found: dict[str, Tensor], wanted: list[list[Wanted]]) -> None:
        self.tensors = found
        self.wanted = wanted
        self.entries = {name: tensor.stored(2 * number) for number, (name, tensor) in enumerate(found.items())}

    def plan(self, **options: Any) -> Exchange:
        ranks_of: defaultdict[Wants, list[int]] = defaultdict(list)
        for rank, wanted in enumerate(self.wanted):
            ranks_of[wants_of(wanted)].append(rank)
        views: list[View] = [(tuple(ranks), wants) for wants, ranks in ranks_of.items()]
        return Exchange(views, self.entries.__getitem__, **({"trial": False, "limit": 1 << 20} | options))

    def counts(self, rank: int) -> dict[str, Any]:
        return {name: numpy.zeros(tensor.shape, dtype=int) for name, tensor in self.tensors.items()}

    def mask(self, rank: int, name: str) -> Any:
        mask = numpy.zeros(self.tensors[name].shape, dtype=int)
        for other, box in self.wanted[rank]:
            if other == name:
                mask[slices(box)] = 1
        return mask

    def boxes_of(self, part: Part) -> Iterator[Box]:
        """All elements of a part's cells, as boxes of the whole tensor."""
        name, shard = part.entry
        entry = self.entries[name][shard]
        per_cell = CELL // entry.itemsize
        for box in boxes_of_range(
            entry.box.lengths, part.first * per_cell, min(part.stop * per_cell, entry.box.volume)
        ):
            yield Box(tuple(a + b for a, b in zip(box.offsets, entry.box.offsets, strict=True)), box.lengths)


@st.composite
def cases(draw: Any) -> Case:
    ranks = draw(st.integers(1, 5))
    found = {f"t{number}": draw(tensors()) for number in range(draw(st.integers(1, 3)))}
    wanted: list[list[Wanted]] = [[] for _ in range(ranks)]
    for name, tensor in found.items():
        for rank, boxes in enumerate(draw(regions(tensor.shape, ranks))):
            wanted[rank] += [Wanted(name, box) for box in boxes]
    return Case(found, wanted)


def parts_read(plan: Exchange) -> list[tuple[int, Part]]:
    """(reader, part) of all but the trial."""
    found = [(rank, part) for current in plan.rounds for rank, parts in current.items() for part in parts]
    return found + [(rank, part) for rank, parts in enumerate(plan.own) for part in parts]


@given(cases(), st.booleans(), st.sampled_from((1, 100, 1 << 20)), st.sampled_from((2, 1024)))
@settings(max_examples=100, deadline=None)
def test_every_wanted_element_arrives_exactly_once(case: Case, trial: bool, limit: int, room: int) -> None:
    """Whatever the layouts: nothing is missing, nothing is read or sent twice, and nothing unwanted is passed on."""
    # Parts of several cells belong to large checkpoints.
    with mock.patch.multiple(exchange, _PARTS=room, _TRIAL_SHARE=4 if room == 2 else exchange._TRIAL_SHARE):
        plan = case.plan(trial=trial, limit=limit)
    for rank in range(len(case.wanted)):
        counts = case.counts(rank)
        read = [part for reader, part in parts_read(plan) if reader == rank]
        read += [part for part in plan.trial if rank in plan.ranks(part)]
        for part in read:
            mask = case.mask(rank, part.entry[0])
            for box in case.boxes_of(part):
                counts[part.entry[0]][slices(box)] += mask[slices(box)]
        for current in plan.rounds:
            for reader, parts in current.items():
                for part in parts:
                    if reader != rank and rank in plan.ranks(part):
                        for box in plan.boxes(part, plan.view_of[rank]):
                            counts[part.entry[0]][slices(box)] += 1
        for name, count in counts.items():
            assert numpy.array_equal(count, case.mask(rank, name)), (rank, name)


@given(cases(), st.booleans())
@settings(deadline=None)
def test_every_cell_is_read_by_one_rank_that_wants_it(case: Case, trial: bool) -> None:
    """Sharing reads each stored byte once, and nobody reads what it does not need."""
    plan = case.plan(trial=trial)
    readers: Counter[tuple[Any, int]] = Counter()
    for reader, part in [*parts_read(plan), *((plan.ranks(part)[0], part) for part in plan.trial)]:
        assert reader in plan.ranks(part)
        readers.update((part.entry, cell) for cell in range(part.first, part.stop))
    wanted: set[tuple[Any, int]] = set()
    for asked in case.wanted:
        for name, box in asked:
            for shard, entry in enumerate(case.entries[name]):
                overlap = intersect(entry.box, box)
                if overlap is not None:
                    runs = fetch.cells_of(entry.box.lengths, relative_to(entry.box, overlap), entry.itemsize)
                    wanted.update(((name, shard), cell) for first, stop in runs for cell in range(first, stop))
    assert readers == Counter(wanted)


@given(cases(), st.integers(1, 300))
@settings(deadline=None)
def test_rounds_keep_within_buffers(case: Case, limit: int) -> None:
    """However much several ranks want, what one sends or receives at a time is bounded; one part always goes."""
    plan = case.plan(limit=limit)
    itemsize = {name: tensor.itemsize for name, tensor in case.tensors.items()}
    for current in plan.rounds:
        assert any(current.values())
        received: Counter[int] = Counter()
        parts_for: Counter[int] = Counter()
        for reader, parts in current.items():
            sent = 0
            for part in parts:
                for group in plan.groups(part):
                    nbytes = itemsize[part.entry[0]] * sum(box.volume for box in plan.boxes(part, group[0]))
                    sent += nbytes if [plan.views[view] for view in group] != [(reader,)] else 0
                    received.update(dict.fromkeys(group, nbytes))
                    parts_for.update(group)
            assert sent <= limit or len(parts) == 1
        assert all(nbytes <= limit or parts_for[view] == 1 for view, nbytes in received.items())


@given(st.integers(2, 6), st.sampled_from(("all", "columns")), st.integers(1, 200), st.sampled_from((8, 16)))
@settings(deadline=None, max_examples=50)
def test_reading_is_balanced(ranks: int, kind: str, rows: int, columns: int) -> None:
    """All ranks read about as much where all want something of every cell."""
    shape = (rows, columns)
    tensor = Tensor(shape, cut(shape, 0, 3), 4)
    boxes = [full_box(shape)] * ranks if kind == "all" else cut(shape, 1, ranks)
    plan = Case({"t": tensor}, [[Wanted("t", box)] for box in boxes]).plan()
    loads = Counter(dict.fromkeys(range(ranks), 0))
    for reader, part in parts_read(plan):
        loads[reader] += part.nbytes
    if kind == "all" or all(box.volume for box in boxes):
        assert max(loads.values()) - min(loads.values()) <= 3 * CELL


def test_who_must_read_more_is_relieved() -> None:
    """A rank that alone wants much reads little of what others want too."""
    shape = (100, 16)
    case = Case(
        {"alone": Tensor(shape, [full_box(shape)], 4), "all": Tensor(shape, [full_box(shape)], 4)},
        [[Wanted("alone", full_box(shape)), Wanted("all", full_box(shape))], *([[Wanted("all", full_box(shape))]] * 2)],
    )
    loads: Counter[int] = Counter()
    for reader, part in parts_read(case.plan()):
        loads[reader] += part.nbytes
    assert loads == {0: 6400, 1: 3200, 2: 3200}


@pytest.mark.parametrize("ranks", (2, 3, 8, 64))
def test_a_trial_costs_little(ranks: int) -> None:
    """What is read alone to see how fast that is stays small beside the data, or there is no trial at all."""
    for rows in (1, 10, 100, 2000):
        shape = (rows, 16)
        case = Case({"t": Tensor(shape, [full_box(shape)], 4)}, [[Wanted("t", full_box(shape))]] * ranks)
        plan = case.plan(trial=True)
        assert sum(part.nbytes for part in plan.trial) * (ranks - 1) <= plan.union / 14
        assert bool(plan.trial) == (rows >= 14 * (ranks - 1))
        assert plan.alone == ranks * plan.union


def test_neighbours_go_to_one_reader() -> None:
    """Small tensors that lie side by side are not scattered over the ranks: that would read each page many times."""
    case = Case({f"t{n:03}": Tensor((4,), [full_box((4,))], 4) for n in range(90)}, [])
    case.entries = {name: [Stored(0, 16 * n, full_box((4,)), 4)] for n, name in enumerate(case.tensors)}
    case.wanted = [[Wanted(name, full_box((4,))) for name in case.tensors]] * 3
    readers = [reader for _, reader in sorted((part.entry, reader) for reader, part in parts_read(case.plan()))]
    assert readers == [0] * 30 + [1] * 30 + [2] * 30


def test_a_hole_is_refused() -> None:
    """What the checkpoint lacks is an error of the plan, the same on every rank."""
    case = Case({"t": Tensor((8, 2), cut((8, 2), 0, 4)[:3], 4)}, [[Wanted("t", full_box((8, 2)))]] * 2)
    with pytest.raises(CorruptCheckpointError, match="'t'.*4 of the 16 elements"):
        case.plan()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), max_size=5))
def test_wants_overlap_nowhere(boxes: list[tuple[int, int, int, int]]) -> None:
    """Tensors tied in parts want elements twice, which cross once."""
    asked = [Box((a, b), (c, d)) for a, b, c, d in boxes]
    count = Counter(
        place
        for _, found in wants_of([Wanted("t", box) for box in asked])
        for box in found
        for place in product(*(range(start, end) for start, end in zip(box.offsets, box.ends, strict=True)))
    )
    places = {
        place
        for box in asked
        for place in product(*(range(start, end) for start, end in zip(box.offsets, box.ends, strict=True)))
    }
    assert count == dict.fromkeys(places, 1)


def test_sharing_is_tried_where_it_spares_much() -> None:
    """Neither small loads nor resharding along the saved dimension pay for an agreement."""
    assert gains.worthwhile(400 * MIB, 300 * MIB, 4, 100)
    assert gains.worthwhile(200 * MIB, 100 * MIB, 2, 100)
    assert not gains.worthwhile(40 * MIB, 30 * MIB, 4, 100)
    assert not gains.worthwhile(4000 * MIB, 1000 * MIB, 4, 100)
    assert not gains.worthwhile(0, 0, 4, 100)
    assert gains.most_spared([{0: 10, 1: 5}, {1: 5, 2: 8}]) == 5
    assert gains.most_spared([{0: 10}, {1: 10}, {}]) == 0
    assert gains.most_spared([{0: 10}] * 3) == 20


def test_the_faster_way_is_taken() -> None:
    """Rates decide, not times, and about equal is not worth ranks that wait for each other."""
    assert gains.exchange_is_faster(Trial(10, 2.0), Trial(40, 4.0))
    assert not gains.exchange_is_faster(Trial(10, 1.0), Trial(40, 4.0))
    assert not gains.exchange_is_faster(Trial(10, 1.1), Trial(10, 1.0))
    assert gains.exchange_is_faster(Trial(10, 1.2), Trial(10, 1.0))
    assert not gains.exchange_is_faster(Trial(10, 1.0), Trial(0, 0.0))
    assert not gains.exchange_is_faster(Trial(0, 0.0), Trial(10, 1.0))


def test_huge_jobs_do_not_plan_for_long() -> None:
    """A plan that takes longer than the reading that it spares is none: many parts, many views, tiny tensors."""
    assert gains.worthwhile(400 * MIB, 300 * MIB, 4, 4800)
    assert not gains.worthwhile(400 * MIB, 300 * MIB, 4, 4801)
    entries = {"t": [Stored(0, 0, full_box((8 * CELL + 1,)), 1)], "s": [Stored(0, 0, full_box((4,)), 1)]}
    demand = wants.demand_of(wants_of([Wanted("t", Box((0,), (1,))), Wanted("s", full_box((4,)))]), entries.__getitem__)
    assert gains.parts_in(demand, entries.__getitem__) == 3


def test_what_many_want_alike_is_in_memory_once() -> None:
    """Ranks with tensors of their own beside a replicated one get that from one buffer, not from a copy for each."""
    shape, ranks, limit = (400, 16), 32, 8 * CELL
    case = Case({"all": Tensor(shape, [full_box(shape)], 4)}, [])
    case.wanted = [[Wanted("all", full_box(shape))] for _ in range(ranks)]
    for rank in range(ranks):
        case.entries[f"own{rank}"] = [Stored(1, 1000 * rank, full_box((4,)), 4)]
        case.wanted[rank].append(Wanted(f"own{rank}", full_box((4,))))
    plan = case.plan(limit=limit)
    assert len(plan.views) == ranks
    for current in plan.rounds:
        for parts in current.values():
            assert all(plan.groups(part) == [tuple(range(ranks))] for part in parts)
            assert sum(part.nbytes for part in parts) <= limit
    assert len(plan.rounds) == 400 // 8
