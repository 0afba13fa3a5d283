"""What all objects share that a process moves over a network at the same time: the number of requests with a body."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from shardckpt.errors import CorruptCheckpointError
from shardckpt.storage.base import Read, octets
from shardckpt.workers import for_each

WIDTH: Final = 8
"""Requests with a body that this process has under way at once, up and down, whatever the number of objects."""

SLOTS: Final = threading.BoundedSemaphore(WIDTH)
"""One for each of these requests: they bound the memory that clients hold."""


@contextmanager
def incoming(url: str, more: Callable[[int], bytes]) -> Iterator[Read]:
    """Read an object from front to back, while no more than `WIDTH` requests are under way; see `Storage.stream`.

    ``more`` returns some bytes from an offset on, and none where the object ends. Mostly it is asked for those that
    follow what it gave last. ``url`` is the object's, for messages.
    """
    with SLOTS:
        yield _Incoming(url, more).read_into


def fill(offset: int, into: memoryview, most: int, stream: Callable[[int, int], AbstractContextManager[Read]]) -> None:
    """Fill ``into`` with an object's bytes from ``offset`` on, by ranges of up to ``most`` bytes side by side.

    ``stream`` begins to read the bytes from one offset to another. Raises CorruptCheckpointError where the object ends
    before.
    """

    def piece(start: int) -> None:
        part = into[start : start + most]
        with stream(offset + start, offset + start + len(part)) as read:
            read(offset + start, part)

    into = octets(into)
    for_each(range(0, len(into), most), piece, threads=WIDTH, name="range")


class _Incoming:
    def __init__(self, url: str, more: Callable[[int], bytes]) -> None:
        self._url = url
        self._more = more
        # What came last, and where in the object it starts.
        self._bytes = b""
        self._start = 0

    def read_into(self, offset: int, into: memoryview) -> None:
        into = octets(into)
        done = 0
        while done < len(into):
            done += self._copy(offset + done, into[done:])
            if done < len(into) and not self._advance(offset + done):
                raise CorruptCheckpointError(
                    f"{self._url} is too short: of the {len(into)} bytes from {offset} on only {done} are there"
                )

    def _copy(self, at: int, into: memoryview) -> int:
        """Copy what is here of the bytes from ``at`` on."""
        skip = at - self._start
        size = min(len(into), len(self._bytes) - skip)
        if skip < 0 or size <= 0:
            return 0
        # Not by the slice, which would hold the interpreter: training may be waiting for it.
        source = ctypes.cast(ctypes.c_char_p(self._bytes), ctypes.c_void_p).value or 0
        ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(into)), source + skip, size)
        return size

    def _advance(self, at: int) -> bool:
        """Get the bytes that come next, or where those at ``at`` are behind, these; False at the end of the object."""
        end = self._start + len(self._bytes)
        self._start = end if self._bytes and end <= at else at
        self._bytes = b""  # before more come, which then may have its memory
        self._bytes = self._more(self._start)
        return bool(self._bytes)
