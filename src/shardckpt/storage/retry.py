"""Trying again: the one helper for requests that are safe to repeat."""

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from shardckpt.storage.translate import count_attempts, is_transient

_T = TypeVar("_T")

ATTEMPTS: Final = 8
DEADLINE: Final = 180.0
"""Seconds after which a request is not tried again, however few attempts it has had."""
FIRST_PAUSE = 0.25
"""Seconds before the second attempt, doubled before each further one and scattered by half."""
LONGEST_PAUSE: Final = 10.0
"""Seconds."""


def retrying(request: Callable[[], _T]) -> _T:
    """Return what ``request`` returns, trying again while it fails in a way that may pass, until `DEADLINE`.

    This comes on top of what the backend's client does. ``request`` must be safe to repeat: a read, or a write that
    leaves the same bytes. The last error is raised as it is, for :mod:`shardckpt.storage.translate`, which says how
    often the request was made.
    """
    deadline = time.monotonic() + DEADLINE
    attempt = 0
    while True:
        attempt += 1
        try:
            return request()
        except Exception as error:
            # Scattered, lest all ranks that were turned away together come back together.
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
            if attempt == ATTEMPTS or not is_transient(error) or time.monotonic() + pause > deadline:
                count_attempts(error, attempt)
                raise
        time.sleep(pause)
