"""A part of a state, under other names and in another dtype. Nested containers in, nested containers out."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from shardckpt.errors import TensorNotFoundError, UsageError
from shardckpt.state.names import child_path
from shardckpt.state.selection import Selection

Empty = Callable[[Sequence[int], torch.dtype], Tensor]
"""Makes room for a tensor of a shape and a dtype."""

LEFT_OUT: Final = object()
"""In place of what is not wanted."""


@dataclass(frozen=True)
class Wanted:
    """What of a state is to be converted, and how."""

    prefix: str
    """The place that is taken for the whole; empty for the root."""
    selection: Selection
    """By places below it."""
    renames: Sequence[tuple[re.Pattern[str], str]]
    """Applied one after the other to the keys of dicts that hold tensors."""
    dtype: torch.dtype | None
    """Of floating-point tensors that have a dimension: numbers by themselves count steps, and lose them in few bits."""


def select(state: Any, wanted: Wanted, empty: Empty) -> Any:
    """What is wanted of a ``state`` that lies at the prefix. Tensors that are one stay one; those of another dtype get
    room from ``empty``.

    Raises UsageError where nothing is left, or two keys of a dict become one.
    """
    found = _Selecting(wanted, empty).taken(state, "")
    if found is LEFT_OUT:
        raise UsageError("include and exclude leave nothing of it. Nothing was changed.")
    return found


def at(state: Any, prefix: str) -> Any:
    """The value whose place is ``prefix``; keys may have dots in them, so the longest that fits is tried first.

    Text that begins the keys of a dict is a place too: of ``"encoder.weight"`` and ``"head.weight"``, ``"encoder"``
    leaves ``"weight"``. Raises TensorNotFoundError where there is no such place.
    """
    if not prefix:
        return state
    if isinstance(state, Mapping):
        keys = {str(key): key for key in state}
        parts = prefix.split(".")
        for count in range(len(parts), 0, -1):
            name = ".".join(parts[:count])
            if name in keys:
                return at(state[keys[name]], ".".join(parts[count:]))
        cut = {name[len(prefix) + 1 :]: state[key] for name, key in keys.items() if name.startswith(f"{prefix}.")}
        if cut:
            return cut
        known = ", ".join(map(repr, list(keys)[:8]))
        raise TensorNotFoundError(f"there is nothing at {prefix!r}; there are {known}. Nothing was changed.")
    first, _, rest = prefix.partition(".")
    if isinstance(state, (list, tuple)) and first.isdecimal() and int(first) < len(state):
        return at(state[int(first)], rest)
    raise TensorNotFoundError(f"there is nothing at {prefix!r}. Nothing was changed.")


class _Selecting:
    def __init__(self, wanted: Wanted, empty: Empty) -> None:
        self._wanted = wanted
        self._empty = empty
        self._cast: dict[Any, Tensor] = {}

    def taken(self, value: Any, path: str) -> Any:
        """What is to be kept of a value, or `LEFT_OUT`."""
        if isinstance(value, Mapping) and value:
            return self._dict(value, path)
        if type(value) in (list, tuple) and value:
            kept = [self.taken(item, child_path(path, index)) for index, item in enumerate(value)]
            kept = [item for item in kept if item is not LEFT_OUT]
            return type(value)(kept) if kept else LEFT_OUT
        if value is LEFT_OUT or not self._wanted.selection(path):
            return LEFT_OUT
        return self._converted(value) if isinstance(value, Tensor) else value

    def _dict(self, value: Mapping[Any, Any], path: str) -> Any:
        holds_tensors = any(isinstance(item, Tensor) for item in value.values())
        kept: dict[Any, Any] = {}
        for key, item in value.items():
            found = self.taken(item, child_path(path, key))
            if found is LEFT_OUT:
                continue
            name = self._renamed(key) if holds_tensors else key
            if name in kept:
                raise UsageError(f"two names at {path or 'the root'!r} become {name!r}. Nothing was changed.")
            kept[name] = found
        return kept or LEFT_OUT

    def _renamed(self, key: Any) -> Any:
        if isinstance(key, str):
            for pattern, replacement in self._wanted.renames:
                key = pattern.sub(replacement, key)
        return key

    def _converted(self, tensor: Tensor) -> Tensor:
        dtype = self._wanted.dtype
        if dtype is None or tensor.dtype == dtype or not tensor.is_floating_point() or not tensor.ndim:
            return tensor
        if tensor.layout is not torch.strided:
            return tensor.to(dtype)
        same = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if same not in self._cast:
            self._cast[same] = self._empty(tensor.shape, dtype).copy_(tensor)
        return self._cast[same]


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts, lists and tuples, with their dotted names."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_of(item, child_path(path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_of(item, child_path(path, index))


def others_of(value: Any, path: str = "") -> Iterator[str]:
    """The places of everything else in them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from others_of(item, child_path(path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from others_of(item, child_path(path, index))
    elif not isinstance(value, Tensor):
        yield path
