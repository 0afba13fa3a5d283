"""Staging beside training: ``overlap="step"``.

What only an optimizer's step changes is copied by a thread of ours while training goes on, and every step waits for
that; everything else is copied at the call. The hook is on all optimizers of the process, since one that is not in the
state, or is hidden in another, may change the same parameters. It stays once it is there: to take it off while a step
walks over the hooks is an error in that step, and would have compiled steps compiled again.
"""
# ruff: noqa: SLF001 - a tensor's version counter has no public name

import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardckpt.background import PendingSave
from shardckpt.errors import ConflictingStateError
from shardckpt.staging import Block, Source, StagingPool, copyable, side_stream, stage
from shardckpt.state import Stepped
from shardckpt.storage import BLOCK

_NAMED: Final = 4
"""Tensors that an error names."""

_under_way: set[PendingSave] = set()
os.register_at_fork(after_in_child=_under_way.clear)  # the thread that copies is the parent's


def wait_for_copies(saves: Sequence[PendingSave] | None = None) -> None:
    """Until nothing is being copied beside training: for ``saves``, or by default for any save of this process."""
    for pending in tuple(_under_way):
        if saves is not None and pending not in saves:
            continue
        start = time.monotonic()
        pending.wait_until_staged()
        pending.add_stall(time.monotonic() - start)


@functools.cache
def install() -> None:
    """Have every optimizer of this process wait, before it changes anything, until it may."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not _under_way:
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure) or not type(optimizer).step.__module__.startswith("torch.optim."):
        wait_for_copies()
        return None

    # Torch's own optimizers change nothing before the closure has been called, and Lightning has forward and backward
    # in there.
    def first(*inputs: Any) -> Any:
        result = closure(*inputs)
        wait_for_copies()
        return result

    return ((args[0], *args[2:]), kwargs | {"closure": first})


class _Placed(NamedTuple):
    source: Source
    waits: bool
    """Whether it may be copied beside training."""


class Overlap:
    """The staging of one save beside training; `begin_overlap` makes it."""

    def __init__(
        self, sources: Sequence[_Placed], stepped: Stepped, pool: StagingPool, memory: int | None, threads: int
    ) -> None:
        self._versions = [
            (source.fqn, live, live._version)
            for source, waits in sources
            if waits
            for live in stepped.live(source.tensor)
        ]
        self._blocks: list[Block] = []
        try:
            self.sources = _copied(sources, pool, self._blocks, threads)
            # By the caller's thread: the streams that it computes on are not those of another thread, and what it
            # queues from now on is not to be waited for.
            devices = {source.tensor.device for source in self.sources if source.tensor.is_cuda}
            self._streams = [side_stream(device) for device in devices]
        except BaseException:
            self._release()
            raise
        self.limit = None if memory is None else memory - BLOCK * len(self._blocks)
        """Bytes of the pool that are left for staging."""

    def start(self, copy: Callable[[], None], pending: PendingSave) -> None:
        """Call ``copy`` in a thread; until it returns no optimizer steps."""
        install()
        begun = threading.Lock()

        def run() -> None:
            if not begun.acquire(blocking=False):
                return
            try:
                with ExitStack() as stack:
                    for stream in self._streams:
                        stack.enter_context(torch.cuda.stream(stream))
                    copy()
            finally:
                self._release()
                pending.mark_staged()
                _under_way.discard(pending)

        try:
            _under_way.add(pending)
            threading.Thread(target=run, name="shardckpt-stage").start()
        except RuntimeError:  # no thread can be had
            run()
        except BaseException:
            run()  # an interrupted start may have left none, for which every step would wait
            raise

    def check(self) -> None:
        """Raise ConflictingStateError if something other than a step has changed what was being copied."""
        changed = list(dict.fromkeys(fqn for fqn, live, version in self._versions if live._version != version))
        if changed:
            more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
            raise ConflictingStateError(
                f"{', '.join(changed[:_NAMED])}{more} changed while being copied beside training, and not by an"
                " optimizer's step, for which overlap='step' waits. Call wait_until_staged() of the pending save before"
                " whatever else changes parameters or optimizer state, or leave `overlap` out."
            )

    def _release(self) -> None:
        while self._blocks:
            self._blocks.pop().release()


def begin_overlap(
    sources: Sequence[Source], stepped: Stepped, pool: StagingPool, memory: int | None, threads: int
) -> Overlap | None:
    """Copy those of ``sources`` that may change before the next step; the result's ``sources`` are to be staged later.

    None where that is not worth while, and all is to be staged now: most of it would be copied now anyway, or more than
    half of the ``memory`` that the save may hold, in bytes (None: no limit), would be taken by it. And where there are
    devices of which it is not known how their copies follow upon what is queued there.
    """
    if any(source.tensor.device.type not in ("cpu", "cuda") for source in sources):
        return None
    placed = [_Placed(source, stepped.holds(source.tensor)) for source in sources]
    at_once = sum(source.nbytes for source, waits in placed if not waits)
    later = sum(source.nbytes for source, waits in placed if waits)
    if later <= at_once or (memory is not None and at_once > memory // 2):
        return None
    return Overlap(placed, stepped, pool, memory, threads)


def _copied(sources: Sequence[_Placed], pool: StagingPool, blocks: list[Block], threads: int) -> list[Source]:
    """The same stream of bytes, with copies in place of those sources that cannot wait.

    Copies of what is in the host's memory are in ``blocks``, which are the caller's to release: fresh memory would
    take longer to touch than to fill.
    """
    now = [source for source, waits in sources if not waits and source.tensor.is_cpu]
    stage(now, pool, limit=None, first_block_offset=0, emit=blocks.append, threads=threads)
    found: list[Source] = []
    at = 0
    for source, waits in sources:
        if waits:
            found.append(source)
        elif not source.tensor.is_cpu:
            found.append(source._replace(tensor=copyable(source.tensor.detach()).clone()))
        else:
            end = at + source.nbytes
            while at < end:
                index, start = divmod(at, BLOCK)
                size = min(end - at, BLOCK - start)
                octets = blocks[index].tensor[start : start + size]
                found.append(source._replace(tensor=octets, nbytes=size))
                at += size
    return found
