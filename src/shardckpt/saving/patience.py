"""How long a save waits for its own storage: a hung file system must not keep a job, or its end, waiting for ever."""

import threading
import time
from collections.abc import Callable
from typing import Final, NoReturn, TypeVar

from shardckpt.errors import StorageError
from shardckpt.storage import Storage
from shardckpt.workers import Aside, under_way

T = TypeVar("T")

SHARE: Final = 0.9
"""Of ``commit_timeout``: a rank that is stuck says so before the others give it up."""
TIDYING: Final = 0.1
"""Of the same: what is only for tidiness is worth less time."""
_LOOK_SECONDS: Final = 2.0


class Patience:
    """Waits for what is done with one storage for as long as its calls return, however much there is to do."""

    def __init__(self, storage: Storage, commit_timeout: float) -> None:
        self._place = storage.url
        self._timeout = commit_timeout
        self._lock = threading.Lock()
        self.given_up: StorageError | None = None
        """What it is given up for. Whoever wakes up after that has missed the end of the save."""
        self._is_settling = False

    def wait_for(self, do: Callable[[], T], name: str, *, late: Callable[[], None] | None = None) -> T:
        """What ``do`` returns, called in a thread of its own.

        Raises StorageError where a call has not returned for `SHARE` of the timeout, and leaves the thread behind; once
        that has done what it was stuck in, it calls ``late``.
        """
        return self._wait_for(do, name, SHARE * self._timeout, late)

    def tidy(self, do: Callable[[], None], name: str) -> bool:
        """Call ``do``, which raises nothing, and wait for it, but not for long; tells whether it is done."""
        try:
            self._wait_for(do, name, TIDYING * self._timeout, None)
        except StorageError as error:
            if error is not self.given_up:
                raise
            return False
        return True

    def check(self) -> None:
        """Raise the StorageError of this save if it has been given up."""
        if self.given_up is not None:
            raise self.given_up

    def settle(self) -> None:
        """What cannot be taken back begins. Raises the StorageError of this save if it has been given up."""
        with self._lock:
            self.check()
            self._is_settling = True

    @property
    def may_yet_settle(self) -> bool:
        """Whether it was given up too late: what cannot be taken back may be done whenever the call returns."""
        return self._is_settling and self.given_up is not None

    def _wait_for(self, do: Callable[[], T], name: str, seconds: float, late: Callable[[], None] | None) -> T:
        is_done = is_left = False

        def run() -> T:
            nonlocal is_done
            try:
                return do()
            finally:
                with self._lock:
                    is_done = True
                    has_to_tidy = is_left
                if has_to_tidy and late is not None:
                    late()

        began = time.monotonic()
        aside = Aside(run, name)
        left = seconds
        try:
            while not aside.wait(min(_LOOK_SECONDS, seconds / 4, left)):
                call = under_way.longest(self._place, began)
                left = seconds - call.seconds if call is not None else seconds
                if call is not None and left <= 0:
                    self._give_up(call)
        except BaseException:  # an interrupt, too: nobody wants any more what the thread is about
            with self._lock:
                is_left = True
                has_to_tidy = is_done
            if has_to_tidy and late is not None:
                late()
            raise
        return aside.outcome()

    def _give_up(self, call: under_way.Call) -> NoReturn:
        with self._lock:
            self.given_up = self.given_up or StorageError(
                f"{call}. The file system does not answer. Look after it; what waits for it keeps its memory."
            )
            raise self.given_up
