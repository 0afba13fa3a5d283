"""Who writes which box, and which stored box fills which wanted one. Pure: no torch, no files, no clock.

Every rank runs the same plan over the same input and executes its own part of the result, so a plan depends on
nothing but its arguments: no set order, no hash seed, no floating point.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from shardckpt.box import Box, Coverage, covers_exactly, find_overlap, full_box, intersect, slice_notation
from shardckpt.errors import ConflictingStateError, CorruptCheckpointError, UsageError
from shardckpt.sharing import Piece, Share, level_out

MIN_PIECE = 1 << 20
"""Bytes. A box that several ranks hold is cut only into pieces at least this long."""


# So few stored boxes are looked at one by one.
_FEW = 8


class Held(NamedTuple):
    """What one rank holds of one tensor."""

    fqn: str
    shape: tuple[int, ...]
    """The shape of the whole tensor."""
    dtype: str
    boxes: tuple[Box, ...]
    """In coordinates of the whole tensor; none when the rank only knows of the tensor."""
    split: bool
    """Whether every holder's copy is known to be equal, so that each may write a part of it."""


class WriteItem(NamedTuple):
    """One entry of a rank's shard."""

    fqn: str
    box: Box
    """What is written, in coordinates of the whole tensor."""
    held: int
    """The index, in this rank's `Held.boxes`, of the box that contains it."""
    nbytes: int


class ShardPlan(NamedTuple):
    """What one rank writes.

    Ordered by item size of the dtype, widest first, then by name and box: entries that follow one another without
    gaps, from an aligned start, are then each aligned to their item size.
    """

    items: tuple[WriteItem, ...]


class Wanted(NamedTuple):
    """A local region to fill, in coordinates of the whole tensor."""

    fqn: str
    box: Box


class ReadItem(NamedTuple):
    """One copy from a stored box to a wanted one."""

    wanted: int
    """The index into the list of wanted regions."""
    shard: int
    """The index into the tensor's stored boxes."""
    overlap: Box
    """What to copy, in coordinates of the whole tensor."""


class _View(NamedTuple):
    """A list of `Held` and all the ranks that sent it, by rank; data parallel ranks all send the same one."""

    ranks: tuple[int, ...]
    held: tuple[Held, ...]


class _Claim(NamedTuple):
    """One view's word on one tensor."""

    view: int
    held: Held


class _Whole(NamedTuple):
    """A box that one rank writes whole."""

    rank: int
    box: Box
    held: int
    nbytes: int


class _Divided(NamedTuple):
    """A box whose holders share the writing; for `Share`, less the name."""

    views: tuple[int, ...]
    box: Box
    held: tuple[int, ...]
    nbytes: int


class _Layout(NamedTuple):
    """What all tensors have in common that are alike on every rank but for their names."""

    itemsize: int
    whole: list[_Whole]
    divided: list[_Divided]


def plan_save(
    held_by_rank: Sequence[Sequence[Held]],
    itemsize: Mapping[str, int],
    *,
    rank: int | None = None,
    min_piece: int = MIN_PIECE,
) -> list[ShardPlan]:
    """Every rank's part of a save, such that each element of each tensor is written by exactly one rank.

    :param held_by_rank: for each rank, what it holds; a rank may lack tensors. Boxes of one tensor are equal or
        disjoint; those without elements are ignored.
    :param itemsize: bytes per element, by dtype name.
    :param rank: whose part is wanted, where it is one rank's: the plans of others are then empty, which spares work.
    :param min_piece: bytes; see `MIN_PIECE`.

    A box that one rank holds is written by that rank. One that several hold is written whole by the lowest of them,
    unless all say ``split``: such boxes are divided over their holders so that all write the same number of bytes,
    counting what each must write anyway. No rank exceeds that level by more than `min_piece`, unless boxes can't be
    cut so finely: cuts fall between rows and leave no part shorter than `min_piece`, so where a rank's fair share is
    less than that, or a box or its rows are about as long, the excess may be two or three times it.

    :raises ConflictingStateError: ranks give a tensor different shapes or dtypes, hold boxes that overlap without
        being equal, or together lack a part of it; names the tensor and the ranks.
    :raises UsageError: a dtype isn't in `itemsize`.
    """
    views = _views(held_by_rank)
    claims: defaultdict[str, list[_Claim]] = defaultdict(list)
    for number, view in enumerate(views):
        for held in view.held:
            claims[held.fqn].append(_Claim(number, held))

    written: list[list[Piece]] = [[] for _ in held_by_rank]
    loads = [0] * len(held_by_rank)
    shared: defaultdict[tuple[int, ...], list[Share]] = defaultdict(list)
    coverages: dict[tuple[tuple[int, ...], tuple[Box, ...]], Coverage] = {}
    # Layers repeat: a model of thousands of tensors has a few dozen different layouts. Equal objects that are not the
    # same only make for one layout more.
    layouts: dict[tuple[tuple[int, int, int, str, bool], ...], _Layout] = {}
    for fqn in sorted(claims):
        marks = tuple([(view, id(held.shape), id(held.boxes), held.dtype, held.split) for view, held in claims[fqn]])
        layout = layouts.get(marks)
        if layout is None:
            layout = layouts[marks] = _layout(claims[fqn], views, itemsize, coverages)
        for number, box, index, nbytes in layout.whole:
            loads[number] += nbytes
            if rank is None or number == rank:
                written[number].append(Piece(-layout.itemsize, fqn, box, index, nbytes))
        for key, box, indices, nbytes in layout.divided:
            shared[key].append(Share(fqn, box, layout.itemsize, indices, nbytes))

    groups = [(_holding_ranks(key, views), shares) for key, shares in shared.items()]
    level_out(written, loads, groups, min_piece=min_piece)
    wanted = range(len(written)) if rank is None else (rank,)
    return [ShardPlan(tuple(_items_in_order(p)) if r in wanted else ()) for r, p in enumerate(written)]


def _layout(
    claims: Sequence[_Claim],
    views: Sequence[_View],
    itemsize: Mapping[str, int],
    coverages: dict[tuple[tuple[int, ...], tuple[Box, ...]], Coverage],
) -> _Layout:
    """Who writes what of a tensor; raises as `plan_save` does. ``coverages`` are those known, and grow."""
    tensor = _check_agreement(claims, views)
    holders: dict[Box, dict[int, int]] = {}
    unlike: set[Box] = set()
    for number, held in claims:
        for index, box in enumerate(held.boxes):
            if box.volume:
                holders.setdefault(box, {}).setdefault(number, index)
                if not held.split:
                    unlike.add(box)
    shape_and_boxes = (tensor.shape, tuple(holders))
    if shape_and_boxes not in coverages:
        coverages[shape_and_boxes] = covers_exactly(*shape_and_boxes)
    if not coverages[shape_and_boxes].exact:
        raise _layout_error(tensor, holders, coverages[shape_and_boxes], views)
    size = itemsize.get(tensor.dtype)
    if size is None:
        raise UsageError(f"tensor {tensor.fqn!r} has dtype {tensor.dtype!r}, which can't be stored")
    layout = _Layout(size, [], [])
    for box, by_view in sorted(holders.items()):
        # Views are numbered in order of their lowest ranks.
        (lowest, index), *others = by_view.items()
        ranks = views[lowest].ranks
        if box in unlike or not (others or len(ranks) > 1):
            layout.whole.append(_Whole(ranks[0], box, index, box.volume * size))
        else:
            layout.divided.append(_Divided(tuple(by_view), box, tuple(by_view.values()), box.volume * size))
    return layout


def _views(held_by_rank: Sequence[Sequence[Held]]) -> list[_View]:
    same: defaultdict[int, list[int]] = defaultdict(list)
    for rank, held in enumerate(held_by_rank):
        same[id(held)].append(rank)
    # Hashing a list of 20,000 takes milliseconds, and a thousand ranks may well pass the same object.
    ranks_of: defaultdict[tuple[Held, ...], list[int]] = defaultdict(list)
    for ranks in same.values():
        ranks_of[tuple(held_by_rank[ranks[0]])].extend(ranks)
    return [_View(tuple(sorted(ranks)), held) for held, ranks in ranks_of.items()]


def _holding_ranks(key: tuple[int, ...], views: Sequence[_View]) -> list[tuple[int, int]]:
    """(rank, position of its view in `key`), by rank."""
    return sorted((rank, position) for position, number in enumerate(key) for rank in views[number].ranks)


def _items_in_order(pieces: Iterable[Piece]) -> Iterable[WriteItem]:
    for piece in sorted(pieces):
        yield WriteItem(piece.fqn, piece.box, piece.held, piece.nbytes)


def _check_agreement(claims: Sequence[_Claim], views: Sequence[_View]) -> Held:
    """The first claim, with whose shape and dtype all others agree."""
    first_view, tensor = claims[0]
    previous = first_view
    for number, held in claims[1:]:
        if number == previous:
            raise ConflictingStateError(f"tensor {held.fqn!r}: {named_ranks(views[number].ranks)} name it twice")
        for what, ours, theirs in (("shape", tensor.shape, held.shape), ("dtype", tensor.dtype, held.dtype)):
            if ours != theirs:
                here, there = named_ranks(views[first_view].ranks), named_ranks(views[number].ranks)
                raise ConflictingStateError(f"tensor {held.fqn!r} has {what} {ours} on {here}, but {theirs} on {there}")
        previous = number
    return tensor


def _layout_error(
    tensor: Held, holders: Mapping[Box, Mapping[int, int]], coverage: Coverage, views: Sequence[_View]
) -> ConflictingStateError:
    boxes = list(holders)
    name = f"tensor {tensor.fqn!r} of shape {tensor.shape}"

    def who(*held: Box) -> str:
        return named_ranks(rank for box in held for number in holders[box] for rank in views[number].ranks)

    def named(index: int) -> str:
        return f"[{slice_notation(boxes[index])}] on {who(boxes[index])}"

    if coverage.outside is not None:
        return ConflictingStateError(f"{name} can't have a part {named(coverage.outside)}")
    if coverage.overlap is not None:
        one, two = coverage.overlap
        return ConflictingStateError(f"{name} has parts that overlap: {named(one)} and {named(two)}")
    rest = f"; the others are on {who(*boxes)}" if boxes else ""
    return ConflictingStateError(
        f"{name} isn't complete: no rank holds {coverage.missing} of its {full_box(tensor.shape).volume} elements{rest}"
    )


def named_ranks(ranks: Iterable[int], most: int = 8) -> str:
    """Ranks as text, the first few of many: ``rank 3``, ``ranks 0, 2``."""
    listed = sorted(set(ranks))
    text = ", ".join(map(str, listed[:most])) + (f" and {len(listed) - most} more" if len(listed) > most else "")
    return f"rank{'s' if len(listed) > 1 else ''} {text}"


class _Shelf:
    """The stored boxes of one tensor, findable by place."""

    def __init__(self, shards: Sequence[Box], ndim: int) -> None:
        """Sort `shards`, unless they are few, along the dimension in which they start at the most different places."""
        self._shards = shards
        if len(shards) <= _FEW:
            return
        self._dim = max(range(ndim), key=lambda dim: len({shard.offsets[dim] for shard in shards}), default=-1)
        self._order = sorted(range(len(shards)), key=lambda index: self._extent(shards[index]))
        extents = [self._extent(shards[index]) for index in self._order]
        self._starts = [start for start, _ in extents]
        # Never falling, unlike the ends themselves: up to where it passes a place, no box reaches that place.
        self._reach = list(accumulate((end for _, end in extents), max))

    def _extent(self, box: Box) -> tuple[int, int]:
        """First index and last + 1 along the sorted dimension; 0-dim boxes all have one element at one place."""
        if self._dim < 0:
            return 0, 1
        return box.offsets[self._dim], box.offsets[self._dim] + box.lengths[self._dim]

    def overlaps(self, box: Box) -> list[tuple[int, Box]]:
        """(index, what it shares with `box`) of every stored box that shares anything, by index."""
        near: Iterable[int] = range(len(self._shards))
        if len(self._shards) > _FEW:
            start, end = self._extent(box)
            near = sorted(self._order[bisect_right(self._reach, start) : bisect_left(self._starts, end)])
        found = ((index, intersect(self._shards[index], box)) for index in near)
        return [(index, overlap) for index, overlap in found if overlap is not None]


def plan_load(wanted: Sequence[Wanted], shards_of: Callable[[str], Sequence[Box]]) -> list[ReadItem]:
    """The copies that fill every wanted region, each of its elements exactly once; by region, then by shard.

    :param wanted: regions to fill; those without elements need nothing.
    :param shards_of: a tensor's stored boxes by its name. Stored boxes without elements are ignored.
    :raises CorruptCheckpointError: the stored boxes leave a part of a wanted region out, or have it twice.
    """
    items: list[ReadItem] = []
    shelves: dict[str, _Shelf] = {}
    for number, (fqn, box) in enumerate(wanted):
        volume = box.volume
        if volume == 0:
            continue
        shards = shards_of(fqn)
        if len(shards) == 1 and shards[0] == box:
            items.append(ReadItem(number, 0, box))
            continue
        if fqn not in shelves:
            if any(len(s.offsets) != len(box.offsets) or len(s.lengths) != len(box.lengths) for s in shards):
                raise CorruptCheckpointError(f"tensor {fqn!r} has a stored box without {len(box.offsets)} dimensions")
            shelves[fqn] = _Shelf(shards, len(box.offsets))
        overlaps = shelves[fqn].overlaps(box)
        pair = find_overlap([overlap for _, overlap in overlaps])
        if pair is not None:
            one, two = (overlaps[index][0] for index in pair)
            raise CorruptCheckpointError(
                f"tensor {fqn!r} has stored boxes that overlap:"
                f" [{slice_notation(shards[one])}] and [{slice_notation(shards[two])}]"
            )
        missing = volume - sum(overlap.volume for _, overlap in overlaps)
        if missing:
            raise CorruptCheckpointError(
                f"tensor {fqn!r} isn't complete:"
                f" {missing} of the {volume} elements of [{slice_notation(box)}] are in no stored box"
            )
        items.extend(ReadItem(number, index, overlap) for index, overlap in overlaps)
    return items
