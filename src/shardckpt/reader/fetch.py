"""Which bytes of which files to read, in which pieces. Pure: no torch, no files.

Stored bytes are verified block by block, so the unit of reading is a *cell*: what one digest covers, `DIGEST_BLOCK`
bytes of an entry, or one compressed frame of it. Cells that lie close together are read as one range.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Generic, NamedTuple, TypeVar

from shardckpt.box import Box
from shardckpt.codecs import DIGEST_BLOCK
from shardckpt.storage import BLOCK

PAGE: Final = 4096
"""Bytes to which ranges are aligned, so that they may be read past the page cache."""
GAP: Final = 64 << 10
"""Bytes that nobody wants but that are read anyway, where that saves a request."""

_RUNS_PER_BLOCK: Final = 64
"""Of a range: with more, what Python does for each costs more than `steps` spares."""

T = TypeVar("T")


class Extent(Generic[T]):
    """An entry of a shard as far as reading goes. Offsets and sizes are bytes."""

    __slots__ = ("_ends", "cells", "nbytes", "offset", "subject")

    def __init__(
        self, offset: int, nbytes: int, frames: Sequence[int] | None, cells: Sequence[tuple[int, int]], subject: T
    ) -> None:
        self.offset = offset
        """In the file."""
        self.nbytes = nbytes
        """Stored."""
        self.cells = cells
        """The wanted cells as half-open runs, ascending and disjoint."""
        self.subject = subject
        """Whatever the caller needs to verify and place it."""
        # None where the bytes are stored as they are; else where each compressed frame ends.
        self._ends = None if frames is None else list(accumulate(frames))

    def start_of(self, cell: int) -> int:
        """Where in the file cell number `cell` starts; for the number of cells, where the entry ends."""
        if self._ends is None:
            return self.offset + min(cell * DIGEST_BLOCK, self.nbytes)
        return self.offset + (self._ends[cell - 1] if cell else 0)

    def cells_before(self, limit: int) -> int:
        """How many cells, from the first on, end at file offset `limit` or earlier."""
        room = limit - self.offset
        if self._ends is not None:
            return bisect_right(self._ends, room)
        return -(-self.nbytes // DIGEST_BLOCK) if room >= self.nbytes else max(0, room) // DIGEST_BLOCK

    def nbytes_of(self, cells: tuple[int, int]) -> int:
        """How many bytes of the file a run of cells is."""
        return self.start_of(cells[1]) - self.start_of(cells[0])

    def narrowed(self, cells: Sequence[tuple[int, int]], subject: T) -> "Extent[T]":
        """The same entry, of which other cells are wanted, for another purpose."""
        other = copy(self)
        other.cells, other.subject = cells, subject
        return other


class Run(NamedTuple, Generic[T]):
    """Cells of one entry that lie in one range."""

    extent: Extent[T]
    first: int
    """Number of the first cell."""
    stop: int
    """One past the number of the last."""
    start_byte: int
    """Where in the file the first cell starts."""
    stop_byte: int
    """Where the last one ends."""


@dataclass(eq=False)
class Range(Generic[T]):
    """Bytes [start, stop) of a file, to be read at once: into one block, unless a storage is to read more at a time."""

    start: int
    """A multiple of `PAGE`."""
    stop: int
    runs: list[Run[T]]


def ranges(extents: Iterable[Extent[T]], *, most: int | None = None) -> Iterator[Range[T]]:
    """The wanted cells of one file's entries, each exactly once, as ranges in ascending order.

    A range starts at a multiple of `PAGE`, is `most` bytes long at most (by default `BLOCK`), and holds unwanted
    stretches of up to `GAP` bytes. A single cell may be longer, but with what alignment adds must fit into a block.
    """
    most = BLOCK if most is None else most
    current: Range[T] | None = None
    for extent in sorted(extents, key=lambda extent: extent.offset):
        for first, stop in extent.cells:
            while first < stop:
                start = extent.start_of(first)
                if current is not None and not current.start <= start <= current.stop + GAP:
                    yield current
                    current = None
                if current is None:
                    current = Range(start - start % PAGE, start, [])
                fitting, end = stop, extent.start_of(stop)
                if end > current.start + most:
                    fitting = min(stop, extent.cells_before(current.start + most))
                    if fitting <= first and current.runs:
                        yield current
                        current = None
                        continue
                    fitting = max(fitting, first + 1)
                    end = extent.start_of(fitting)
                    assert end <= current.start + max(most, BLOCK), f"a cell at byte {start} is larger than a block"
                current.runs.append(Run(extent, first, fitting, start, end))
                current.stop = max(current.stop, end)
                first = fitting
    if current is not None:
        yield current


def steps(wanted: Range[T], step: int) -> Iterator[Range[T]]:
    """The same cells in ranges of about `step` bytes; of a block, where that would make many of small entries."""
    blocks = -(-(wanted.stop - wanted.start) // BLOCK)
    has_small = len(wanted.runs) > _RUNS_PER_BLOCK * blocks
    if has_small and blocks == 1:
        yield wanted
        return
    extents = [run.extent.narrowed([(run.first, run.stop)], run.extent.subject) for run in wanted.runs]
    yield from ranges(extents, most=BLOCK if has_small else min(step, BLOCK))


def cells_of(lengths: Sequence[int], inner: Box, itemsize: int) -> list[tuple[int, int]]:
    """The cells of a stored box of shape `lengths` that hold elements of `inner`, as half-open runs.

    `inner` is in coordinates of the stored box. Runs ascend but may touch or share a cell; see `union`. Stretches
    between wanted elements are left out where they are sure to hold a whole cell.
    """
    return [
        (start * itemsize // DIGEST_BLOCK, -(-stop * itemsize // DIGEST_BLOCK))
        for start, stop in _stretches(lengths, inner, -(-2 * DIGEST_BLOCK // itemsize))
    ]


def _stretches(lengths: Sequence[int], inner: Box, gap: int) -> Iterator[tuple[int, int]]:
    """Row-major element ranges that together hold `inner`, apart by `gap` elements or more."""
    ndim = len(lengths)
    strides = [1] * ndim
    for dim in range(ndim - 2, -1, -1):
        strides[dim] = strides[dim + 1] * lengths[dim + 1]
    # How many elements lie between the first and the last of `inner` in the dimensions from each one on.
    extents = [0] * (ndim + 1)
    for dim in range(ndim - 1, -1, -1):
        extents[dim] = extents[dim + 1] + (inner.lengths[dim] - 1) * strides[dim]
    # Strides fall from one dimension to the next, and gaps with them: dimensions that leave big ones come first.
    apart = 0
    while apart < ndim and (inner.lengths[apart] == 1 or strides[apart] - extents[apart + 1] - 1 >= gap):
        apart += 1
    starts = [sum(offset * stride for offset, stride in zip(inner.offsets, strides, strict=True))]
    for dim in range(apart):
        starts = [start + index * strides[dim] for start in starts for index in range(inner.lengths[dim])]
    for start in starts:
        yield start, start + extents[apart] + 1


def union(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same cells as disjoint ascending runs that don't touch."""
    merged: list[tuple[int, int]] = []
    for first, stop in sorted(runs):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((first, stop))
    return merged
