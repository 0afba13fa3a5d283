"""The points at which a process may be killed: calls that change or read a file, tell ranks, or hand on a block.

They are counted by number, from outside: what a checkpoint library calls is wrapped here, in this process, and the
library knows nothing of it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from shardckpt import wordstore
from shardckpt.storage import posix
from shardckpt.writer import ShardWriter

FILE_CALLS: Final = (
    *("open", "mkdir", "pwrite", "preadv", "fsync", "ftruncate", "link", "replace", "unlink", "rmdir", "scandir"),
)
STORE_CALLS: Final = ("set", "multi_get", "delete_key", "add")
"""Not what asks again and again, since its number differs from run to run."""


class Points:
    """Numbers the points of this process from 1, while `counting`, and kills it right before one of them.

    ``everybody``: its whole process group goes with it. Where the point is a write, half of it is done before.
    """

    def __init__(self, kill_at: int | None, *, everybody: bool) -> None:
        self.seen: list[str] = []
        self._kill_at = kill_at
        self._everybody = everybody
        self._counting = False
        self._lock = threading.Lock()

    @contextmanager
    def counting(self) -> Iterator[None]:
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def install(self) -> None:
        for name in FILE_CALLS:
            setattr(os, name, self._around(f"os.{name}", getattr(os, name)))
        posix.preallocate = self._around("fallocate", posix.preallocate)
        ShardWriter.emit = self._around("emit", ShardWriter.emit)  # type: ignore[method-assign]
        ask = wordstore.WordStore._ask
        asked = {name: self._around(f"store.{name}", ask) for name in STORE_CALLS}

        def asking(store: Any, method: str, *arguments: Any) -> Any:
            return asked.get(method, ask)(store, method, *arguments)

        wordstore.WordStore._ask = asking  # type: ignore[method-assign]

    def _around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            if self._counting and self._is_here(name):
                if name == "os.pwrite":
                    descriptor, data, offset = arguments
                    call(descriptor, data[: len(data) // 2 // posix.PAGE * posix.PAGE], offset)
                self._die()
            return call(*arguments, **options)

        return called

    def _is_here(self, name: str) -> bool:
        with self._lock:
            self.seen.append(name)
            return len(self.seen) == self._kill_at

    def _die(self) -> None:
        if self._everybody:
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # a signal to oneself may take a moment
