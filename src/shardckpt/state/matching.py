"""Matching: what a live state and a checkpoint have for each other, place by place, before a byte is read.

Tensors and values by rank are matched here. What holds them knows how to take itself apart: modules, optimizers, and
containers, over which `walk` goes.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardckpt.codecs import DTYPES
from shardckpt.manifest import Manifest
from shardckpt.state import values
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
from shardckpt.state.per_rank import DO_NOT_WRAP_IT, WRAP_IT, Here, Offer, PerRank, holders, rank_path
from shardckpt.state.skeleton import SPARSE_PARTS, per_rank_place, per_rank_places, tensor_name
from shardckpt.state.subtree import tensor_places

Json = Any


class Matching(Maker):
    """One live state held against one manifest. It changes nothing: it collects what is to be done.

    ``differences`` are all that were found; ``targets`` live tensors to fill, under the names of the checkpoint;
    ``materialised``, by ``id``, live tensors on the meta device that will get data, and new tensors to be filled in
    their stead; ``offers`` what somebody must decide of all ranks' values, before the thunks run.
    """

    def __init__(
        self,
        manifest: Manifest,
        walk: "Walk",
        *,
        parameters: Mapping[int, str],
        convert_dtype: bool,
        strict: bool,
        relocate: Callable[[Tensor, str], Tensor],
        here: Here,
    ) -> None:
        """``walk`` is how `match` goes about a value, ``parameters`` the names of the live ones, by ``id``."""
        super().__init__(manifest, relocate)
        self._walk = walk
        self.here = here
        self.offers: list[Offer] = []
        self.targets: list[LocalTensor] = []
        self.materialised: dict[int, tuple[Tensor, Fresh]] = {}
        self.differences = Differences()
        self.meshes = Meshes()
        self.parameters = parameters
        self._convert_dtype = convert_dtype
        self.strict = strict
        self._filled: defaultdict[int, list[tuple[Tensor, str]]] = defaultdict(list)
        self._stored: Callable[[], dict[str, str]] = dict
        self._holders: dict[str, PerRank] | None = None
        """While a stateful object's value is made anew: the `PerRank`s that its ``state_dict()`` had, by path."""

    def root(self, live: Any, node: Json) -> Thunk:
        """As `match`, of a whole state with all that is to be restored into it."""
        self._stored = functools.cache(lambda: tensor_places(node))
        with torch.no_grad():
            return self.match(live, node, "")

    def match(self, live: Any, node: Json, path: str) -> Thunk:
        """The thunk that restores ``node`` into ``live``, and the value that then belongs in its place."""
        return self._walk(self, live, node, path)

    def live(self) -> list[LocalTensor]:
        """What is wanted for live tensors, known before anything is allocated."""
        metas = [local_tensor(fresh.fqn, live, split=False) for live, fresh in self.materialised.values()]
        return [*self.targets, *metas]

    def all_fresh(self) -> list[Fresh]:
        # Optimizer state follows its parameter, which therefore comes first.
        return [*(fresh for _, fresh in self.materialised.values()), *self.fresh]

    def allocate(self) -> list[LocalTensor]:
        return [*self.targets, *super().allocate()]

    def stored(self, path: str) -> str | None:
        """The tensor of the checkpoint that stands at a place of the state, by which it may be called otherwise."""
        return self._stored().get(path)

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
        if (
            self.can_materialise(owner, path)
            and self._describes(live, owner, path)
            and self.fits(live, name, path)
            and self._is_one(other, fqn, path)
        ):
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

    def _describes(self, live: Tensor, owner: Tensor, path: str) -> bool:
        """Whether a meta tensor is what the state dict shows of it, so that what is read for that can become it."""
        if live is owner:
            return True
        shown, held = (local_tensor(path, tensor, split=False) for tensor in (live, owner))
        if (shown.shape, shown.boxes) == (held.shape, held.boxes):
            return True
        self.differences.mismatched.append(
            f"{path}: of shape {held.shape} on the meta device, and the module's state dict shows {shown.shape},"
            " or other parts; materialise it first (`module.to_empty(device=...)`)"
        )
        return False

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

    def by_rank(self, live: PerRank, node: Json, path: str) -> Thunk:
        """As `match`, of a value that is marked as its rank's own."""
        place = per_rank_place(node)
        if place is None:
            self.differences.mismatched.append(
                f"{path}: a value by rank here, one value for all ranks in the checkpoint ({DO_NOT_WRAP_IT})"
            )
            return lambda: live
        saved, here = self.manifest.per_rank[place], self.here
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

    def for_stateful(self, live: Any, node: Json, path: str) -> Thunk:
        """What ``load_state_dict`` of a live object gets: a `PerRank` where its ``state_dict()`` had one."""
        if not self.places(node):
            return self.new(node, path)
        self._holders = dict(holders(live.state_dict(), path))
        if per_rank_place(node) is not None and path not in self._holders:
            self._holders = None
            self.one_for_all(path)
            unchanged: Thunk = live.state_dict
            return unchanged
        try:
            return self.new(node, path)
        finally:
            self._holders = None

    def per_rank(self, place: str, path: str) -> Thunk:
        if self._holders is not None:
            return self.by_rank(self._holders.get(path, PerRank(None)), {"$per_rank": place}, path)
        self.one_for_all(path)
        return super().per_rank(place, path)

    def one_for_all(self, path: str) -> None:
        """Note that the live state has one value where every rank saved its own."""
        self.differences.mismatched.append(
            f"{path}: one value for all ranks here, a value by rank in the checkpoint ({WRAP_IT})"
        )

    def places(self, node: Json) -> list[str]:
        """Where in ``node`` values differ by rank."""
        return per_rank_places(node) if self.manifest.per_rank else []


def _sparse(layout: str, shape: Sequence[int]) -> str:
    return f"{layout} of shape {tuple(shape)}"


Walk = Callable[[Matching, Any, Json, str], Thunk]
