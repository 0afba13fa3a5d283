"""What each rank wants of a checkpoint, so that all can know of all. Pure: no torch, no files, no process group."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from shardckpt.box import Box, intersect, relative_to
from shardckpt.codecs import DIGEST_BLOCK
from shardckpt.planner import Wanted, plan_load
from shardckpt.reader.fetch import cells_of, union

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


def cells_wanted(entry: Stored, overlaps: Sequence[Box]) -> list[tuple[int, int]]:
    """The cells of an entry that hold something of ``overlaps``, as disjoint ascending runs."""
    if entry.nbytes <= DIGEST_BLOCK:
        return [(0, 1)]
    return union(
        run
        for overlap in overlaps
        for run in cells_of(entry.box.lengths, relative_to(entry.box, overlap), entry.itemsize)
    )


def nbytes_of(entry: Stored, first: int, stop: int) -> int:
    """Bytes of raw data of the cells from number ``first`` up to ``stop``."""
    return min(stop * DIGEST_BLOCK, entry.nbytes) - first * DIGEST_BLOCK
