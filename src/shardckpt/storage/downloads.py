"""Reading a range of an object through obstore: one request, however long, and its bytes in the order they come."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import obstore

from shardckpt.storage.retry import retrying

if TYPE_CHECKING:
    from shardckpt.storage.connection import Connection

STRETCH: Final = 32 << 20
"""Bytes asked for in one request at most: enough for the wait for the first of them to hardly count."""

CHUNK: Final = 512 << 10
"""Bytes that the client gathers before it gives them out, at least. They are in the processor's cache then, and in
memory that is used again: what is larger is new memory each time, to touch which takes as long as to receive it. Tried,
page faults for each MiB read: 2 with this, 20 with twice as much, 70 with a range of 8 MiB in one piece."""


class _Place(Protocol):
    """What a download needs of the storage it is from; see `shardckpt.storage.objects`."""

    connection: "Connection"

    def key_of(self, name: str) -> str: ...

    def translating(self, doing: str, name: str = "") -> AbstractContextManager[None]: ...

    def size(self, name: str) -> int: ...


class Download:
    """Returns bytes of an object up to ``stop``, from the offset it is called with on; none where the object ends.

    An answer that breaks off is asked for again from there on. For one thread.
    """

    def __init__(self, storage: _Place, name: str, stop: int) -> None:
        self._storage = storage
        self._name = name
        self._key = storage.key_of(name)
        self._stop = stop
        self._answer: Iterator[bytes] | None = None
        self._at = 0

    def __call__(self, at: int) -> bytes:
        with self._storage.translating("read", self._name):
            return retrying(partial(self._next, at))

    def _next(self, at: int) -> bytes:
        if self._answer is None or at != self._at:
            self._answer = self._ask(at)
        try:
            data = next(self._answer, b"")
        except Exception:
            self._answer = None
            raise
        self._at = at + len(data)
        return data

    def _ask(self, at: int) -> Iterator[bytes]:
        try:
            found = obstore.get(self._storage.connection.store, self._key, options={"range": (at, self._stop)})
        except FileNotFoundError:
            raise
        except Exception:
            # A range that starts at or beyond the end is an error to every store.
            if at < self._storage.size(self._name):
                raise
            return iter(())
        return iter(found.stream(min_chunk_size=CHUNK))
