"""What all objects share that a process moves over a network at the same time: the number of requests with a body."""

import threading
from collections.abc import Callable
from typing import Any, Final

from shardckpt.errors import CorruptCheckpointError
from shardckpt.workers import for_each

WIDTH: Final = 8
"""Requests with a body that this process has under way at once, up and down, whatever the number of objects."""

READ_PIECE: Final = 16 << 20
"""Bytes asked for in one ranged read at most; the client returns a buffer of its own, which is copied into place."""

SLOTS: Final = threading.BoundedSemaphore(WIDTH)
"""One for each of these requests: they bound the memory that clients hold."""


def fill(url: str, offset: int, into: memoryview, read: Callable[[int, int], Any]) -> None:
    """Fill ``into`` with an object's bytes from ``offset`` on, in pieces side by side.

    ``read`` returns so many bytes from an offset on, and fewer where the object ends before. Raises
    CorruptCheckpointError where it does; ``url`` is the object's, for that.
    """

    def piece(start: int) -> None:
        part = into[start : start + READ_PIECE]
        with SLOTS:
            data = read(offset + start, len(part))
            if len(data) == len(part):
                part[:] = memoryview(data)
                return
        raise CorruptCheckpointError(
            f"{url} is too short: of the {len(part)} bytes from {offset + start} on only {len(data)} are there"
        )

    for_each(range(0, len(into), READ_PIECE), piece, threads=WIDTH, name="range")
