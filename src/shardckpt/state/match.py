"""Match: the live state beside a checkpoint's skeleton, before a byte is read.

Matching walks both trees together. It changes nothing: it collects the live tensors to be filled, the tensors to be
made anew, every difference, and for each place a *thunk* that, run once all tensors are read, returns the value for
it.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardckpt.codecs import DTYPES
from shardckpt.manifest import Manifest
from shardckpt.state import names, values
from shardckpt.state.differences import Differences
from shardckpt.state.fresh import Fresh, Maker, Thunk
from shardckpt.state.leaves import (
    LocalTensor,
    address,
    check_data,
    is_distributed,
    is_meta,
    is_raw_tensor,
    is_uninitialised,
    layout_name,
    local_tensor,
    memory_key,
    overlaps_itself,
)
from shardckpt.state.materialise import install, like, why_not
from shardckpt.state.meshes import Meshes
from shardckpt.state.modules import match_module
from shardckpt.state.optimizers import match_optimizer
from shardckpt.state.per_rank import WRAP_IT, Here, Offer, PerRank, holders, match_per_rank
from shardckpt.state.skeleton import SPARSE_PARTS, contains_tensor, per_rank_place, per_rank_places, tensor_name
from shardckpt.state.subtree import tensor_places

Json = Any


class Match(Maker):
    """One live state (or none) held against one manifest.

    ``targets`` are live tensors to fill, under the names of the checkpoint; ``materialised``, by ``id``, live tensors
    on the meta device that will get data, and new tensors to be filled in their stead; ``offers`` what somebody must
    decide of all ranks' values, before the thunks run. ``here`` is None where there is no live state.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        parameters: Mapping[int, str],
        convert_dtype: bool,
        strict: bool,
        relocate: Callable[[Tensor, str], Tensor],
        here: Here | None,
    ) -> None:
        super().__init__(manifest, relocate)
        self.here = here
        self.offers: list[Offer] = []
        self._holders: dict[str, PerRank] | None = None
        self.targets: list[LocalTensor] = []
        self.materialised: dict[int, tuple[Tensor, Fresh]] = {}
        self.differences = Differences()
        self.meshes = Meshes()
        self.parameters = parameters
        self._convert_dtype = convert_dtype
        self.strict = strict
        self._filled: defaultdict[int, list[tuple[Tensor, str]]] = defaultdict(list)
        self._stored: Callable[[], dict[str, str]] = dict

    def live(self) -> list[LocalTensor]:
        """What is wanted for live tensors, known before anything is allocated."""
        metas = [local_tensor(fresh.fqn, live, split=False) for live, fresh in self.materialised.values()]
        return [*self.targets, *metas]

    def allocate(self) -> list[LocalTensor]:
        """Allocate what is new; returns everything to be filled."""
        filled = list(self.targets)
        for fresh in self._all_fresh():
            fresh.tensor = fresh.make()
            filled.append(local_tensor(fresh.fqn, fresh.tensor, split=False))
        return filled

    def settle(self) -> None:
        """Give new tensors their final place, once read."""
        for fresh in self._all_fresh():
            fresh.tensor = fresh.finish(fresh.value())

    def _all_fresh(self) -> list[Fresh]:
        # Optimizer state follows its parameter, which therefore comes first.
        return [*(fresh for _, fresh in self.materialised.values()), *self.fresh]

    def root(self, live: Any, node: Json) -> Thunk:
        """As `match`, of a whole state with all that is to be restored into it."""
        self._stored = functools.cache(lambda: tensor_places(node))
        with torch.no_grad():
            return self.match(live, node, "")

    def stored(self, path: str) -> str | None:
        """The tensor of the checkpoint that stands at a place of the state, by which it may be called otherwise."""
        return self._stored().get(path)

    def match(self, live: Any, node: Json, path: str) -> Thunk:
        """The thunk that restores ``node`` into ``live``, and the value that then belongs in its place."""
        if isinstance(live, PerRank):
            return match_per_rank(self, live, node, path)
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
            return match_per_rank(self, self._holders.get(path, PerRank(None)), {"$per_rank": place}, path)
        if self.here is not None:
            self.differences.mismatched.append(_by_rank(path))
        return super().per_rank(place, path)

    def tensor(self, live: Tensor, node: Json, path: str, owner: Tensor | None = None) -> Thunk:
        """As `match`. ``owner`` is the tensor itself where ``live``, being on the meta device, only describes it."""
        if not is_raw_tensor(live) or is_uninitialised(live):
            if layout_name(live) not in SPARSE_PARTS:
                return self.new(node, path)
            here = _sparse(layout_name(live), live.shape)
            there = "no sparse tensor"
            if values.tag_of(node) == "$sparse":
                there = _sparse(node["$sparse"]["layout"], node["$sparse"]["size"])
            if here == there:
                return self.new(node, path)
            self.differences.mismatched.append(f"{path}: {here} here, {there} in the checkpoint")
            return lambda: live
        name = tensor_name(node)
        if name is None:
            found = {
                "$sparse": "a sparse tensor",
                "$object": "a pickled object",
                "$per_rank": f"a value by rank ({WRAP_IT})",
            }.get(values.tag_of(node) or "", "a plain value")
            self.differences.mismatched.append(f"{path}: a tensor here, but {found} in the checkpoint")
        elif is_meta(live):
            return self._materialise(live, live if owner is None else owner, name, path)
        elif self.fits(live, name, path):
            self.fill(live, name, path)
        return lambda: live

    def _materialise(self, live: Tensor, owner: Tensor, name: str, path: str) -> Thunk:
        """Have a meta tensor read anew, and ``owner`` become that. Of several stored tensors the first counts."""
        fqn = self.manifest.aliases.get(name, name)
        other = self.materialised[id(owner)][1].fqn if id(owner) in self.materialised else None
        if self.can_materialise(owner, path) and self.fits(live, name, path) and self._is_one(other, fqn, path):
            entry = self.entry(name)
            fresh = Fresh(
                fqn,
                entry,
                lambda: like(live, live.dtype),
                lambda tensor: tensor if is_distributed(live) else self.relocate(tensor, entry.location),
            )
            self.restored.append(name)
            self.meshes.add(name, live)
            if other is None:
                self.materialised[id(owner)] = owner, fresh
        return lambda: self._installed(owner)

    def can_materialise(self, live: Tensor, path: str) -> bool:
        """Whether a meta tensor can get data; the reason why not goes to the differences."""
        why = why_not(live)
        if why is not None:
            self.differences.mismatched.append(f"{path}: {why}; materialise it first (`module.to_empty(device=...)`)")
        return why is None

    def make_room(self, live: Tensor) -> None:
        """Give a meta tensor memory for others to fill."""
        if live.is_meta:
            made = like(live, live.dtype)
            install(live, made if is_distributed(live) else self.relocate(made, "cpu"))

    def _installed(self, live: Tensor) -> Tensor:
        if id(live) in self.materialised:
            _, fresh = self.materialised[id(live)]
            if fresh.tensor is not None:
                install(live, fresh.tensor)
                fresh.tensor = None
        return live

    def fits(self, live: Tensor, name: str, path: str) -> bool:
        """Whether a live tensor can take a stored one; the reasons why not go to the differences."""
        entry = self.entry(name)
        here = str(live.dtype).removeprefix("torch.")
        why = ""
        if tuple(live.shape) != tuple(entry.shape):
            why = f"shape {tuple(live.shape)} here, {tuple(entry.shape)} in the checkpoint"
        elif entry.dtype.startswith("complex") and not live.is_complex():
            why = f"dtype {here} here, {entry.dtype} in the checkpoint, half of which would be lost"
        elif live.dtype is not DTYPES.get(entry.dtype) and not self._convert_dtype:
            why = f"dtype {here} here, {entry.dtype} in the checkpoint (convert_dtype=True converts)"
        elif overlaps_itself(live):
            why = "elements share memory here (an expanded tensor), so they cannot be written; clone it first"
        if why:
            self.differences.mismatched.append(f"{path}: {why}")
        return not why

    def fill(self, live: Tensor, name: str, path: str) -> None:
        """Have a live tensor read in place. Of several stored tensors for one memory the first counts.

        That they are tied here and were not when they were saved is a difference, as only one of them can be kept.
        """
        target = local_tensor(self.manifest.aliases.get(name, name), live, split=False)
        check_data(name, live, target.views)
        other = self.filled_from(live)
        if not self._is_one(other, target.fqn, path):
            return
        self.restored.append(name)
        self.meshes.add(name, live)
        if other is None:
            self.targets.append(target)
            self._filled[address(live)].append((live, target.fqn))

    def _is_one(self, other: str | None, fqn: str, path: str) -> bool:
        """Whether memory that is to be filled from ``other``, if that is known, can be from ``fqn``."""
        if other in (None, fqn):
            return True
        self.differences.mismatched.append(
            f"{path}: one memory with {other!r} here, another tensor in the checkpoint; only {other!r} is kept"
        )
        return False

    def filled_from(self, live: Tensor) -> str | None:
        """The stored tensor that the memory of ``live`` is to be filled from; None where none is known of yet."""
        near = self._filled.get(address(live))
        key = memory_key(live) if near else None
        if near is None or key is None:
            return None
        return next((fqn for other, fqn in near if memory_key(other) == key), None)

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


def _sparse(layout: str, shape: Sequence[int]) -> str:
    return f"{layout} of shape {tuple(shape)}"
