"""Trying again: the one helper for requests that are safe to repeat."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from shardckpt.storage.translate import is_transient

_T = TypeVar("_T")

ATTEMPTS = 4
FIRST_PAUSE = 0.25
"""Seconds before the second attempt, doubled before each further one and scattered by half."""


def retrying(request: Callable[[], _T]) -> _T:
    """Return what ``request`` returns, trying again a few times while it fails in a way that may pass.

    This comes on top of what the backend's client does. ``request`` must be safe to repeat: a read, or a write that
    leaves the same bytes. The last error is raised as it is, for :mod:`shardckpt.storage.translate`.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return request()
        except Exception as error:
            if not is_transient(error):
                raise
        # Scattered, lest all ranks that were turned away together come back together.
        time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    return request()
