"""The walk over a live state and a checkpoint's skeleton, together, before a byte is read.

It changes nothing: its `Matching` collects the live tensors to be filled, the tensors to be made anew and every
difference, and for each place there is a *thunk* that, run once all tensors are read, returns the value for it.
"""

from typing import Any

from torch import Tensor

from shardckpt.state import names, values
from shardckpt.state.fresh import Thunk
from shardckpt.state.matching import Matching
from shardckpt.state.modules import match_module
from shardckpt.state.optimizers import match_optimizer
from shardckpt.state.per_rank import Offer, PerRank
from shardckpt.state.skeleton import contains_tensor, per_rank_place

Json = Any


def walk(match: Matching, live: Any, node: Json, path: str) -> Thunk:
    """The thunk that restores ``node`` into ``live``, and the value that then belongs in its place."""
    if isinstance(live, PerRank):
        return match.by_rank(live, node, path)
    if isinstance(live, Tensor):
        return match.tensor(live, node, path)
    if per_rank_place(node) is not None and not names.is_stateful(live):
        match.one_for_all(path)
        return lambda: live
    if names.is_module(live):
        return match_module(match, live, node, path)
    if names.is_optimizer(live):
        return match_optimizer(match, live, node, path)
    if isinstance(live, dict) and (values.is_plain_dict(live) or not names.is_stateful(live)):
        return _dict(match, live, node, path)
    if type(live) in (list, tuple):
        return _sequence(match, live, node, path)
    if names.is_stateful(live):
        value = match.for_stateful(live, node, path)
        return lambda: (live.load_state_dict(value()), live)[1]
    return match.new(node, path)


def _dict(match: Matching, live: dict[Any, Any], node: Json, path: str) -> Thunk:
    saved = match.items(node, path)
    if saved is None:
        if path and not holds_live(live):
            return match.new(node, path)
        match.differences.mismatched.append(f"{path or 'the root'}: a dict here, something else in the checkpoint")
        return lambda: live
    # A nested dict of plain values becomes what was saved; any other is restored key by key.
    is_plain = bool(path) and live.keys() != saved.keys() and not holds_live(live)
    thunks: dict[Any, Thunk] = {}
    for key, value in live.items():
        if key in saved:
            thunks[key] = match.match(value, saved[key], names.child_path(path, key))
        elif not is_plain:
            match.differences.missing.append(names.child_path(path, key))
    for key in [key for key in saved if key not in live]:
        child = names.child_path(path, key)
        if not path:
            match.differences.skipped.append(child)
            continue
        places = match.places(saved[key])
        _leave(match, places)
        if (places or not is_plain) and contains_tensor(saved[key]):
            match.differences.unexpected.append(child)
        elif not places:
            thunks[key] = match.new(saved[key], child)
    gone = [key for key in live if key not in saved] if is_plain else []

    def place() -> dict[Any, Any]:
        for key in gone:
            del live[key]
        for key in [key for key in saved if key in thunks]:
            live[key] = thunks[key]()
        return live

    return place


def _leave(match: Matching, places: list[str]) -> None:
    """Note that the live state lacks ``places`` that differ by rank; this rank may have lacked them when saved."""
    rank, world_size = match.here
    if world_size != match.manifest.world_size:
        match.offers += [Offer(place, None) for place in places]
        return
    # Not merely unexpected: that another rank has the place does not help this rank's value.
    match.differences.mismatched += [
        f"{place}: nothing here, a value of rank {rank} in the checkpoint"
        for place in places
        if rank in match.manifest.per_rank[place]
    ]


def _sequence(match: Matching, live: Any, node: Json, path: str) -> Thunk:
    items = node["$tuple"] if values.tag_of(node) == "$tuple" else node
    same_kind = isinstance(node, list) == isinstance(live, list)
    if not isinstance(items, list) or len(items) != len(live) or not same_kind:
        if path and not holds_live(live):
            value = match.new(node, path)
            return value if not same_kind or type(live) is tuple else lambda: _replace(live, value())
        if not isinstance(items, list) or len(items) != len(live):
            found = len(items) if isinstance(items, list) else "no list"
            match.differences.mismatched.append(f"{path}: {len(live)} items here, {found} in the checkpoint")
            return lambda: live
    thunks = [
        match.match(value, item, names.child_path(path, i))
        for i, (value, item) in enumerate(zip(live, items, strict=True))
    ]
    if type(live) is tuple:
        return lambda: tuple([thunk() for thunk in thunks])
    return lambda: _replace(live, [thunk() for thunk in thunks])


def _replace(live: list[Any], items: list[Any]) -> list[Any]:
    live[:] = items
    return live


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
