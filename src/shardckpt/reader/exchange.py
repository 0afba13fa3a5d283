"""Which rank reads which stored bytes for which others. Pure: no torch, no files, no process group.

Where several ranks want the same cells (columns of what was saved by rows, or a replica each), one of them reads a cell
and passes on to the others what they want of it. Every rank computes the same plan from the manifest and from what all
of them want, and executes its own part.

A rank reads only cells of which it wants something itself: never more than it would read alone, and no shard that it
does not need.
"""

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from operator import add
from typing import Final, NamedTuple

from shardckpt.box import Box, boxes_of_range, intersect, relative_to
from shardckpt.codecs import DIGEST_BLOCK
from shardckpt.reader.wants import Entry, Stored, View, cells_wanted, demand_of, nbytes_of

LIMIT: Final = 16 << 20
"""Bytes that one rank sends, and that one receives, in one round. Two rounds are sent at once, so buffers hold thrice
as much. A part of which many views want different elements may exceed it: one part always goes."""

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


Group = tuple[int, ...]
"""Views, ascending, that want the same of an entry: what they get of it is in memory once."""
Round = Mapping[int, Sequence[Part]]
"""What is read at the same time, by the rank that reads it."""


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
        # Relative to the stored box, as all that follows needs them.
        self._inner = [
            {entry: [relative_to(self._stored_at(entry).box, box) for box in overlaps] for entry, overlaps in d.items()}
            for d in self._demands
        ]
        self._groups = {entry: self._alike(entry, views) for entry, views in entries.items()}
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

    def is_only(self, rank: int, group: Group) -> bool:
        """Whether nobody but ``rank`` is in a group."""
        return len(group) == 1 and self.views[group[0]] == (rank,)

    def groups(self, part: Part) -> list[Group]:
        """The views that want something of a part, those together that want the same."""
        return [group for group in self._groups[part.entry] if group[0] in part.views]

    def boxes(self, part: Part, view: int) -> Iterator[Box]:
        """What a view wants of a part, as boxes of the whole tensor, in the order in which they are passed on."""
        entry = self._stored_at(part.entry)
        ranges = boxes_of_range(entry.box.lengths, *_elements(entry, part.first, part.stop))
        for inner in self._inner[view][part.entry]:
            for box in ranges:
                shared = intersect(box, inner)
                if shared is not None:
                    yield Box(tuple(map(add, shared.offsets, entry.box.offsets)), shared.lengths)

    def _alike(self, entry: Entry, views: Sequence[int]) -> list[Group]:
        found: defaultdict[tuple[Box, ...], list[int]] = defaultdict(list)
        for view in views:
            found[tuple(self._demands[view][entry])].append(view)
        return [tuple(group) for group in found.values()]

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
            for first, stop in cells_wanted(stored, self._demands[view][entry]):
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
                    yield Part(entry, first, stop, nbytes_of(stored, first, stop), who)

    def _rounds(self, assigned: Sequence[Sequence[Part]], limit: int, *, trial: bool) -> list[Round]:
        """Each reader's parts in order, as many at a time as fit into buffers of `limit` bytes."""
        total = sum(part.nbytes for own in assigned for part in own)
        left = {
            rank: deque((part, self._amounts(part)) for part in parts) for rank, parts in enumerate(assigned) if parts
        }
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
                part, amounts = left[rank][0]
                sending = sent[rank] + sum(n for group, n in amounts if not self.is_only(rank, group))
                fits = sending <= limit and taken + part.nbytes <= most
                if reading and not (fits and all(received[v] + n <= limit for group, n in amounts for v in group)):
                    continue
                left[rank].popleft()
                reading[rank].append(part)
                taken += part.nbytes
                sent[rank] = sending
                for group, n in amounts:
                    for view in group:
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

    def _amounts(self, part: Part) -> list[tuple[Group, int]]:
        """Bytes that each group wants of a part."""
        entry = self._stored_at(part.entry)
        start, stop = _elements(entry, part.first, part.stop)
        lengths, found = entry.box.lengths, []
        for group in self.groups(part):
            inner = self._inner[group[0]][part.entry]
            count = sum(_before(lengths, box, stop) - _before(lengths, box, start) for box in inner)
            found.append((group, count * entry.itemsize))
        return found


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
