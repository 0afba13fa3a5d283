"""Dicts whose tensors are read when somebody looks at them.

Lightning loads in two phases: it takes a dict from the strategy, shows it to the hooks, and later hands it back to have
the model and the optimizers restored from it. A `LazyDict` stands in it for a large part of the checkpoint. If no hook
has touched it by the second phase, the part is read straight into the live tensors and never exists twice; if one has,
it was a plain dict from then on.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any

from shardckpt.state.skeleton import MAX_DEPTH


class LazyDict(dict[Any, Any]):
    """A dict that fills itself, once, when its contents are asked for.

    It is a real dict, since hooks check for one. Every method that shows or changes contents is overridden; CPython's
    shortcuts for dicts (``dict(x)``, ``{**x}``) respect that as long as ``__iter__`` is among them.
    """

    _read: Callable[[], Mapping[Any, Any]] | None = None

    def read_with(self, read: Callable[[], Mapping[Any, Any]]) -> None:
        """Let the contents be what ``read`` returns; it is called at most once, when somebody asks."""
        self._read = read

    @property
    def is_untouched(self) -> bool:
        """Whether nobody has looked at the contents yet."""
        return self._read is not None

    def _fill(self) -> None:
        if self._read is not None:
            contents = self._read()
            self._read = None
            dict.update(self, contents)
            if hasattr(contents, "_metadata"):
                self._metadata = contents._metadata

    def __getattr__(self, name: str) -> Any:
        # `Module.load_state_dict` asks for the modules' versions before it looks at the tensors.
        if name != "_metadata" or not self.is_untouched:
            raise AttributeError(name)
        self._fill()
        return getattr(self, name)

    def __getitem__(self, key: Any) -> Any:
        self._fill()
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._fill()
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self._fill()
        super().__delitem__(key)

    def __iter__(self) -> Iterator[Any]:
        self._fill()
        return super().__iter__()

    def __reversed__(self) -> Iterator[Any]:
        self._fill()
        return super().__reversed__()

    def __len__(self) -> int:
        self._fill()
        return super().__len__()

    def __contains__(self, key: object) -> bool:
        self._fill()
        return super().__contains__(key)

    def __eq__(self, other: object) -> bool:
        self._fill()
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        self._fill()
        return super().__ne__(other)

    __hash__ = None

    def __or__(self, other: Any) -> Any:
        self._fill()
        return super().__or__(other)

    def __ror__(self, other: Any) -> Any:
        self._fill()
        return super().__ror__(other)

    def __ior__(self, other: Any) -> Any:
        self._fill()
        return super().__ior__(other)

    def __repr__(self) -> str:
        # A log line or a debugger must not read gigabytes.
        return "LazyDict(<not read yet>)" if self.is_untouched else super().__repr__()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Copies and pickles are plain dicts: they hold contents, not the way to get them.
        # Made empty and filled afterwards, which is the form that torch.load takes with weights_only.
        plain = self.copy()
        return (OrderedDict, (), vars(plain) if hasattr(plain, "_metadata") else None, None, iter(plain.items()))

    def __copy__(self) -> dict[Any, Any]:
        return self.copy()

    def keys(self) -> Any:
        self._fill()
        return super().keys()

    def values(self) -> Any:
        self._fill()
        return super().values()

    def items(self) -> Any:
        self._fill()
        return super().items()

    def get(self, key: Any, default: Any = None) -> Any:
        self._fill()
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        self._fill()
        return super().pop(key, *default)

    def popitem(self) -> Any:
        self._fill()
        return super().popitem()

    def setdefault(self, key: Any, default: Any = None) -> Any:
        self._fill()
        return super().setdefault(key, default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._fill()
        super().update(*args, **kwargs)

    def copy(self) -> dict[Any, Any]:
        self._fill()
        if "_metadata" not in vars(self):
            return dict(self)
        plain: dict[Any, Any] = OrderedDict(self)
        plain._metadata = self._metadata  # type: ignore[attr-defined]
        return plain

    def clear(self) -> None:
        self._read = None
        super().clear()


def plain(value: Any, depth: int = 0) -> Any:
    """``value`` with a plain dict in the place of every `LazyDict` in it; what holds none is itself."""
    if isinstance(value, LazyDict):
        value = value.copy()
    if depth > MAX_DEPTH:  # the engine refuses what goes deeper, or contains itself, and says so
        return value
    if type(value) in (dict, OrderedDict):
        items = {key: plain(item, depth + 1) for key, item in value.items()}
        if any(items[key] is not item for key, item in value.items()):
            value = copy(value)
            value.update(items)
    elif type(value) in (list, tuple):
        elements = [plain(item, depth + 1) for item in value]
        if any(new is not old for new, old in zip(elements, value, strict=True)):
            return type(value)(elements)
    return value
