"""Match: the live state beside a checkpoint's skeleton, before a byte is read.

Matching walks both trees together. It changes nothing: it collects the live tensors to be filled, the tensors to be
made anew, every difference, and for each place a *thunk* that, run once all tensors are read, returns the value for
it.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from shardckpt.state import names, values
from shardckpt.state.fresh import Thunk
from shardckpt.state.matching import Matching
from shardckpt.state.modules import match_module
from shardckpt.state.optimizers import match_optimizer
from shardckpt.state.per_rank import DO_NOT_WRAP_IT, WRAP_IT, Offer, PerRank, holders, rank_path
from shardckpt.state.skeleton import contains_tensor, per_rank_place, per_rank_places
from shardckpt.state.subtree import tensor_places

Json = Any


class Match(Matching):
    """The walk over one live state (or none) and one manifest's skeleton."""

    _holders: dict[str, PerRank] | None = None
    """While a stateful object's value is made anew: the `PerRank`s that its ``state_dict()`` had, by path."""

    def root(self, live: Any, node: Json) -> Thunk:
        """As `match`, of a whole state with all that is to be restored into it."""
        self._stored = functools.cache(lambda: tensor_places(node))
        with torch.no_grad():
            return self.match(live, node, "")

    def match(self, live: Any, node: Json, path: str) -> Thunk:
        """The thunk that restores ``node`` into ``live``, and the value that then belongs in its place."""
        if isinstance(live, PerRank):
            return self._per_rank(live, node, path)
        if isinstance(live, Tensor):
            return self.tensor(live, node, path)
        if per_rank_place(node) is not None and not names.is_stateful(live):
            self.differences.mismatched.append(_by_rank(path))
            return lambda: live
        if names.is_module(live):
            return match_module(self, live, node, path)
        if names.is_optimizer(live):
            return match_optimizer(self, live, node, path)
        if isinstance(live, dict) and (values.is_plain_dict(live) or not names.is_stateful(live)):
            return self._dict(live, node, path)
        if type(live) in (list, tuple):
            return self._sequence(live, node, path)
        if names.is_stateful(live):
            value = self._for_stateful(live, node, path)
            return lambda: (live.load_state_dict(value()), live)[1]
        return self.new(node, path)

    def _per_rank(self, live: PerRank, node: Json, path: str) -> Thunk:
        place = per_rank_place(node)
        if place is None:
            self.differences.mismatched.append(
                f"{path}: a value by rank here, one value for all ranks in the checkpoint ({DO_NOT_WRAP_IT})"
            )
            return lambda: live
        saved, here = self.manifest.per_rank[place], self.here
        assert here is not None, "there is no live state but in a restore"
        if here.world_size != self.manifest.world_size:
            offer = Offer(place, live)
            self.offers.append(offer)
            return offer.put
        child = rank_path(place, here.rank)
        if here.rank not in saved:
            self.differences.missing.append(child)
            return lambda: live
        value = self.match(live.value, saved[here.rank], child)

        def put() -> PerRank:
            live.value = value()
            return live

        return put

    def _for_stateful(self, live: Any, node: Json, path: str) -> Thunk:
        """What ``load_state_dict`` of a live object gets: a `PerRank` where its ``state_dict()`` had one."""
        if not self._places(node):
            return self.new(node, path)
        self._holders = dict(holders(live.state_dict(), path))
        if per_rank_place(node) is not None and path not in self._holders:
            self._holders = None
            self.differences.mismatched.append(_by_rank(path))
            unchanged: Thunk = live.state_dict
            return unchanged
        try:
            return self.new(node, path)
        finally:
            self._holders = None

    def per_rank(self, place: str, path: str) -> Thunk:
        if self._holders is not None:
            return self._per_rank(self._holders.get(path, PerRank(None)), {"$per_rank": place}, path)
        if self.here is not None:
            self.differences.mismatched.append(_by_rank(path))
        return super().per_rank(place, path)

    def _dict(self, live: dict[Any, Any], node: Json, path: str) -> Thunk:
        saved = self.items(node, path)
        if saved is None:
            if path and not holds_live(live):
                return self.new(node, path)
            self.differences.mismatched.append(f"{path or 'the root'}: a dict here, something else in the checkpoint")
            return lambda: live
        # A nested dict of plain values becomes what was saved; any other is restored key by key.
        is_plain = bool(path) and live.keys() != saved.keys() and not holds_live(live)
        thunks: dict[Any, Thunk] = {}
        for key, value in live.items():
            if key in saved:
                thunks[key] = self.match(value, saved[key], names.child_path(path, key))
            elif not is_plain:
                self.differences.missing.append(names.child_path(path, key))
        for key in [key for key in saved if key not in live]:
            child = names.child_path(path, key)
            if not path:
                self.differences.skipped.append(child)
                continue
            places = self._places(saved[key])
            self._leave(places)
            if (places or not is_plain) and contains_tensor(saved[key]):
                self.differences.unexpected.append(child)
            elif not places:
                thunks[key] = self.new(saved[key], child)
        gone = [key for key in live if key not in saved] if is_plain else []

        def place() -> dict[Any, Any]:
            for key in gone:
                del live[key]
            for key in [key for key in saved if key in thunks]:
                live[key] = thunks[key]()
            return live

        return place

    def _places(self, node: Json) -> list[str]:
        return per_rank_places(node) if self.manifest.per_rank else []

    def _leave(self, places: list[str]) -> None:
        """Note that the live state lacks ``places`` that differ by rank; this rank may have lacked them when saved."""
        assert self.here is not None, "there is no live state but in a restore"
        rank, world_size = self.here
        if world_size != self.manifest.world_size:
            self.offers += [Offer(place, None) for place in places]
            return
        # Not merely unexpected: that another rank has the place does not help this rank's value.
        self.differences.mismatched += [
            f"{place}: nothing here, a value of rank {rank} in the checkpoint"
            for place in places
            if rank in self.manifest.per_rank[place]
        ]

    def _sequence(self, live: Any, node: Json, path: str) -> Thunk:
        items = node["$tuple"] if values.tag_of(node) == "$tuple" else node
        same_kind = isinstance(node, list) == isinstance(live, list)
        if not isinstance(items, list) or len(items) != len(live) or not same_kind:
            if path and not holds_live(live):
                value = self.new(node, path)
                return value if not same_kind or type(live) is tuple else lambda: _replace(live, value())
            if not isinstance(items, list) or len(items) != len(live):
                found = len(items) if isinstance(items, list) else "no list"
                self.differences.mismatched.append(f"{path}: {len(live)} items here, {found} in the checkpoint")
                return lambda: live
        thunks = [
            self.match(value, item, names.child_path(path, i))
            for i, (value, item) in enumerate(zip(live, items, strict=True))
        ]
        if type(live) is tuple:
            return lambda: tuple([thunk() for thunk in thunks])
        return lambda: _replace(live, [thunk() for thunk in thunks])


def _replace(live: list[Any], items: list[Any]) -> list[Any]:
    live[:] = items
    return live


def _by_rank(path: str) -> str:
    return f"{path}: one value for all ranks here, a value by rank in the checkpoint ({WRAP_IT})"


def holds_live(value: Any) -> bool:
    """Whether a container holds, at any depth, something that is restored in place and not just replaced."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, (Tensor, PerRank)) or names.is_module(item) or names.is_optimizer(item):
            return True
        if isinstance(item, (dict, list, tuple)):
            if id(item) not in seen:
                seen.add(id(item))
                todo += item.values() if isinstance(item, dict) else item
        elif names.is_stateful(item):
            return True
    return False
