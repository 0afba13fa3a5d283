"""A bar on the terminal for what takes long, where somebody is looking."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

AFTER_SECONDS: Final = 3.0
"""What is over by then needs no bar."""


class Bar:
    """Appears once something has gone on for `AFTER_SECONDS`. One thread at a time may call it."""

    def __init__(self, what: str, bars: Any) -> None:
        self.total = 0
        """Bytes; 0 while they are not known."""
        self._what = what
        self._bars = bars
        self._task: Any = None
        self._done = 0
        self._begun = time.monotonic()

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._task is None:
            if time.monotonic() - self._begun < AFTER_SECONDS:
                return
            self._bars.start()
            self._task = self._bars.add_task(self._what, total=None)
        # What alignment adds is read too, and is no part of the total.
        self._bars.update(self._task, completed=min(self._done, self.total or self._done), total=self.total or None)


@contextmanager
def bar(what: str, *, wanted: bool) -> Iterator[Bar | None]:
    """A bar for what is enclosed, on standard error; None where that is no terminal, or rich is not installed."""
    bars = _bars() if wanted and sys.stderr is not None and sys.stderr.isatty() else None
    if bars is None:
        yield None
        return
    try:
        yield Bar(what, bars)
    finally:
        bars.stop()


def _bars() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    except ImportError:  # it comes with the command line
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
