"""Trying again: the one helper for requests that are safe to repeat."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from shardckpt.storage.translate import count_attempts, is_transient

log = logging.getLogger(__name__)

_T = TypeVar("_T")

ATTEMPTS: Final = 8
DEADLINE: Final = 180.0
"""Seconds after which a request is not tried again, however few attempts it has had."""
FIRST_PAUSE = 0.25
"""Seconds before the second attempt, doubled before each further one and scattered by half."""
LONGEST_PAUSE: Final = 10.0
"""Seconds."""


_lock = threading.Lock()
_made = 0


def retries() -> int:
    """How many requests this process has made again so far."""
    return _made


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
            # By its class alone: what it says may have credentials in it.
            log.info("a request to the storage failed (%s), and is made again in %.1f s", type(error).__name__, pause)
        global _made
        with _lock:
            _made += 1
        time.sleep(pause)
