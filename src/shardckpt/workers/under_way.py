"""Calls of local storage that have not returned: a hung network file system answers with nothing at all.

No call into the kernel can be taken back. Whoever has waited long enough goes on without the thread that made it, and
leaves it the memory that the call may still read or write.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

READ_SECONDS: Final = 600.0
"""After so long a read, which is of some megabytes, counts as one that never returns."""

READS: Final = frozenset({"read", "look at", "list"})
"""What is done to read, as calls say it."""


class Call(NamedTuple):
    """One call that is under way."""

    what: str
    """As in "the call to ... the file": read, write, sync."""
    path: str
    since: float
    """By the monotonic clock, in seconds."""
    error: type[Exception]
    """What whoever waits for it in vain raises."""

    @property
    def seconds(self) -> float:
        """For how long it has been under way."""
        return time.monotonic() - self.since

    def __str__(self) -> str:
        return f"the call to {self.what} {self.path} has not returned for {self.seconds:.0f} s"


_calls: dict[int, Call] = {}
"""By thread: the innermost call of each."""


@contextmanager
def call(what: str, path: str, error: type[Exception]) -> Iterator[None]:
    """Enclose what asks the kernel to do something with one file; see `Call`."""
    thread = threading.get_ident()
    outer = _calls.get(thread)
    _calls[thread] = Call(what, path, time.monotonic(), error)
    try:
        yield
    finally:
        if outer is None:
            del _calls[thread]
        else:
            _calls[thread] = outer


def longest(place: str, since: float) -> Call | None:
    """Of the calls on a directory, or below it, begun ``since`` then, the one that has been under way for longest."""
    below = place.rstrip("/") + "/"
    calls = [one for one in list(_calls.values()) if one.since >= since]
    found = [one for one in calls if one.path == place or one.path.startswith(below)]
    return min(found, key=lambda one: one.since, default=None)


def check_reads(threads: list[threading.Thread]) -> None:
    """Raise the error of its call where one of the threads has been reading for so long that it counts as stuck."""
    for thread in threads:
        found = _calls.get(thread.ident or 0)
        if found is not None and found.what in READS and found.seconds >= READ_SECONDS:
            raise found.error(
                f"{found}. The file system does not answer; what was to be read may still change. Look after it, then"
                " load again, best in a new process."
            )
