"""Flatten: a nested state becomes named tensors, a JSON skeleton that says where they stand, and pickled objects.

Kinds are asked for here once. Above this floor there are only `LocalTensor`s, JSON and bytes.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from shardckpt.box import Box
from shardckpt.errors import UnserialisableError, UsageError
from shardckpt.garbage import held_off
from shardckpt.state import composites, names, values
from shardckpt.state.composites import LEFT_OUT, Composite, OptimizerContent
from shardckpt.state.flattened import Flattened, check_names
from shardckpt.state.leaves import (
    Kind,
    address,
    check_data,
    is_distributed,
    is_raw_tensor,
    is_uninitialised,
    layout_name,
    local_tensor,
    of_kind,
    ordinary,
)
from shardckpt.state.objects import pickled
from shardckpt.state.per_rank import PerRank, rank_path
from shardckpt.state.selection import Selection, matches
from shardckpt.state.skeleton import MAX_DEPTH, SPARSE_PARTS
from shardckpt.state.tied import Tied

Json = Any


@held_off()
def flatten(
    state: Any,
    *,
    replicated: bool | Sequence[str],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    rank: int,
) -> Flattened:
    """Flatten ``state`` without copying a tensor, stepping an optimizer or changing anything.

    ``replicated`` declares loose tensors and buffers equal on all ranks (true, or patterns of their names), so that
    their writing is shared. ``rank`` is part of the names of what is this rank's own.

    Raises UnserialisableError naming the path of a value that cannot be stored, UsageError for a state of a wrong type,
    with clashing names, or of which nothing is selected.
    """
    names.check_root(state)
    is_share = isinstance(state, names.Share)
    if isinstance(state, dict) and not names.is_stateful(state) and not _is_state_dict(state):
        state = dict(state)  # whatever kind of dict is at the root, it is a state and not an object to be pickled
    parameters, selected = names.parameter_names(state), Selection(include, exclude)
    own = _Flattener(parameters, lambda _: False, selected, rank=rank, own=None)
    walk = _Flattener(
        parameters,
        lambda path: replicated is True or (replicated is not False and matches(path, replicated)),
        selected,
        rank=rank,
        own=own,
    )
    walk.result.skeleton = walk.node(state, "", False)
    if walk.result.skeleton is LEFT_OUT:
        raise UsageError(f"include={include!r} and exclude={exclude!r} leave nothing of the state to save.")
    walk.result.structure = walk.structure()
    walk.result.outline = "" if is_share else walk.outline()
    if own.nodes:
        own.result.skeleton = own.nodes
        own.result.structure = own.structure()
        check_names(walk.result, own.result)
        walk.check_optimizers()
        walk.result.own = own.result
        walk.result.places = xxhash.xxh3_128_hexdigest("\0".join(sorted(own.nodes)).encode())
    return walk.result


class _Flattener:
    """One walk over a state. ``own`` walks over what differs by rank, and is None in that walk itself."""

    def __init__(
        self,
        parameters: Mapping[int, str],
        replicated: Callable[[str], bool],
        selected: Selection,
        *,
        rank: int,
        own: "_Flattener | None",
    ) -> None:
        self.result = Flattened()
        self.nodes: dict[str, Json] = {}
        self._rank = rank
        self._own = own
        self._facts: list[str] = []
        self._places: list[str] = []
        self._parameters = parameters
        self._replicated = replicated
        self._selected = selected
        self._takes_all = selected.takes_all
        self._tied = Tied()
        self.open: set[int] = set() if own is None else own.open
        self._optimized: list[tuple[str, Tensor]] = []
        """Parameters without a name, and the places of their optimizers."""

    def structure(self) -> str:
        """See `Flattened.structure`."""
        return _digest(self._facts)

    def outline(self) -> str:
        """See `Flattened.outline`, of a whole state."""
        return _digest(self._places)

    def node(self, value: Any, path: str, split: bool) -> Json:
        """The skeleton of ``value``, or `LEFT_OUT`. ``split`` says that its tensors are equal on all ranks."""
        if isinstance(value, Tensor):
            return self._tensor(value, path, split) if self._takes_all or self._selected(path) else LEFT_OUT
        if names.is_module(value):
            return self._module(value, path)
        if names.is_optimizer(value):
            return self._optimizer(value, path)
        if isinstance(value, PerRank):
            return self._per_rank(value, path)
        if values.is_plain_dict(value) or type(value) in (list, tuple):
            with self._inside(value, path):
                self._note(type(value).__name__, path)
                return self._dict(value, path, split) if isinstance(value, dict) else self._list(value, path, split)
        if names.is_stateful(value):
            with self._inside(value, path):
                return self.node(value.state_dict(), path, split)
        return self._leaf(value, path, split) if self._selected(path) else LEFT_OUT

    def _per_rank(self, value: PerRank, path: str) -> Json:
        if self._own is None:
            raise UsageError(f"the PerRank at {path!r} lies within another PerRank; take the inner one off.")
        place = names.unique(path, self._own.nodes.__contains__)
        node = self._own.node(value.value, rank_path(place, self._rank), False)
        if node is LEFT_OUT:
            return LEFT_OUT
        self._own.nodes[place] = node
        self._note("r", place)
        return {"$per_rank": place}

    def check_optimizers(self) -> None:
        """Raise UsageError for an optimizer over what differs by rank, whose state would be taken for that of all."""
        assert self._own is not None, "the walk over what differs by rank has none beneath it"
        for path, parameter in self._optimized:
            name = self._own._tied.name_of(parameter)  # noqa: SLF001 - of the same class
            if name is not None and self._tied.name_of(parameter) is None:
                raise UsageError(
                    f"the optimizer at {path or 'the root'!r} is over {name!r}, which differs by rank; put the"
                    " optimizer into the same PerRank."
                )

    def _leaf(self, value: Any, path: str, split: bool) -> Json:
        scalar = values.encode_scalar(value)
        if scalar is not values.NOT_PLAIN:
            self._note("v", path)
            return scalar
        if type(value) in (set, frozenset):
            return self._set(value, path)
        if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
            return self._ndarray(value, path, split)
        return self._object(value, path)

    def _note(self, kind: str, path: str) -> None:
        self._places.append(f"{kind}\0{path}\0")

    @contextmanager
    def _inside(self, value: Any, path: str) -> Iterator[None]:
        """While the parts of ``value`` are walked over: it must not be one of them, nor the walk become endless."""
        if id(value) in self.open:
            raise UnserialisableError(f"the {type(value).__name__} at {path!r} contains itself; a state is a tree.")
        if len(self.open) == MAX_DEPTH:
            raise UnserialisableError(f"the state is more than {MAX_DEPTH} containers deep, at {path!r}.")
        self.open.add(id(value))
        try:
            yield
        finally:
            self.open.discard(id(value))

    def _dict(self, value: dict[Any, Any], path: str, split: bool) -> Json:
        if _is_state_dict(value):
            return self._join(composites.of_state_dict(value, path, split))
        pairs = [
            [values.encode_key(key, path), self.node(item, names.child_path(path, key), split)]
            for key, item in value.items()
        ]
        kept = [pair for pair in pairs if pair[1] is not LEFT_OUT]
        return LEFT_OUT if pairs and not kept else values.encode_pairs(value, kept)

    def _list(self, value: Sequence[Any], path: str, split: bool) -> Json:
        if self._selected.takes_all and all(type(item) in values.SIMPLE for item in value):
            # A history of a million numbers must not cost a million names.
            items = [values.encode_scalar(item) for item in value]
            return {"$tuple": items} if type(value) is tuple else items
        items = [self.node(item, names.child_path(path, index), split) for index, item in enumerate(value)]
        if items and all(item is LEFT_OUT for item in items):
            return LEFT_OUT
        items = [None if item is LEFT_OUT else item for item in items]  # the others keep their places
        return {"$tuple": items} if type(value) is tuple else items

    def _set(self, value: Any, path: str) -> Json:
        self._note(type(value).__name__, path)
        items = []
        for index, item in enumerate(value):
            if isinstance(item, (Tensor, PerRank)):
                kind, found = type(value).__name__, "tensors" if isinstance(item, Tensor) else "a PerRank"
                raise UnserialisableError(f"the {kind} at {path!r} holds {found}; use a list or a dict.")
            child = names.child_path(path, index)
            items.append({"$tuple": self._set(item, child)} if type(item) is tuple else self._leaf(item, child, False))
        return items if type(value) is tuple else {f"${type(value).__name__}": items}

    def _tensor(self, value: Tensor, path: str, split: bool) -> Json:
        kind = ordinary(value)
        if kind is None:
            if is_uninitialised(value):
                raise UnserialisableError(
                    f"parameter {path!r} is lazy and has no shape yet; run the module once before saving."
                )
            if layout_name(value) in SPARSE_PARTS and not value.is_quantized and not value.is_nested:
                sparse = composites.of_sparse(value, path, split)
                return sparse.join([self._tensor(*part) for part in sparse.parts])
            if not is_raw_tensor(value):
                return self._object(value, path)
            if self._own is None and is_distributed(value):
                raise UnserialisableError(
                    f"{path!r} is a {type(value).__name__} in a PerRank, though each rank has but a part of it: take it"
                    " out of the PerRank, or put only its local tensor there."
                )
        name = self._unique(path)
        first = self._tied.add(value, name, _place(value, kind))
        if first is not None:
            self.result.aliases[name] = first
            self._note("a", name)
            self._facts.append(f"{name}\0{first}\0")
            return {"$tensor": name}
        split = split or self._replicated(name)
        if kind is not None:
            leaf = of_kind(name, value, kind, split=split)
        else:
            leaf = local_tensor(name, value, split=split)
            check_data(name, value, leaf.views)
        self.result.tensors[name] = leaf
        self._note("t", name)
        self._facts.append(f"{name}\0{_layout_text(leaf.shape, leaf.dtype, leaf.split, leaf.location, leaf.boxes)}\0")
        return {"$tensor": name}

    def _unique(self, path: str) -> str:
        """``path``, or, where something else has that name ({"a": {"b": t}, "a.b": u}), a variant of it."""
        found = self.result
        if path in found.tensors or path in found.aliases or path in found.objects:
            return names.unique(path, lambda n: n in found.tensors or n in found.aliases or n in found.objects)
        return path

    def _ndarray(self, value: Any, path: str, split: bool) -> Json:
        if not value.dtype.isnative:
            return self._object(value, path)
        if not value.flags.writeable or any(stride < 0 for stride in value.strides):
            value = value.copy()  # torch warns of the one and refuses the other
        try:
            tensor = torch.from_numpy(value)
        except TypeError:  # strings, dates, structures, objects
            return self._object(value, path)
        return {"$ndarray": self._tensor(tensor, path, split)["$tensor"]}

    def _join(self, whole: Composite) -> Json:
        return whole.join([self.node(*part) for part in whole.parts])

    def _module(self, value: nn.Module | names.ModuleState, path: str) -> Json:
        whole = composites.of_module(value, path)
        self._note("m", path)
        with self._inside(names.module_of(value), path):
            return self._join(whole)

    def _optimizer(self, value: torch.optim.Optimizer | names.OptimizerState, path: str) -> Json:
        content = OptimizerContent.of(value, path, self._parameters)
        if not content.is_torch_format:
            return self.node(dict(content.state_dict), path, True)
        whole = content.composite(path, self._replicated)
        self._note("o", path)
        if self._own is None:
            return self._join(whole)
        nameless = [live for live in content.live_parameters() if id(live) not in self._parameters]
        self._optimized += [(path, parameter) for parameter in nameless]
        places = len(self._own.nodes)
        node = self._join(whole)
        if len(self._own.nodes) > places:
            raise UsageError(f"the optimizer at {path or 'the root'!r} has a PerRank in its state; keep it elsewhere.")
        return node

    def _object(self, value: Any, path: str) -> Json:
        data = pickled(value, path)
        name = self._unique(path)
        self.result.objects[name] = data
        self._note("p", name)
        return {"$object": name}


def _place(tensor: Tensor, kind: Kind | None) -> int:
    """The `address` of a tensor, of which the kind says most of what has to be asked."""
    if kind is None:
        return address(tensor)
    return tensor.data_ptr() if kind.boxes else 0


def _digest(parts: list[str]) -> str:
    return xxhash.xxh3_128_hexdigest("".join(parts).encode())


@lru_cache(maxsize=4096)
def _layout_text(shape: tuple[int, ...], dtype: str, split: bool, location: str, boxes: tuple[Box, ...]) -> str:
    return f"{shape}{dtype}{split}{location}{[(*box.offsets, *box.lengths) for box in boxes]}"


def _is_state_dict(value: dict[Any, Any]) -> bool:
    """Whether a dict is what ``Module.state_dict()`` returned: it has the modules' versions with it."""
    return (
        type(value) is OrderedDict
        and isinstance(getattr(value, "_metadata", None), dict)
        and all(type(key) is str and values.encode_scalar(key) == key for key in value)
    )
