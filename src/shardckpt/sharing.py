"""How ranks that hold the same bytes share the work of writing them. Pure integer arithmetic."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import NamedTuple

from shardckpt.box import Box, boxes_of_range

# Rounds of evening out the loads of rank groups that overlap without one containing the other. Two suffice for the
# nested groups of ordinary device meshes; each further one about halves what imbalance is left.
_ROUNDS = 16


class Piece(NamedTuple):
    """A box that one rank writes. Sorts by item size, widest first, then by name and box."""

    minus_itemsize: int
    fqn: str
    box: Box
    held: int
    """The index, among the boxes of this tensor that the rank holds, of the one that contains `box`."""
    nbytes: int


class Share(NamedTuple):
    """A box that several ranks hold alike."""

    fqn: str
    box: Box
    itemsize: int
    held: tuple[int, ...]
    """For each class of holders, the box's index among those of the tensor that they hold."""
    nbytes: int
    """The bytes of the whole box."""

    def whole(self, held: int) -> Piece:
        """All of the box as one piece."""
        return Piece(-self.itemsize, self.fqn, self.box, held, self.nbytes)

    def part(self, held: int, start: int, stop: int) -> list[Piece]:
        """Bytes [start, stop) of the box, which are whole elements, as pieces."""
        if stop - start == self.nbytes:
            return [self.whole(held)]
        pieces = []
        for inner in boxes_of_range(self.box.lengths, start // self.itemsize, stop // self.itemsize):
            offsets = tuple(a + b for a, b in zip(self.box.offsets, inner.offsets, strict=True))
            box = Box(offsets, inner.lengths)
            pieces.append(Piece(-self.itemsize, self.fqn, box, held, box.volume * self.itemsize))
        return pieces


Group = tuple[Sequence[tuple[int, int]], Sequence[Share]]
"""The holders, as (rank, its position in `Share.held`) by rank, and what they all hold, in order of name and box."""


def level_out(written: list[list[Piece]], loads: Sequence[int], groups: Sequence[Group], *, min_piece: int) -> None:
    """Add every share of every group to what ranks write, so that each rank's bytes are as level as can be.

    :param written: for each rank, what it writes anyway, or as much of it as is of interest; extended in place.
    :param loads: for each rank, the bytes of all that it writes anyway.
    :param min_piece: bytes; no piece of a share that is cut is shorter.
    """
    loads = [*loads]
    # The fewer ranks could take a share, the earlier it is placed, and the wider groups even out what is left over.
    ordered = sorted(groups, key=lambda group: (len(group[0]), group[0]))
    totals = [sum(share.nbytes for share in shares) for _, shares in ordered]
    poured = [[0] * len(holders) for holders, _ in ordered]

    def drain(number: int) -> list[int]:
        """Take a group's bytes off the loads again, and return the loads of its holders."""
        for (rank, _), amount in zip(ordered[number][0], poured[number], strict=True):
            loads[rank] -= amount
        return [loads[rank] for rank, _ in ordered[number][0]]

    for _ in range(_ROUNDS):
        before = [*loads]
        for number, (holders, _) in enumerate(ordered):
            poured[number] = pour(drain(number), totals[number])
            for (rank, _), amount in zip(holders, poured[number], strict=True):
                loads[rank] += amount
        if all(abs(a - b) < min_piece // 16 for a, b in zip(before, loads, strict=True)):
            break
    for number, (holders, shares) in enumerate(ordered):
        levels = drain(number)
        for (rank, _), pieces in zip(holders, _hand_out(levels, holders, shares, min_piece), strict=True):
            written[rank].extend(pieces)
            loads[rank] += sum(piece.nbytes for piece in pieces)


def pour(levels: Sequence[int], amount: int) -> list[int]:
    """How much of `amount` goes to each of `levels`, so that the lowest rise to one common level."""
    order = sorted(range(len(levels)), key=levels.__getitem__)
    total, count = amount, 0
    for index in order:
        if count and total <= levels[index] * count:
            break
        total += levels[index]
        count += 1
    level, rest = divmod(total, count)
    amounts = [0] * len(levels)
    for place, index in enumerate(order[:count]):
        amounts[index] = level - levels[index] + (place < rest)
    return amounts


def _hand_out(
    levels: list[int], holders: Sequence[tuple[int, int]], shares: Sequence[Share], min_piece: int
) -> list[list[Piece]]:
    """Each holder's pieces. What can't be cut goes first, cutting the rest makes level, the smallest fill the dents."""
    pieces: list[list[Piece]] = [[] for _ in holders]
    # Sorting is stable, so shares of one length stay in order of name.
    uncut = sorted((share for share in shares if share.nbytes < 2 * min_piece), key=lambda share: -share.nbytes)
    smallest = bisect_right(uncut, -(min_piece // 16), key=lambda share: -share.nbytes)
    _deal(uncut[:smallest], levels, holders, pieces)
    for run in _cut_level([share for share in shares if share.nbytes >= 2 * min_piece], [*levels], min_piece):
        pieces[run.place].extend(run.share.part(run.share.held[holders[run.place][1]], run.start, run.stop))
        levels[run.place] += run.stop - run.start
    _deal(uncut[smallest:], levels, holders, pieces)
    return pieces


def _deal(
    shares: Sequence[Share], levels: list[int], holders: Sequence[tuple[int, int]], pieces: Sequence[list[Piece]]
) -> None:
    """Give each share, longest first, to the holder with the lowest level; `levels` and `pieces` grow."""
    heap = [(level, place) for place, level in enumerate(levels)]
    heapify(heap)
    for share in shares:
        level, place = heap[0]
        pieces[place].append(share.whole(share.held[holders[place][1]]))
        levels[place] = level + share.nbytes
        heapreplace(heap, (levels[place], place))


class _Run(NamedTuple):
    """Bytes of one share that go to one holder."""

    place: int
    share: Share
    start: int
    stop: int


class _Stretch(NamedTuple):
    """Where one holder's part of the line ends; it begins where the part before ends."""

    place: int
    number: int
    """The first share that isn't wholly in this part or one before."""
    cut: int
    """The bytes of that share that are."""


def _cut_level(shares: Sequence[Share], levels: Sequence[int], min_piece: int) -> Iterator[_Run]:
    """The shares laid end to end and cut, each holder getting a stretch, so that the highest level is near the lowest.

    The lowest cap under which they fit is searched for, to a 64th of `min_piece`.
    """
    ends = list(accumulate(share.nbytes for share in shares))
    if not ends:
        return
    low = max(amount and level + amount for level, amount in zip(levels, pour(levels, ends[-1]), strict=True))
    cap, step = low, min_piece
    while (stretches := _fill(shares, ends, levels, cap, min_piece)) is None:
        low, cap, step = cap, cap + step, step * 2
    while cap - low > max(1, min_piece // 64):
        middle = (low + cap) // 2
        better = _fill(shares, ends, levels, middle, min_piece)
        if better is None:
            low = middle
        else:
            cap, stretches = middle, better
    number = cut = 0
    for stretch in stretches:
        for share in shares[number : stretch.number]:
            yield _Run(stretch.place, share, cut, share.nbytes)
            cut = 0
        if stretch.cut > cut:
            yield _Run(stretch.place, shares[stretch.number], cut, stretch.cut)
        number, cut = stretch.number, stretch.cut


def _fill(
    shares: Sequence[Share], ends: Sequence[int], levels: Sequence[int], cap: int, min_piece: int
) -> list[_Stretch] | None:
    """Fill each holder in turn up to `cap` with as much of the line as permitted cuts allow; None if some is left.

    :param ends: where each share ends on the line, in bytes.
    """
    stretches: list[_Stretch] = []
    longest = cap - min(levels)
    number = cut = 0
    for place, level in enumerate(levels):
        if level >= cap:
            continue
        reach = ends[number] - shares[number].nbytes + cut + cap - level
        beyond = bisect_right(ends, reach, lo=number)
        if beyond == len(shares):
            return [*stretches, _Stretch(place, beyond, 0)]
        if beyond > number:
            number, cut = beyond, 0
        cut = _last_cut(shares[number], cut, reach - ends[number] + shares[number].nbytes, longest, min_piece)
        stretches.append(_Stretch(place, number, cut))
    return None


def _last_cut(share: Share, after: int, limit: int, longest: int, min_piece: int) -> int:
    """The last byte of `share`, at most `limit`, where it may be cut, having been cut at `after` (0: not yet) before.

    A slab is the smallest run of trailing dimensions longer than `min_piece`, and made of rows that aren't. Cuts
    between slabs are free. Within one they fall between rows, and each part of it becomes a box of its own, so none
    may be shorter than `min_piece`; nor may what is left be such that it can't be cut into parts up to `longest`.
    """
    slab = row = share.nbytes
    for length in share.box.lengths:
        if row <= min_piece:
            break
        slab, row = row, row // length
    floor = limit // slab * slab
    end = floor + slab
    least = -(-min_piece // row) * row
    rest = max(-(-(end - limit) // row) * row, least)
    parts = -(-rest // max(least, longest // row * row))
    at = end - max(rest, parts * least)
    first = max(floor, after)
    return at if at - first >= least else first
