"""What all objects share that a process moves over a network at the same time: the number of requests with a body."""

import threading
from typing import Final

WIDTH: Final = 8
"""Requests with a body that this process has under way at once, up and down, whatever the number of objects."""

MAX_PARTS: Final = 10_000
"""Parts of one upload, by the rules of S3."""

READ_PIECE: Final = 16 << 20
"""Bytes asked for in one ranged read at most; the client returns a buffer of its own, which is copied into place."""

SLOTS: Final = threading.BoundedSemaphore(WIDTH)
"""One for each of these requests: they bound the memory that clients hold."""
