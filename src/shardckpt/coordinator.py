"""Agreement between ranks that carries errors, without a collective.

Everything goes through the c10d Store of the default process group, as keys that one rank sets and others wait for
with a timeout. A collective in a background thread would cross training's own; a Store cannot. Background threads use
a clone of the Store, its own connection: on a shared one a background ``wait`` keeps a foreground ``set`` waiting.

Like collectives, operations are matched by their order: every rank makes the same calls of shardckpt in the same order.
Each call carries its name, so a rank that makes another one is told what the others are doing instead of hanging.
"""

import datetime
import itertools
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec
import torch.distributed as dist

from shardckpt import errors
from shardckpt.errors import ConflictingStateError, RankTimeoutError, ShardckptError

_GRACE_SECONDS: Final = 20.0
"""How much longer the other ranks wait than rank 0, so that they hear from it who was missing."""

_FIRST_PAUSE_SECONDS: Final = 0.0005
_LONGEST_PAUSE_SECONDS: Final = 0.05


class _Word(msgspec.Struct, array_like=True):
    """What one rank says at one point of an operation."""

    call: str
    rank: int
    payload: bytes = b""
    error: str | None = None
    message: str = ""


class Operation(Protocol):
    """One call of shardckpt that all ranks make together."""

    rank: int
    world_size: int

    def agree(self, point: str, word: bytes | Exception) -> list[bytes]:
        """Say ``word`` and hear everyone's, by rank. Raises on every rank if any rank said an error."""

    def post(self, point: str, word: bytes | Exception) -> None:
        """Say ``word`` without waiting; safe in a background thread, as are the three below."""

    def collect(self, point: str, timeout: float) -> list[bytes]:
        """Rank 0: everyone's word at ``point``; raises what another rank said went wrong, or who was silent."""

    def announce(self, point: str, word: bytes | Exception) -> None:
        """Rank 0: say what all the others wait for."""

    def hear(self, point: str, timeout: float) -> bytes:
        """Other ranks: what rank 0 announced at ``point``, raising if that is an error."""

    def in_background(self, owner: object) -> "Operation":
        """The same operation over the connection that belongs to the background thread of ``owner``."""


def begin(call: str, *, timeout: float) -> Operation:
    """Start an operation named ``call`` with all ranks of the default process group, or alone without one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - there is no public way to it
        number = next(_counters.setdefault(store, itertools.count()))
        return _StoreOperation(store, f"shardckpt/{number}", call, dist.get_rank(), dist.get_world_size(), timeout)
    return _SoloOperation()


def begin_alone() -> Operation:
    """An operation of this process only, whatever process group there is."""
    return _SoloOperation()


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@dataclass
class Turn:
    """One rank's part in an agreement: what it says, and, once all have spoken, what everyone said, by rank."""

    word: bytes = b""
    heard: list[bytes] = field(default_factory=list)
    undo: Callable[[], None] = lambda: None
    """Takes back what this rank has done, if another fails at this point."""


@contextmanager
def turn(operation: Operation, point: str) -> Iterator[Turn]:
    """Enclose what a rank does before the others may go on past ``point``.

    If anything in here raises, on any rank, it is raised on every rank: nobody waits for one that has failed.
    """
    own = Turn()
    try:
        yield own
    except Exception as error:
        operation.agree(point, error)
        raise
    try:
        own.heard = operation.agree(point, own.word)
    except BaseException:
        own.undo()
        raise


_counters: "weakref.WeakKeyDictionary[Any, itertools.count[int]]" = weakref.WeakKeyDictionary()
"""Operations begun so far, by the Store they go through: a new process group counts from zero again."""


class _SoloOperation:
    """The twin for one process: what is said is heard at once."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self._said: dict[str, bytes] = {}

    def agree(self, point: str, word: bytes | Exception) -> list[bytes]:  # noqa: ARG002 - the signature is Operation's
        if isinstance(word, Exception):
            raise word
        return [word]

    def post(self, point: str, word: bytes | Exception) -> None:
        if isinstance(word, Exception):
            raise word
        self._said[point] = word

    def collect(self, point: str, timeout: float) -> list[bytes]:  # noqa: ARG002 - the signature is Operation's
        return [self._said.pop(point)]

    def announce(self, point: str, word: bytes | Exception) -> None:  # noqa: ARG002 - the signature is Operation's
        return

    def hear(self, point: str, timeout: float) -> bytes:  # noqa: ARG002 - the signature is Operation's
        raise AssertionError("rank 0 announces; it does not hear")

    def in_background(self, owner: object) -> "_SoloOperation":  # noqa: ARG002 - the signature is Operation's
        return self


class _StoreOperation:
    """Words are keys of the Store: ``<operation>/<point>/<rank>``, and ``.../all`` for what rank 0 announces.

    Each rank removes its own key once rank 0 has answered, and the last to hear an answer removes that, so the Store
    does not grow with the number of saves.
    """

    def __init__(self, store: Any, prefix: str, call: str, rank: int, world_size: int, timeout: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._prefix = prefix
        self._call = call
        self._timeout = timeout

    def in_background(self, owner: object) -> "_StoreOperation":
        store = _connection_of(owner, self._store)
        return _StoreOperation(store, self._prefix, self._call, self.rank, self.world_size, self._timeout)

    def agree(self, point: str, word: bytes | Exception) -> list[bytes]:
        self.post(point, word)
        try:
            if self.rank != 0:
                return msgspec.msgpack.decode(self.hear(point, self._timeout), type=list[bytes])
            try:
                words = self.collect(point, self._timeout)
            except ShardckptError as error:
                self.announce(point, error)
                raise
            self.announce(point, msgspec.msgpack.encode(words))
            return words
        except ShardckptError:
            if isinstance(word, Exception):
                # The rank that failed has the error itself, with its traceback; the others have its words.
                raise word from None
            raise

    def post(self, point: str, word: bytes | Exception) -> None:
        said = self._encoded(word)
        if isinstance(word, Exception):
            # Rank 0 need not wait for the others to know how this ends.
            self._ask("set", self._key(point, "failed"), said)
        self._ask("set", self._key(point, self.rank), said)

    def announce(self, point: str, word: bytes | Exception) -> None:
        self._ask("set", self._key(point, "all"), self._encoded(word))
        self._ask("delete_key", self._key(point, self.rank))

    def collect(self, point: str, timeout: float) -> list[bytes]:
        keys = [self._key(point, rank) for rank in range(self.world_size)]
        failed = self._key(point, "failed")
        deadline = time.monotonic() + timeout
        pause = _FIRST_PAUSE_SECONDS
        # Asking again and again, by one rank, lets a failure end the wait; `Store.wait` can only wait for all keys.
        while not self._ask("check", keys):
            if self._ask("check", [failed]):
                word = msgspec.msgpack.decode(self._ask("get", failed), type=_Word)
                self._ask("delete_key", failed)
                raise _error_from(word)
            if time.monotonic() > deadline:
                silent = [f"rank {rank}" for rank, key in enumerate(keys) if not self._ask("check", [key])]
                raise self._timed_out(silent, point, timeout)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        words = [msgspec.msgpack.decode(word, type=_Word) for word in self._ask("multi_get", keys)]
        self._check_calls([word.call for word in words])
        for word in words:
            if word.error is not None:
                self._ask("delete_key", failed)
                raise _error_from(word)
        return [word.payload for word in words]

    def hear(self, point: str, timeout: float) -> bytes:
        key = self._key(point, "all")
        try:
            self._store.wait([key], datetime.timedelta(seconds=timeout + _GRACE_SECONDS))
        except RuntimeError as error:
            if not self._ask("check", [key]):
                raise self._timed_out(["rank 0"], point, timeout + _GRACE_SECONDS) from error
        word = msgspec.msgpack.decode(self._ask("get", key), type=_Word)
        self._ask("delete_key", self._key(point, self.rank))
        if self._ask("add", key + "/heard", 1) == self.world_size - 1:
            self._ask("delete_key", key)
            self._ask("delete_key", key + "/heard")
        if word.error is not None:
            raise _error_from(word, announced=True)
        return word.payload

    def _key(self, point: str, who: int | str) -> str:
        return f"{self._prefix}/{point}/{who}"

    def _encoded(self, word: bytes | Exception) -> bytes:
        if isinstance(word, Exception):
            return msgspec.msgpack.encode(
                _Word(self._call, self.rank, error=type(word).__name__, message=str(word) or repr(word))
            )
        return msgspec.msgpack.encode(_Word(self._call, self.rank, word))

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, method)(*arguments)
        except RuntimeError as error:
            raise RankTimeoutError(
                f"lost contact with the process group's store during {self._call}: {error}. The process that hosts it,"
                " usually rank 0's or the launcher's, has probably died."
            ) from error

    def _timed_out(self, silent: list[str], point: str, timeout: float) -> RankTimeoutError:
        return RankTimeoutError(
            f"{_listed(silent)} did not reach {self._call} (point {point!r}) within {timeout:.0f} s, while rank"
            f" {self.rank} waited there. Every rank must make this call; if all do, look at the silent rank's log for"
            " why it is slow or dead, or raise the timeout."
        )

    def _check_calls(self, calls: Sequence[str]) -> None:
        if len(set(calls)) > 1:
            said = "; ".join(f"rank {rank} called {call}" for rank, call in enumerate(calls))
            raise ConflictingStateError(
                f"ranks made different calls: {said}. Every rank makes the same calls, with the same path, in the same"
                " order."
            )


_connections: "weakref.WeakKeyDictionary[object, tuple[Any, Any]]" = weakref.WeakKeyDictionary()
"""By owner: a Store, and the clone of it that the owner's background thread uses."""


def _connection_of(owner: object, store: Any) -> Any:
    """The connection of one background thread, made once: two threads that wait on one would wait for each other."""
    known = _connections.get(owner)
    if known is None or known[0]() is not store:
        # The Store of an older torch has no clone; a background wait then keeps the foreground waiting.
        clone = store.clone() if hasattr(store, "clone") else store
        known = _connections[owner] = (weakref.ref(store), clone)
    return known[1]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _error_from(word: _Word, *, announced: bool = False) -> ShardckptError:
    """An error that another rank met, as this rank raises it: of the same class where it is one of ours."""
    kind = getattr(errors, word.error or "", None)
    # What rank 0 announces names the rank already, unless it speaks of itself or of all.
    message = word.message if announced or word.message.startswith("rank ") else f"rank {word.rank}: {word.message}"
    if isinstance(kind, type) and issubclass(kind, ShardckptError):
        return kind(message)
    return errors.RemoteError(f"{message} [{word.error}]")
