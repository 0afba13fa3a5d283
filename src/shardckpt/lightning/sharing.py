"""In what circumstances a checkpoint is saved: inside another save, or directly after one whose shards it may share.

These two are the one that ``ModelCheckpoint`` makes and its ``last`` directly after.
"""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from shardckpt.lightning.snapshot import Produced, fingerprint


class Running(NamedTuple):
    """What the binding knows of the run that a checkpoint is saved in."""

    produced: Produced
    asynchronous: bool
    """Whether training goes on afterwards, so that the save may finish beside it."""
    position: Hashable
    """How far training is."""
    emergency: bool
    """Whether the run ends with this save, so that nothing that went wrong before may keep it from being made."""
    interrupted: bool
    """Whether an exception ends the run, which no other may take the place of."""
    replicas_agree: bool
    """Whether parameters are equal on all ranks, so that each may write a part of them."""


class Nesting:
    """Knows which save was called while its own thread was in another, and so by a signal handler.

    Whatever it interrupts is half done, holds locks, perhaps, and does not go on before it returns.
    """

    def __init__(self) -> None:
        self._depth = 0

    @contextmanager
    def another(self) -> Iterator[bool]:
        """Encloses a save, and tells whether it interrupts another."""
        self._depth += 1
        try:
            yield self._depth > 1
        finally:
            self._depth -= 1


class _First(NamedTuple):
    owner: object
    pair: object
    save: int


class Twins:
    """Knows when one callback saves twice with nothing between that could have changed a tensor.

    A look at the tensors does not tell: numpy and ``.data`` bump no version counter, and to read all the contents would
    stall training. So only this pair is taken for equal, and the look is a precaution on top of it.
    """

    def __init__(self) -> None:
        self._saves = 0
        self._pair: object | None = None
        self._first: _First | None = None

    @contextmanager
    def first(self, owner: object) -> Iterator[None]:
        """Encloses the save that a ``last`` may share with; ``owner`` is the callback that makes both."""
        before = self._saves
        self._pair = pair = object()
        self._first = None
        try:
            yield
        finally:
            self._pair = None
        if self._saves == before + 1:
            self._first = _First(owner, pair, self._saves)

    @contextmanager
    def second(self, owner: object) -> Iterator[None]:
        """Encloses the ``last`` of ``owner``, which shares if no other save came between."""
        first, self._first = self._first, None
        if first is not None and first.owner is owner and first.save == self._saves:
            self._pair = first.pair
        try:
            yield
        finally:
            self._pair = None

    def version(self, checkpoint: Mapping[str, Any], position: Hashable, *, may_share: bool) -> Hashable | None:
        """The ``state_version`` of the save that begins now; None where it shares with no other."""
        self._saves += 1
        if self._pair is None or not may_share:
            return None
        return fingerprint(checkpoint, (self._pair, position))
