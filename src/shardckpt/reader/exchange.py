"""Which rank reads which stored bytes for which others. Pure: no torch, no files, no process group.

Where several ranks want the same cells (columns of what was saved by rows, or a replica each), one of them reads a cell
and passes on to the others what they want of it. Every rank computes the same plan from the manifest and from what all
of them want, and executes its own part.

A rank reads only cells of which it wants something itself: never more than it would read alone, and no shard that it
does not need.
"""

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from operator import add
from typing import Final, NamedTuple

from shardckpt.box import Box, boxes_of_range, intersect, relative_to
from shardckpt.codecs import DIGEST_BLOCK
from shardckpt.planner import Wanted, plan_load
from shardckpt.reader.fetch import cells_of, union

LIMIT: Final = 16 << 20
"""Bytes that one rank sends, and that one receives, in one round. Two rounds are sent at once, so buffers hold thrice
as much. A cell that many views want may exceed it: one cell always goes."""

_GAIN: Final = 1.5
"""How many times the stored bytes are read where each rank reads alone, from which on sharing may be worth it."""
_GAIN_BYTES: Final = 32 << 20
"""Bytes that each rank must be spared, on average, to be worth the agreement and the trial."""
_MOST_WORK: Final = 4_000_000
"""Parts times views past which the plan itself, which is made in Python, would take seconds: then nobody shares."""
_TRIAL_SHARE: Final = 25
"""What the trial reads more than once is one part in so many of the stored bytes, or less."""
_TRIAL_SHARE_AT_LEAST: Final = 14
"""The same where a single cell is more: if even that is too much, there is no trial, and nobody shares unasked."""
_TRIAL_BYTES: Final = 64 << 20
"""Of stored bytes that are read alone in the trial, at most."""
TRIAL_ROUNDS: Final = 3
"""Of exchange, in the trial. All but the first are timed: in them reading and passing on overlap, as in the rest."""
_TRIAL_ROUND_SHARE: Final = 48
"""Each of them is one part in so many of what is exchanged, so that little is lost if that is slow."""
_TRIAL_ROUND_BYTES: Final = 6 << 20
"""Of a round of all ranks together: what less than that takes says nothing of more."""
_PARTS: Final = 1024
"""How many parts a plan has room for before they become longer than a cell: parts are planned one by one."""
_MOST_CELLS: Final = 8
"""Of a part."""
_MARGIN: Final = 1.15
"""How much faster the exchange must be. It needs all ranks in step, and a trial is short."""

Entry = tuple[str, int]
"""A stored box: the tensor's name, and which of its boxes."""
Wants = tuple[tuple[str, tuple[Box, ...]], ...]
"""What one rank wants: by stored name, ascending, boxes that share no element."""
View = tuple[tuple[int, ...], Wants]
"""Ranks, ascending, that all want the same."""


class Stored(NamedTuple):
    """An entry of a shard, as far as a plan goes."""

    file: int
    """Index of its file."""
    offset: int
    """Byte at which it starts there."""
    box: Box
    itemsize: int
    """Bytes per element."""

    @property
    def nbytes(self) -> int:
        """Of raw data: compressed sizes are known to those only who read them."""
        return self.box.volume * self.itemsize


class Part(NamedTuple):
    """Cells of one entry, all wanted by the same views."""

    entry: Entry
    first: int
    """Number of the first cell."""
    stop: int
    """One past the number of the last."""
    nbytes: int
    """Of raw data."""
    views: tuple[int, ...]


Round = Mapping[int, Sequence[Part]]
"""What is read at the same time, by the rank that reads it."""


class Trial(NamedTuple):
    """How long something took on the slowest rank."""

    nbytes: int
    """Of stored data that was brought to all who want it; data that several ranks read counts once."""
    seconds: float


def wants_of(wanted: Iterable[Wanted]) -> Wants:
    """Regions, of which many may be the same or overlap, as `Wants`; regions without elements are nothing."""
    boxes: defaultdict[str, list[Box]] = defaultdict(list)
    for name, box in wanted:
        if box.volume:
            left = [box]
            for other in boxes[name]:
                left = [rest for part in left for rest in _without(part, other)]
            boxes[name].extend(left)
    return tuple((name, tuple(sorted(boxes[name]))) for name in sorted(boxes))


def _without(box: Box, other: Box) -> list[Box]:
    """`box` without the elements of `other`, as boxes."""
    shared = intersect(box, other)
    if shared is None:
        return [box]
    found = []
    offsets, lengths = list(box.offsets), list(box.lengths)
    for dim, (start, length) in enumerate(zip(shared.offsets, shared.lengths, strict=True)):
        end = offsets[dim] + lengths[dim]
        for first, stop in ((offsets[dim], start), (start + length, end)):
            if first < stop:
                at, size = offsets.copy(), lengths.copy()
                at[dim], size[dim] = first, stop - first
                found.append(Box(tuple(at), tuple(size)))
        offsets[dim], lengths[dim] = start, length
    return found


Demand = Mapping[Entry, Sequence[Box]]
"""What is wanted of each entry, in coordinates of the whole tensor."""


def demand_of(wants: Wants, stored: Callable[[str], Sequence[Stored]]) -> Demand:
    """Which parts of which entries fill what is wanted; raises CorruptCheckpointError as `plan_load` does."""
    wanted = [Wanted(name, box) for name, boxes in wants for box in boxes]
    found: defaultdict[Entry, list[Box]] = defaultdict(list)
    for item in plan_load(wanted, lambda name: [entry.box for entry in stored(name)]):
        found[wanted[item.wanted].fqn, item.shard].append(item.overlap)
    return found


def bytes_by_file(demand: Demand, stored: Callable[[str], Sequence[Stored]]) -> dict[int, int]:
    """Raw bytes of the cells that one rank wants, by file: what it reads if it reads alone."""
    found: defaultdict[int, int] = defaultdict(int)
    for (name, shard), overlaps in demand.items():
        entry = stored(name)[shard]
        found[entry.file] += sum(_nbytes(entry, *run) for run in _cells(entry, overlaps))
    return found


def most_spared(by_rank: Sequence[Mapping[int, int]]) -> int:
    """Bytes that sharing could spare all ranks together at most, judged by how much of each file each wants."""
    total: defaultdict[int, int] = defaultdict(int)
    most: defaultdict[int, int] = defaultdict(int)
    for files in by_rank:
        for file, nbytes in files.items():
            total[file] += nbytes
            most[file] = max(most[file], nbytes)
    return sum(total.values()) - sum(most.values())


def worthwhile(alone: int, spared: int, world_size: int) -> bool:
    """Whether sharing may be faster: `alone` bytes are read by all ranks alone, and `spared` fewer if they share."""
    return alone >= _GAIN * (alone - spared) and spared >= _GAIN_BYTES * world_size


def exchange_is_faster(alone: Trial, exchange: Trial) -> bool:
    """What the trial says of the rest: whether bytes came to where they are wanted clearly faster by exchange."""
    return alone.seconds * exchange.nbytes > _MARGIN * exchange.seconds * alone.nbytes


class Exchange:
    """The plan of all ranks. Parts of which a rank wants nothing are none of its business."""

    def __init__(
        self,
        views: Sequence[View],
        stored: Callable[[str], Sequence[Stored]],
        *,
        trial: bool,
        limit: int,
    ) -> None:
        """Plan for all ranks, each of which is in one of the `views`, in any order that is the same on all ranks.

        `trial`: leave out some parts to be read alone, and make the first rounds small. `limit` is in bytes; see
        `LIMIT`. Raises CorruptCheckpointError where the checkpoint lacks something that is wanted.
        """
        self.views = [ranks for ranks, _ in views]
        self.view_of = {rank: number for number, ranks in enumerate(self.views) for rank in ranks}
        world_size = len(self.view_of)
        self._stored = stored
        self._demands = [demand_of(wants, stored) for _, wants in views]
        entries: defaultdict[Entry, list[int]] = defaultdict(list)
        for number, demand in enumerate(self._demands):
            for entry in demand:
                entries[entry].append(number)
        size = sum(self._stored_at(entry).nbytes for entry in entries)
        cells = size // DIGEST_BLOCK
        most = max(1, min(_MOST_CELLS, cells // _PARTS, cells // _TRIAL_SHARE // world_size))
        parts = sorted(
            (part for entry, views in entries.items() for part in self._parts(entry, views, most)), key=self._place
        )
        self.union = sum(part.nbytes for part in parts)
        """Bytes of raw data that some rank wants, in whole cells."""
        self.alone = sum(part.nbytes * len(self.ranks(part)) for part in parts)
        """Bytes that the ranks read if each reads alone, all together."""
        groups: defaultdict[tuple[int, ...], list[Part]] = defaultdict(list)
        for part in parts:
            groups[part.views].append(part)
        self.own: list[list[Part]] = [[] for _ in range(world_size)]
        """Parts that only one rank wants, by rank: it reads them alone in any case."""
        shared: list[tuple[tuple[int, ...], list[Part]]] = []
        for group in groups.values():
            readers = self.ranks(group[0])
            if len(readers) == 1:
                self.own[readers[0]] = group
            else:
                shared.append((readers, group))
        self.trial: list[Part] = _take_trial(shared, self.union) if trial and shared else []
        """Parts for all who want them to read alone, to see how fast that is."""
        assigned = _assign(shared, [sum(part.nbytes for part in own) for own in self.own])
        self.rounds: list[Round] = self._rounds(assigned, limit, trial=trial)
        """In their order. The first `TRIAL_ROUNDS` are small where there is to be a trial."""

    def ranks(self, part: Part) -> tuple[int, ...]:
        """Who wants something of a part, ascending."""
        return tuple(sorted(rank for view in part.views for rank in self.views[view]))

    def boxes(self, part: Part, view: int) -> Iterator[Box]:
        """What a view wants of a part, as boxes of the whole tensor, in the order in which they are passed on."""
        entry = self._stored_at(part.entry)
        ranges = boxes_of_range(entry.box.lengths, *_elements(entry, part.first, part.stop))
        for overlap in self._demands[view][part.entry]:
            inner = relative_to(entry.box, overlap)
            for box in ranges:
                shared = intersect(box, inner)
                if shared is not None:
                    yield Box(tuple(map(add, shared.offsets, entry.box.offsets)), shared.lengths)

    def _stored_at(self, entry: Entry) -> Stored:
        name, shard = entry
        return self._stored(name)[shard]

    def _place(self, part: Part) -> tuple[int, int, int]:
        entry = self._stored_at(part.entry)
        return entry.file, entry.offset, part.first

    def _parts(self, entry: Entry, views: Sequence[int], most: int) -> Iterator[Part]:
        """The wanted cells of an entry, `most` at a time, cut where others begin to want them or cease to."""
        stored = self._stored_at(entry)
        changes: defaultdict[int, list[tuple[int, bool]]] = defaultdict(list)
        for view in views:
            for first, stop in _cells(stored, self._demands[view][entry]):
                changes[first].append((view, True))
                changes[stop].append((view, False))
        wanting: set[int] = set()
        places = sorted(changes)
        for start, end in pairwise(places):
            for view, begins in changes[start]:
                (wanting.add if begins else wanting.discard)(view)
            if wanting:
                who = tuple(sorted(wanting))
                for first in range(start, end, most):
                    stop = min(first + most, end)
                    yield Part(entry, first, stop, _nbytes(stored, first, stop), who)

    def _rounds(self, assigned: Sequence[Sequence[Part]], limit: int, *, trial: bool) -> list[Round]:
        """Each reader's parts in order, as many at a time as fit into buffers of `limit` bytes."""
        total = sum(part.nbytes for own in assigned for part in own)
        left = {rank: deque(parts) for rank, parts in enumerate(assigned) if parts}
        turns = deque(left)
        rounds: list[Round] = []
        while left:
            reading: defaultdict[int, list[Part]] = defaultdict(list)
            received, sent, taken = [0] * len(self.views), [0] * len(assigned), 0
            is_tried = trial and len(rounds) < TRIAL_ROUNDS
            most = max(_TRIAL_ROUND_BYTES, total // _TRIAL_ROUND_SHARE) if is_tried else total
            waiting = deque(turns)
            while waiting:
                rank = waiting.popleft()
                part = left[rank][0]
                amounts = [(view, self._amount(part, view)) for view in part.views]
                sending = sent[rank] + sum(n for view, n in amounts if self.views[view] != (rank,))
                fits = sending <= limit and taken + part.nbytes <= most
                if reading and not (fits and all(received[view] + n <= limit for view, n in amounts)):
                    continue
                left[rank].popleft()
                reading[rank].append(part)
                taken += part.nbytes
                sent[rank] = sending
                for view, n in amounts:
                    received[view] += n
                if left[rank]:
                    waiting.append(rank)
                else:
                    del left[rank]
            rounds.append(reading)
            # Whoever found no room in this round is the first in the next.
            turns = deque(rank for rank in turns if rank in left)
            turns.rotate(-len(reading))
        return rounds

    def _amount(self, part: Part, view: int) -> int:
        """Bytes that a view wants of a part."""
        entry = self._stored_at(part.entry)
        start, stop = _elements(entry, part.first, part.stop)
        lengths = entry.box.lengths
        return entry.itemsize * sum(
            _before(lengths, inner, stop) - _before(lengths, inner, start)
            for inner in (relative_to(entry.box, overlap) for overlap in self._demands[view][part.entry])
        )


def is_too_much_work(views: Sequence[View], stored: Callable[[str], Sequence[Stored]]) -> bool:
    """Whether to make a plan for so many ranks and so much data would take longer than it may gain."""
    names = {name for _, wants in views for name, _ in wants}
    entries = [entry for name in names for entry in stored(name)]
    cells = sum(entry.nbytes for entry in entries) // DIGEST_BLOCK // _MOST_CELLS
    return (cells + len(entries)) * len(views) > _MOST_WORK


def _cells(entry: Stored, overlaps: Sequence[Box]) -> list[tuple[int, int]]:
    if entry.nbytes <= DIGEST_BLOCK:
        return [(0, 1)]
    return union(
        run
        for overlap in overlaps
        for run in cells_of(entry.box.lengths, relative_to(entry.box, overlap), entry.itemsize)
    )


def _nbytes(entry: Stored, first: int, stop: int) -> int:
    return min(stop * DIGEST_BLOCK, entry.nbytes) - first * DIGEST_BLOCK


def _elements(entry: Stored, first: int, stop: int) -> tuple[int, int]:
    """The elements of an entry that lie in cells, row-major."""
    per_cell = DIGEST_BLOCK // entry.itemsize
    return first * per_cell, min(stop * per_cell, entry.box.volume)


def _before(lengths: Sequence[int], inner: Box, place: int) -> int:
    """How many elements of `inner` an array of shape `lengths` has before its element number `place`, row-major."""
    if not lengths:
        return place
    count, strides, volumes = 0, prod(lengths), inner.volume
    for length, start, wanted in zip(lengths, inner.offsets, inner.lengths, strict=True):
        strides //= length
        volumes //= wanted
        index, place = divmod(place, strides)
        count += min(max(index - start, 0), wanted) * volumes
        if not start <= index < start + wanted:
            break
    return count


def _take_trial(shared: Sequence[tuple[tuple[int, ...], list[Part]]], nbytes: int) -> list[Part]:
    """Take parts off the group in which sharing spares most, few enough to be read by all who want them."""
    readers, group = max(shared, key=lambda item: (len(item[0]) - 1) * sum(part.nbytes for part in item[1]))
    extra = len(readers) - 1
    ends = list(accumulate(part.nbytes for part in group))
    count = bisect_right(ends, min(_TRIAL_BYTES, nbytes // _TRIAL_SHARE // extra))
    if not count and ends[0] <= nbytes // _TRIAL_SHARE_AT_LEAST // extra:
        count = 1
    taken = group[:count]
    del group[:count]
    return taken


def _assign(shared: Sequence[tuple[tuple[int, ...], Sequence[Part]]], loads: list[int]) -> list[list[Part]]:
    """The parts that each rank reads for others, by rank, so that all read about as much.

    `loads` is what they read anyway. Each group of parts goes to those who want it, in stretches: neighbours in a file
    go to one rank, which then reads few ranges of few files.
    """
    assigned: list[list[Part]] = [[] for _ in loads]
    # Who has little choice comes first; the others level out what that leaves uneven.
    for readers, group in sorted(shared, key=lambda item: (len(item[0]), item[0])):
        ends = list(accumulate(_level([loads[rank] for rank in readers], sum(part.nbytes for part in group))))
        at = 0
        for part in group:
            if len(group) > 2 * len(readers):
                rank = readers[min(bisect_right(ends, at + part.nbytes // 2), len(readers) - 1)]
            else:  # a stretch each can't be even
                rank = min(readers, key=loads.__getitem__)
            assigned[rank].append(part)
            loads[rank] += part.nbytes
            at += part.nbytes
    return assigned


def _level(loads: Sequence[int], amount: int) -> list[int]:
    """How to add `amount` to `loads` so that the lowest are raised to one level."""
    order = sorted(range(len(loads)), key=loads.__getitem__)
    level, raised, left = 0, 0, amount
    for raised, index in enumerate(order):
        step = (loads[index] - level) * raised
        if step > left:
            break
        left -= step
        level = loads[index]
    else:
        raised = len(order)
    level += left // raised
    added = [max(0, level - load) for load in loads]
    added[order[0]] += amount - sum(added)
    return added
