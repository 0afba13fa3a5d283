"""A gate before the copies that run beside training, so that tests know what happens while one is under way."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardckpt.background import PendingSave
from shardckpt.staging import filling

SECONDS = 60.0
"""Past which a test hangs."""


class Gate:
    """`open` lets the copies go on; ``asked`` is set once somebody waits for them; ``error`` is what they raise.

    With ``opens_when_asked`` whoever waits opens it first, in that thread, so that nobody can close it too late.
    """

    def __init__(self) -> None:
        self.opens_when_asked = False
        self.open = threading.Event()
        self.asked = threading.Event()
        self.error: Exception | None = None


@contextmanager
def gate() -> Iterator[Gate]:
    """In here, copies beside training wait, of small tensors at least. It opens at the end in any case."""
    found = Gate()
    copy_memory, wait = filling.copy_memory, PendingSave.wait_until_staged

    def copy(*args: int) -> None:
        if threading.current_thread().name == "shardckpt-stage":
            assert found.open.wait(SECONDS)
            if found.error is not None:
                raise found.error
        copy_memory(*args)

    def waiting(self: PendingSave, timeout: float | None = None) -> bool:
        found.asked.set()
        if found.opens_when_asked:
            found.open.set()
        return wait(self, timeout)

    filling.copy_memory, PendingSave.wait_until_staged = copy, waiting  # type: ignore[assignment, method-assign]
    try:
        yield found
    finally:
        found.open.set()
        filling.copy_memory, PendingSave.wait_until_staged = copy_memory, wait  # type: ignore[method-assign]


def beside(act: Any) -> threading.Thread:
    """``act``, begun in a thread of its own."""
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def same(left: Any, right: Any) -> bool:
    """Whether two loaded states are equal, bit for bit."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(
            left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8)
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left.tobytes() == right.tobytes() if isinstance(left, np.ndarray) else bool(left == right)
