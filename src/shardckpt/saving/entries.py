"""The entries of one rank's shard: worked out once for a structure, and for each save with the tensors of that save."""

from typing import NamedTuple

from shardckpt.box import Box, relative_to, slices
from shardckpt.codecs import ITEMSIZE
from shardckpt.planner import ShardPlan
from shardckpt.safetensors_format import Listed, entry_key
from shardckpt.staging import Source
from shardckpt.state import Flattened, LocalTensor
from shardckpt.writer import listed_of


class _Entry(NamedTuple):
    """A `Source` less its tensor, and where that is found."""

    key: str
    fqn: str
    dtype: str
    box: Box
    nbytes: int
    is_own: bool
    """Whether it is known to this rank alone."""
    held: int
    """The index, among the boxes that this rank holds of the tensor, of the one that contains ``box``."""
    part: tuple[slice, ...] | None
    """Of the view of that box; None for all of it."""

    def place(self) -> tuple[int, str, Box]:
        """Sorts as `ShardPlan` does."""
        return -ITEMSIZE[self.dtype], self.fqn, self.box


class Entries:
    """Good as long as the structure that ``plan`` was made for; a change of what is this rank's own it sees itself."""

    def __init__(self, plan: ShardPlan) -> None:
        self._plan = plan
        self._own = ""
        self._entries: list[_Entry] | None = None
        self._listed: Listed | None = None

    def sources(self, flat: Flattened) -> list[Source]:
        """The entries of the plan, and what is its own, with the memory each is in; widest elements first."""
        own = "" if flat.own is None else flat.own.structure
        if self._entries is None or own != self._own:
            self._entries = self._made(flat)
            self._own, self._listed = own, None
        shared, others = flat.tensors, {} if flat.own is None else flat.own.tensors
        found = []
        for key, fqn, dtype, box, nbytes, is_own, held, part in self._entries:
            view = (others if is_own else shared)[fqn].views[held]
            found.append(Source(key, fqn, dtype, box, view if part is None else view[part], nbytes))
        return found

    def listed(self, sources: list[Source]) -> Listed:
        """How a shard without compression lists the ``sources`` that were returned last."""
        if self._listed is None:
            self._listed = listed_of(sources)
        return self._listed

    def _made(self, flat: Flattened) -> list[_Entry]:
        found = []
        for item in self._plan.items:
            leaf = flat.tensors[item.fqn]
            whole = leaf.boxes[item.held]
            part = None if whole == item.box else slices(relative_to(whole, item.box))
            found.append(_entry(leaf, item.box, item.held, is_own=False, part=part))
        if flat.own is None:
            return found
        for leaf in flat.own.tensors.values():
            found += [_entry(leaf, box, held, is_own=True, part=None) for held, box in enumerate(leaf.boxes)]
        return sorted(found, key=_Entry.place)


def _entry(leaf: LocalTensor, box: Box, held: int, *, is_own: bool, part: tuple[slice, ...] | None) -> _Entry:
    key = entry_key(leaf.fqn, leaf.shape, box)
    return _Entry(key, leaf.fqn, leaf.dtype, box, box.volume * ITEMSIZE[leaf.dtype], is_own, held, part)
