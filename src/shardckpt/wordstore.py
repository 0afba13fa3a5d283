"""The c10d Store as `shardckpt.coordinator` needs it: values of any length, one kind of error, a clone per thread."""

import datetime
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from shardckpt.errors import RankTimeoutError

PART_BYTES: Final = 4 << 20
"""Bytes of one value. A TCPStore drops the connection, which is training's too, at a value past 8 MiB."""

_COUNT_BYTES: Final = 4
"""Bytes before a value that say in how many parts it lies."""

_clones: "weakref.WeakKeyDictionary[object, tuple[Any, Any]]" = weakref.WeakKeyDictionary()
"""By owner: a weak reference to a Store, and the clone of it that the owner's background thread uses."""


class WordStore:
    """One connection to a Store. Every method raises RankTimeoutError where the Store is gone."""

    def __init__(self, origin: Any, connection: Any, call: str) -> None:
        """``origin`` is the process group's Store, ``connection`` itself or a clone, ``call`` who asks, for errors."""
        self.origin = origin
        self._connection = connection
        self._call = call
        self._parts: dict[str, int] = {}

    def in_background(self, owner: object) -> "WordStore":
        """The same Store over the connection of ``owner``'s background thread, made once.

        Two threads that wait on one connection would wait for each other.
        """
        known = _clones.get(owner)
        if known is None or known[0]() is not self.origin:
            # The Store of an older torch has no clone; a background wait then keeps the foreground waiting.
            with self._translating():
                clone = self.origin.clone() if hasattr(self.origin, "clone") else self.origin
            known = _clones[owner] = (weakref.ref(self.origin), clone)
        return WordStore(self.origin, known[1], self._call)

    def set(self, key: str, value: bytes) -> None:
        """Set a key for which others may be waiting: parts that do not fit into one value are there before it is."""
        parts = [value[start : start + PART_BYTES] for start in range(0, len(value), PART_BYTES)] or [b""]
        for index, part in enumerate(parts[1:], 1):
            self._ask("set", _part(key, index), part)
        self._parts[key] = len(parts)
        self._ask("set", key, len(parts).to_bytes(_COUNT_BYTES, "little") + parts[0])

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""
        return self.get_all([key])[0]

    def get_all(self, keys: Sequence[str]) -> list[bytes]:
        """The values of keys that are there."""
        values = self._ask("multi_get", list(keys))
        return [self._complete(key, value) for key, value in zip(keys, values, strict=True)]

    def _complete(self, key: str, value: bytes) -> bytes:
        self._parts[key] = count = int.from_bytes(value[:_COUNT_BYTES], "little")
        others = [self._ask("get", _part(key, index)) for index in range(1, count)]
        return b"".join([value[_COUNT_BYTES:], *others])

    def has(self, *keys: str) -> bool:
        """Whether all of the keys are there."""
        return bool(self._ask("check", list(keys)))

    def wait(self, key: str, seconds: float) -> bool:
        """Wait until a key is there; whether it is in time."""
        try:
            self._connection.wait([key], datetime.timedelta(seconds=seconds))
        except RuntimeError:
            return self.has(key)
        return True

    def count(self, key: str) -> int:
        """Add one to a counter and return it; counters start at zero, and `get` cannot read them."""
        return int(self._ask("add", key, 1))

    def drop(self, key: str) -> None:
        """Remove a key that this process has set or read, if it is there."""
        for index in range(1, self._parts.pop(key, 1)):
            self._ask("delete_key", _part(key, index))
        self._ask("delete_key", key)

    def _ask(self, method: str, *arguments: Any) -> Any:
        with self._translating():
            return getattr(self._connection, method)(*arguments)

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankTimeoutError(
                f"lost contact with the process group's store during {self._call}: {error}. The process that hosts it,"
                " usually rank 0's or the launcher's, has probably died."
            ) from error


def _part(key: str, index: int) -> str:
    return f"{key}#{index}"
