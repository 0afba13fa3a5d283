"""One call of shardckpt that ranks make together: how a rank takes part in it, and its twin for one process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from shardckpt.errors import RemoteError


class Operation(Protocol):
    """One call of shardckpt that all ranks make together."""

    rank: int
    world_size: int
    verdict: Exception | None
    """What an agreement failed of in the words of rank 0, so that its class is the same on all ranks that heard it."""

    def agree(self, point: str, word: bytes | Exception, timeout: float | None = None) -> list[bytes]:
        """Say ``word`` and hear everyone's, by rank. Raises on every rank if any rank said an error.

        ``timeout`` is in seconds, for points before which ranks have different amounts of work to do.
        """

    def fail(self, point: str, error: Exception) -> None:
        """Tell the others that this rank is leaving, and wait for nobody."""

    def leave(self, error: Exception) -> None:
        """Tell the others, at whatever point they are, that this rank goes no further; waits for nobody."""

    def listen(self, point: str) -> None:
        """Raise what a rank said went wrong at ``point``, or has left of, if any has; waits for nobody."""

    def roll_call(self, listen: Callable[[], None]) -> list[int]:
        """After an error that all others meet too: the ranks that do not come here within a few seconds.

        ``listen`` may raise what one of them says instead.
        """

    def post(self, point: str, word: bytes | Exception) -> None:
        """Say ``word`` without waiting; safe in a background thread, as are the three below."""

    def collect(self, point: str, timeout: float) -> list[bytes]:
        """Rank 0: everyone's word at ``point``; raises what another rank said went wrong, or who was silent."""

    def announce(self, point: str, word: bytes | Exception) -> None:
        """Rank 0: say what all the others wait for."""

    def see_off(self, point: str) -> None:
        """Rank 0: give the others a few seconds to hear what it announced: with its process the Store may end."""

    def hear(self, point: str, timeout: float) -> bytes:
        """Other ranks: what rank 0 announced at ``point``, raising if that is an error."""

    def in_background(self, owner: object) -> "Operation":
        """The same operation over the connection that belongs to the background thread of ``owner``."""


@dataclass
class Turn:
    """One rank's part in an agreement: what it says, and, once all have spoken, what everyone said, by rank."""

    word: bytes = b""
    heard: list[bytes] = field(default_factory=list)
    undo: Callable[[], None] = lambda: None
    """Takes back what this rank has done, if another fails at this point."""


@contextmanager
def turn(operation: Operation, point: str, timeout: float | None = None) -> Iterator[Turn]:
    """Enclose what a rank does before the others may go on past ``point``.

    If anything in here raises, on any rank, it is raised on every rank: nobody waits for one that has failed.
    """
    own = Turn()
    try:
        yield own
    except Exception as error:
        operation.agree(point, error, timeout)
        raise
    except BaseException as error:
        operation.fail(point, told(error, operation.rank))
        raise
    try:
        own.heard = operation.agree(point, own.word, timeout)
    except BaseException:
        own.undo()
        raise


@contextmanager
def taking_part(operation: Operation, begun: Sequence[object] = ()) -> Iterator[None]:
    """Enclose what lies between the turns too: what ends it is told to the others, unless all have agreed on it.

    Nor is it once anything has ``begun``, which then tells them how it ends.
    """
    try:
        yield
    except BaseException as error:
        if operation.verdict is None and not begun:
            operation.leave(told(error, operation.rank))
        raise


def told(error: BaseException, rank: int) -> Exception:
    """What the others hear of what ended this rank's part: an interruption is one for this process alone."""
    return error if isinstance(error, Exception) else RemoteError(f"rank {rank}: interrupted by {type(error).__name__}")


class SoloOperation:
    """The twin for one process: what is said is heard at once."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.verdict: Exception | None = None
        self._said: dict[str, bytes] = {}

    def agree(
        self,
        point: str,  # noqa: ARG002 - the signature is Operation's
        word: bytes | Exception,
        timeout: float | None = None,  # noqa: ARG002
    ) -> list[bytes]:
        if isinstance(word, Exception):
            self.verdict = word
            raise word
        return [word]

    def fail(self, point: str, error: Exception) -> None:  # noqa: ARG002 - the signature is Operation's
        return

    def leave(self, error: Exception) -> None:  # noqa: ARG002 - the signature is Operation's
        return

    def listen(self, point: str) -> None:  # noqa: ARG002 - the signature is Operation's
        return

    def roll_call(self, listen: Callable[[], None]) -> list[int]:  # noqa: ARG002 - the signature is Operation's
        return []

    def post(self, point: str, word: bytes | Exception) -> None:
        if isinstance(word, Exception):
            raise word
        self._said[point] = word

    def collect(self, point: str, timeout: float) -> list[bytes]:  # noqa: ARG002 - the signature is Operation's
        return [self._said.pop(point)]

    def announce(self, point: str, word: bytes | Exception) -> None:  # noqa: ARG002 - the signature is Operation's
        return

    def see_off(self, point: str) -> None:  # noqa: ARG002 - the signature is Operation's
        return

    def hear(self, point: str, timeout: float) -> bytes:  # noqa: ARG002 - the signature is Operation's
        raise AssertionError("rank 0 announces; it does not hear")

    def in_background(self, owner: object) -> "SoloOperation":  # noqa: ARG002 - the signature is Operation's
        return self
