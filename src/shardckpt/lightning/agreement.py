"""What all ranks must do alike although one of them decides, or each may fail: in limited time, without a collective.

Lightning's own broadcast would do too, but waits half an hour for a rank that never comes.
"""

import inspect
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from shardckpt import coordinator
from shardckpt.checkpointer import Checkpointer

Answer = TypeVar("Answer")

TIMEOUT: Final[float] = inspect.signature(Checkpointer).parameters["timeout"].default
"""Seconds to wait for the other ranks, unless the user says otherwise: the engine's default."""


def from_rank_zero(
    call: str,
    decide: Callable[[], Answer],
    kind: type[Answer],
    *,
    timeout: float,
    before: Callable[[], None] | None = None,
) -> Answer:
    """What ``decide`` returns on rank 0, on every rank; an error that it raises there is raised on all.

    ``before`` is what every rank does first; an error that it raises on any rank is raised on all too.
    """
    operation = coordinator.begin(call, timeout=timeout)
    with coordinator.turn(operation, "decision") as turn:
        if before is not None:
            before()
        if operation.rank == 0:
            turn.word = msgspec.msgpack.encode(decide())
    return msgspec.msgpack.decode(turn.heard[0], type=kind)


def on_all(call: str, act: Callable[[], Answer], *, timeout: float) -> Answer:
    """What ``act`` returns on this rank; an error that it raises on any rank is raised on all."""
    with coordinator.turn(coordinator.begin(call, timeout=timeout), "done"):
        return act()


def whether_all(call: str, ask: Callable[[], bool], *, timeout: float) -> bool:
    """Whether ``ask`` is true on every rank; an error that it raises on any rank is raised on all."""
    with coordinator.turn(coordinator.begin(call, timeout=timeout), "answer") as turn:
        turn.word = b"yes" if ask() else b"no"
    return all(word == b"yes" for word in turn.heard)
