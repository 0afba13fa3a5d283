"""The operation of several ranks: words that are keys of the c10d Store."""

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from shardckpt import errors
from shardckpt.background import at_end
from shardckpt.errors import ConflictingStateError, RankTimeoutError, ShardckptError
from shardckpt.wordstore import WordStore

log = logging.getLogger(__name__)

_GRACE_SECONDS: Final = 20.0
"""How much longer the other ranks wait than rank 0, so that they hear from it who was missing."""

_FIRST: Final = "first"
"""The point at which the ranks meet first, whatever they call it: those that make different calls meet there too."""
_LEFT: Final = "left"
"""In place of a point and who spoke there: a rank has left the operation, whatever point the others come to."""

_PATIENT_SECONDS: Final = 5.0
"""How long a rank waits at most without hearing of an interrupt."""
_PAUSE_SECONDS: Final = 0.5
_PAUSE_SHARE: Final = 0.05
_LONGEST_BACKGROUND_PAUSE_SECONDS: Final = 2.0
"""How long a rank that waits in the background pauses before it asks again: a share of what it has waited so far."""

_FIRST_PAUSE_SECONDS: Final = 0.0002
_LONGEST_PAUSE_SECONDS: Final = 0.05


class _Word(msgspec.Struct, array_like=True):
    """What one rank says at one point of an operation."""

    call: str
    rank: int
    payload: bytes = b""
    error: str | None = None
    message: str = ""
    silent: tuple[int, ...] = ()
    """Ranks that were not waited for any longer."""


_WORD: Final = msgspec.msgpack.Decoder(_Word)
_WORDS: Final = msgspec.msgpack.Decoder(list[bytes])
_UNHEARD: Final = 8
_unheard: "weakref.WeakKeyDictionary[Any, deque[str]]" = weakref.WeakKeyDictionary()
"""By Store, the last keys for all others that rank 0 has set, and which whoever hears of it last removes."""


def _linger() -> None:
    """Rank 0, at the end of its process, with which the Store may end: give the others a few seconds to hear it."""
    deadline = time.monotonic() + _PATIENT_SECONDS
    for store, keys in list(_unheard.items()):
        with suppress(RuntimeError):
            while any(store.check([key]) for key in keys) and time.monotonic() < deadline:
                time.sleep(_LONGEST_PAUSE_SECONDS)


at_end(_linger)
# A forked child, of a DataLoader say, has the parent's connections, and must not speak on them.
os.register_at_fork(after_in_child=_unheard.clear)

_counters: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()
"""Operations begun so far, by the Store they go through: a new process group counts from zero again."""


def next_number(store: Any) -> int:
    number = _counters.get(store, 0)
    _counters[store] = number + 1
    return number


class StoreOperation:
    """Words are keys of the Store: ``<number>/<point>/<rank>``, and ``.../all`` for what rank 0 announces.

    Each rank removes its own key once rank 0 has answered, and the last to hear an answer removes that, so the Store
    does not grow with the number of saves.
    """

    def __init__(self, store: WordStore, number: int, call: str, rank: int, world_size: int, timeout: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.verdict: Exception | None = None
        self._store = store
        self._number = number
        self._call = call
        self._timeout = timeout
        self._joined = False

    def in_background(self, owner: object) -> "StoreOperation":
        return StoreOperation(
            self._store.in_background(owner), self._number, self._call, self.rank, self.world_size, self._timeout
        )

    def agree(self, point: str, word: bytes | Exception, timeout: float | None = None) -> list[bytes]:
        seconds = self._timeout if timeout is None else timeout
        is_first, point = not self._joined, self._meeting(point)
        self._joined = True
        if is_first:
            self._catch_up(point)
        self.post(point, word)
        try:
            if self.rank != 0:
                return _WORDS.decode(self.hear(point, seconds, give_back=is_first))
            try:
                words = self.collect(point, seconds)
            except ShardckptError as error:
                self.announce(point, error)
                raise
            self.announce(point, msgspec.msgpack.encode(words))
            return words
        except ShardckptError as error:
            self.verdict = error
            if not isinstance(word, Exception):
                raise
            if type(word).__name__ == (error.told_as or type(error).__name__):
                # This rank has the error itself, with its traceback.
                raise word from word.__cause__
            # Another came before, by whose kind the others decide how to go on, and so does this rank.
            raise error from word

    def fail(self, point: str, error: Exception) -> None:
        point = self._meeting(point)
        self.post(point, error)
        if self.rank == 0:
            self.announce(point, error)

    def _meeting(self, point: str) -> str:
        return point if self._joined else _FIRST

    def leave(self, error: Exception) -> None:
        self._tell(self._key(_LEFT), error)

    def post(self, point: str, word: bytes | Exception) -> None:
        said = self._encoded(word)
        if isinstance(word, Exception):
            # Rank 0 need not wait for the others to know how this ends.
            self._store.set(self._key(point, "failed"), said)
        self._store.set(self._key(point, self.rank), said)

    def announce(self, point: str, word: bytes | Exception) -> None:
        self._tell(self._key(point, "all"), word)
        self._store.drop(self._key(point, self.rank))

    def _tell(self, key: str, word: bytes | Exception) -> None:
        if self.rank == 0:
            _unheard.setdefault(self._store.origin, deque(maxlen=_UNHEARD)).append(key)
        self._store.set(key, self._encoded(word))

    def see_off(self, point: str) -> None:
        deadline = time.monotonic() + _PATIENT_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        # Whoever hears it last removes it.
        while self._store.has(self._key(point, "all")) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(1.25 * pause, _LONGEST_PAUSE_SECONDS)

    def collect(self, point: str, timeout: float) -> list[bytes]:
        keys = [self._key(point, rank) for rank in range(self.world_size)]
        failed = self._key(point, "failed")
        deadline = time.monotonic() + timeout
        pause = _FIRST_PAUSE_SECONDS
        # Asking again and again, by one rank, lets a failure end the wait; `Store.wait` can only wait for all keys.
        while not self._store.has(*keys):
            self.listen(point)
            if time.monotonic() > deadline:
                silent = tuple(rank for rank, key in enumerate(keys) if not self._store.has(key))
                raise self._timed_out(silent, point, timeout)
            time.sleep(pause)
            pause = min(1.25 * pause, _LONGEST_PAUSE_SECONDS)
        words = [_WORD.decode(value) for value in self._store.get_all(keys)]
        self._check_calls([word.call for word in words])
        for word in words:
            if word.error is not None:
                self._store.drop(failed)
                raise _error_from(word)
        return [word.payload for word in words]

    def listen(self, point: str) -> None:
        if self._store.has(failed := self._key(point, "failed")):
            word = self._get(failed)
            if self.rank == 0:
                self._store.drop(failed)
            raise _error_from(word)
        self._check_left()

    def _check_left(self) -> None:
        if self._store.has(left := self._key(_LEFT)):
            word = self._get(left)
            if word.rank == 0:
                self._mark_heard(left)
            raise _error_from(word)

    def roll_call(self, listen: Callable[[], None]) -> list[int]:
        self._store.set(self._key("roll", self.rank), b"")
        deadline = time.monotonic() + _PATIENT_SECONDS
        keys = [self._key("roll", rank) for rank in range(self.world_size)]
        while not self._store.has(*keys) and time.monotonic() < deadline:
            listen()
            time.sleep(_LONGEST_PAUSE_SECONDS)
        return [rank for rank, key in enumerate(keys) if not self._store.has(key)]

    def hear(self, point: str, timeout: float, *, give_back: bool = False) -> bytes:
        """See `Operation`. ``give_back``: if rank 0 stays silent, this rank has not made the call either."""
        key = self._key(point, "all")
        if not self._wait(key, timeout + _GRACE_SECONDS):
            if give_back:
                self._store.drop(self._key(point, self.rank))
                if _counters.get(self._store.origin) == self._number + 1:
                    _counters[self._store.origin] = self._number
            raise self._timed_out((0,), point, timeout + _GRACE_SECONDS)
        word = self._get(key)
        with suppress(RankTimeoutError):  # it is heard, and rank 0, which may host the Store, is free to end
            self._store.drop(self._key(point, self.rank))
            if word.error is not None:
                self._store.drop(self._key(point, "failed"))  # said too late for rank 0 to see
            self._mark_heard(key)
        if word.error is not None:
            raise _error_from(word, announced=True)
        return word.payload

    def _wait(self, key: str, seconds: float) -> bool:
        """Wait until a key is there, or raise what a rank has left of; whether it is in time."""
        # An interrupt does not end the Store's own wait, nor does it hear of a rank that has left; asking again and
        # again would be slow at first, and is a burden only for as long as nothing else goes on.
        is_background = threading.current_thread() is not threading.main_thread()
        started = time.monotonic()
        if not is_background and self._store.wait(key, min(seconds, _PATIENT_SECONDS)):
            return True
        while not self._store.has(key):
            self._check_left()
            waited = time.monotonic() - started
            if waited > seconds:
                return False
            pause = min(max(_FIRST_PAUSE_SECONDS, _PAUSE_SHARE * waited), _LONGEST_BACKGROUND_PAUSE_SECONDS)
            time.sleep(pause if is_background else _PAUSE_SECONDS)
        return True

    def _catch_up(self, point: str) -> None:
        """Skip operations in which rank 0 gave this rank up: it has not made a call that the others made.

        It would never be in step with them again otherwise.
        """
        while self.rank != 0 and self._store.has(key := self._key(point, "all")):
            word = self._get(key)
            if self.rank not in word.silent:
                return
            log.warning("rank %d goes on without a call that it has missed: %s", self.rank, word.message)
            self._mark_heard(key)
            self._number = next_number(self._store.origin)

    def _mark_heard(self, key: str) -> None:
        if self._store.count(key + "/heard") == self.world_size - 1:
            self._store.drop(key + "/heard")
            self._store.drop(key)  # last: it is what rank 0 waits for before it ends

    def _key(self, *where: int | str) -> str:
        return "/".join(["shardckpt", str(self._number), *map(str, where)])

    def _get(self, key: str) -> _Word:
        return _WORD.decode(self._store.get(key))

    def _encoded(self, word: bytes | Exception) -> bytes:
        if not isinstance(word, Exception):
            return msgspec.msgpack.encode(_Word(self._call, self.rank, word))
        silent = word.ranks if isinstance(word, RankTimeoutError) else ()
        # Names of files need not be text, and what is none cannot be sent.
        message = (str(word) or repr(word)).encode(errors="backslashreplace").decode()
        # Rank 0 announces what others met.
        met_by = word.rank if isinstance(word, ShardckptError) and word.rank is not None else self.rank
        return msgspec.msgpack.encode(
            _Word(self._call, met_by, error=type(word).__name__, message=message, silent=silent)
        )

    def _timed_out(self, silent: tuple[int, ...], point: str, timeout: float) -> RankTimeoutError:
        error = RankTimeoutError(
            f"{_listed(silent)} did not reach {self._call} (point {point!r}) within {timeout:.0f} s, while rank"
            f" {self.rank} waited there. Every rank must make this call; if all do, look at the silent rank's log for"
            " why it is slow or dead, or raise the timeout."
        )
        error.ranks = silent
        return error

    def _check_calls(self, calls: Sequence[str]) -> None:
        if len(set(calls)) > 1:
            said = "; ".join(f"rank {rank} called {call}" for rank, call in enumerate(calls))
            raise ConflictingStateError(
                f"ranks made different calls: {said}. Every rank makes the same calls, with the same path, in the same"
                " order."
            )


def _listed(ranks: tuple[int, ...]) -> str:
    names = [f"rank {rank}" for rank in ranks]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _error_from(word: _Word, *, announced: bool = False) -> ShardckptError:
    """An error that another rank met, as this rank raises it: of the same class where it is one of ours."""
    kind = getattr(errors, word.error or "", None)
    # What rank 0 announces names the rank already, unless it speaks of itself or of all.
    message = word.message if announced or word.message.startswith("rank ") else f"rank {word.rank}: {word.message}"
    if isinstance(kind, type) and issubclass(kind, ShardckptError):
        error: ShardckptError = kind(message)
    else:
        error = errors.RemoteError(f"{message} [{word.error}]")
    error.rank = word.rank
    error.told_as = word.error
    return error
