"""N-D boxes of array elements: intersect, cut, enumerate, and check that they tile an array.

A box is an axis-aligned region of an array, in elements. Everything here is pure arithmetic on Python integers:
no torch, no bytes, no files. Orders are row-major throughout, since that is how torch, numpy and safetensors lay
a contiguous tensor out.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from operator import add
from typing import NamedTuple

# Cells this small are compared pair by pair; six comparisons cost less than one more sort.
_PAIRWISE = 4
# A separation that leaves more than this share of a cell in one group isn't worth its sort: nested frames would be
# peeled one box at a time, in quadratic time.
_LOPSIDED = 0.75


class Box(NamedTuple):
    """The elements ``offsets[d] <= index[d] < offsets[d] + lengths[d]`` in every dimension ``d``.

    A 0-dim tensor's one box is ``Box((), ())``, of volume 1.
    """

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last index, per dimension."""
        return tuple(map(add, self.offsets, self.lengths))

    @property
    def volume(self) -> int:
        """The number of elements."""
        return prod(self.lengths)


class Coverage(NamedTuple):
    """How a list of boxes covers an array; see `covers_exactly`."""

    missing: int
    """Elements in no box. Where boxes overlap, a lower bound."""
    overlap: tuple[int, int] | None
    """The indices of two boxes that share an element."""
    outside: int | None
    """The index of a box that is no region of the array: wrong number of dimensions, negative, or over the edge."""

    @property
    def exact(self) -> bool:
        """Whether every element lies in exactly one box, and no box reaches outside."""
        return self.missing == 0 and self.overlap is None and self.outside is None


def full_box(shape: Sequence[int]) -> Box:
    """The box of a whole array of `shape`."""
    return Box((0,) * len(shape), tuple(shape))


def intersect(a: Box, b: Box) -> Box | None:
    """The elements in both boxes, or None when there are none. Both have the same number of dimensions."""
    offsets, lengths = [], []
    for start, n, other, m in zip(a.offsets, a.lengths, b.offsets, b.lengths, strict=True):
        first = max(start, other)
        end = min(start + n, other + m)
        if end <= first:
            return None
        offsets.append(first)
        lengths.append(end - first)
    return Box(tuple(offsets), tuple(lengths))


def contains(outer: Box, inner: Box) -> bool:
    """Whether every element of `inner` is in `outer`. Both have the same number of dimensions."""
    for o, m, i, n in zip(outer.offsets, outer.lengths, inner.offsets, inner.lengths, strict=True):
        if i < o or i + n > o + m:
            return False
    return True


def relative_to(outer: Box, inner: Box) -> Box:
    """`inner` in coordinates that have `outer`'s first element as their origin."""
    return Box(tuple(i - o for o, i in zip(outer.offsets, inner.offsets, strict=True)), inner.lengths)


def slices(box: Box) -> tuple[slice, ...]:
    """`box` as an index for an array: ``array[slices(box)]``. For a 0-dim array, ``()``."""
    return tuple(slice(start, start + n) for start, n in zip(box.offsets, box.lengths, strict=True))


def slice_notation(box: Box) -> str:
    """`box` as a person would index it: ``"0:1024,0:4096"``; the empty string for a 0-dim box."""
    return ",".join(f"{start}:{start + n}" for start, n in zip(box.offsets, box.lengths, strict=True))


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The elements ``start <= i < stop`` of an array of `shape`, numbered row-major, as boxes in that order.

    At most ``2 * ndim - 1`` boxes: a head, a body and a tail, where head and tail may again need parts. The range
    must lie within the array; an empty one has no boxes.
    """
    assert 0 <= start <= stop <= prod(shape), f"range {start}:{stop} of an array of shape {tuple(shape)}"
    if start == stop:
        return []
    if not shape:
        return [Box((), ())]
    found: list[Box] = []
    _collect_range(tuple(shape), (), start, stop, found)
    return found


def _collect_range(shape: tuple[int, ...], at: tuple[int, ...], start: int, stop: int, found: list[Box]) -> None:
    """Append the boxes of [start, stop) of the sub-array at index prefix `at`; the range isn't empty."""
    inner = shape[len(at) + 1 :]
    stride = prod(inner)
    first, head = divmod(start, stride)
    last, tail = divmod(stop, stride)
    if first == last:
        _collect_range(shape, (*at, first), head, tail, found)
        return
    if head:
        _collect_range(shape, (*at, first), head, stride, found)
        first += 1
    if first < last:
        ones = (1,) * len(at)
        found.append(Box((*at, first, *(0,) * len(inner)), (*ones, last - first, *inner)))
    if tail:
        _collect_range(shape, (*at, last), 0, tail, found)


def contiguous_span(outer: Box, inner: Box) -> tuple[int, int]:
    """The shortest row-major element range [start, stop) of `outer` that has all of `inner`, which lies within it.

    Where ``stop - start == inner.volume`` the elements are contiguous; otherwise the range also has others. An empty
    `inner` has the range (0, 0).
    """
    if inner.volume == 0:
        return (0, 0)
    first = last = 0
    for o, m, i, n in zip(outer.offsets, outer.lengths, inner.offsets, inner.lengths, strict=True):
        first = first * m + i - o
        last = last * m + i - o + n - 1
    return first, last + 1


def covers_exactly(shape: Sequence[int], boxes: Sequence[Box]) -> Coverage:
    """Whether `boxes` tile an array of `shape`. Empty boxes are ignored; an array with a 0 in its shape needs none."""
    whole = full_box(shape)
    volume = 0
    for index, box in enumerate(boxes):
        if len(box.offsets) != len(shape) or len(box.lengths) != len(shape) or min(box.lengths, default=0) < 0:
            return Coverage(whole.volume, None, index)
        size = box.volume
        if size and not contains(whole, box):
            return Coverage(whole.volume, None, index)
        volume += size
    return Coverage(max(0, whole.volume - volume), find_overlap(boxes), None)


class _Part(NamedTuple):
    """What of box `number` lies in the cell at hand."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    number: int


def find_overlap(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """The indices, lower first, of some two boxes that share an element; None when all are disjoint.

    The boxes are sorted along one dimension after the other and separated wherever a gap allows, which takes grids,
    slabs and their like apart in O(n log n). What can't be separated so (pinwheels, nested frames, boxes that
    overlap) is cut at a median edge, crossing boxes in two: O(n ** 1.5) for n disjoint boxes in 2 or 3 dimensions.
    """
    cell = [_Part(b.offsets, b.ends, i) for i, b in enumerate(boxes) if b.volume]
    cells = [cell] if len(cell) > 1 else []
    while cells:
        cell = cells.pop()
        if len(cell) <= _PAIRWISE:
            pair = _overlapping_pair(cell)
            if pair is not None:
                return pair
            continue
        groups = _separate(cell)
        if len(max(groups, key=len)) > len(cell) * _LOPSIDED:
            groups = _cut(cell)
        if not groups:
            first, second = sorted(part.number for part in cell[:2])
            return first, second
        cells.extend(group for group in groups if len(group) > 1)
    return None


def _overlapping_pair(cell: list[_Part]) -> tuple[int, int] | None:
    for number, a in enumerate(cell):
        for b in cell[:number]:
            if all(s < f and t < e for s, e, t, f in zip(a.starts, a.ends, b.starts, b.ends, strict=True)):
                return min(a.number, b.number), max(a.number, b.number)
    return None


def _separate(cell: list[_Part]) -> list[list[_Part]]:
    """Groups whose extents along one dimension are disjoint: along the first that leaves no group too big.

    The whole cell as one group when there's no such dimension.
    """
    for dim in range(len(cell[0].starts)):
        groups: list[list[_Part]] = []
        reach: int | None = None
        for part in sorted(cell, key=lambda part: part.starts[dim]):
            if reach is None or part.starts[dim] >= reach:
                groups.append([part])
                reach = part.ends[dim]
            else:
                groups[-1].append(part)
                reach = max(reach, part.ends[dim])
        if len(max(groups, key=len)) <= len(cell) * _LOPSIDED:
            return groups
    return [cell]


def _cut(cell: list[_Part]) -> list[list[_Part]]:
    """The two sides of a cut at the median edge of the dimension where it crosses the fewest boxes.

    [] when there's no edge inside the cell, so that all its boxes are the same.
    """
    best: tuple[int, int, int] | None = None
    for dim in range(len(cell[0].starts)):
        edges = {part.starts[dim] for part in cell} | {part.ends[dim] for part in cell}
        if len(edges) > 2:
            at = sorted(edges)[len(edges) // 2]
            crossing = sum(part.starts[dim] < at < part.ends[dim] for part in cell)
            best = min(best or (crossing, dim, at), (crossing, dim, at))
    if best is None:
        return []
    _, dim, at = best
    before = [
        part._replace(ends=(*part.ends[:dim], min(part.ends[dim], at), *part.ends[dim + 1 :]))
        for part in cell
        if part.starts[dim] < at
    ]
    after = [
        part._replace(starts=(*part.starts[:dim], max(part.starts[dim], at), *part.starts[dim + 1 :]))
        for part in cell
        if part.ends[dim] > at
    ]
    return [before, after]
