"""Staging beside training: ``overlap="step"``.

What only an optimizer's step changes is copied by a thread of ours while training goes on, and every step waits for
that; everything else is copied at the call. The hook is on all optimizers of the process, since one that is not in the
state, or is hidden in another, may change the same parameters. It stays once it is there: to take it off while a step
walks over the hooks is an error in that step, and would have compiled steps compiled again.
"""
# ruff: noqa: SLF001 - a tensor's version counter has no public name, nor has the list of hooks

import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

import torch
from torch.optim import optimizer as torch_optimizer

from shardckpt.background import PendingSave
from shardckpt.errors import ConflictingStateError
from shardckpt.staging import Early, Source, StagingPool, blocks_of, copyable, place_early, side_stream
from shardckpt.state import Stepped
from shardckpt.storage import BLOCK

CLONED: Final = 4 << 20
"""Bytes of the host's memory, at most, that a save takes for copies beside its staging blocks."""
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
    """Have every optimizer of this process wait, before it or another hook changes anything, until it may."""
    handle = torch_optimizer.register_optimizer_step_pre_hook(_before_step)
    # Hooks run in this order, and all of them before those of the optimizer itself.
    hooks: Any = torch_optimizer._global_optimizer_pre_hooks  # annotated as a dict, which it is not
    hooks.move_to_end(handle.id, last=False)


def _before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not _under_way:
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure) or not _calls_closure_first(optimizer):
        wait_for_copies()
        return None

    # Lightning has forward and backward in there.
    def first(*inputs: Any) -> Any:
        result = closure(*inputs)
        wait_for_copies()
        return result

    return ((args[0], *args[2:]), kwargs | {"closure": first})


def _calls_closure_first(optimizer: Any) -> bool:
    """Whether nothing changes before a step calls its closure: torch's own optimizers do so, but hooks come before."""
    hooks = len(torch_optimizer._global_optimizer_pre_hooks) + len(optimizer._optimizer_step_pre_hooks)
    return hooks == 1 and type(optimizer).step.__module__.startswith("torch.optim.")


class Overlap:
    """The staging of one save beside training; `begin_overlap` makes it."""

    def __init__(
        self,
        sources: Sequence[Source],
        now: set[int],
        placed: set[int],
        stepped: Stepped,
        place: Callable[[set[int]], Early],
    ) -> None:
        self._versions = [
            (source.fqn, live, live._version)
            for number, source in enumerate(sources)
            if number not in now
            for live in stepped.live(source.tensor)
        ]
        self.early = place(placed)
        """What has been copied at the call to where it is written from."""
        try:
            self.sources = [
                source._replace(tensor=copyable(source.tensor.detach()).clone())
                if number in now and number not in placed
                else source
                for number, source in enumerate(sources)
            ]
            """The same stream of bytes, with copies in place of the rest of what cannot wait."""
            # By the caller's thread: the streams that it computes on are not those of another thread, and what it
            # queues from now on is not to be waited for.
            devices = {source.tensor.device for source in self.sources if source.tensor.is_cuda}
            self._streams = [side_stream(device) for device in devices]
        except BaseException:
            self.early.release()
            raise

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
                self.early.release()
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


def begin_overlap(
    sources: Sequence[Source],
    stepped: Stepped,
    pool: StagingPool,
    memory: int | None,
    *,
    first_block_offset: int,
    threads: int,
) -> Overlap | None:
    """Copy those of ``sources`` that may change before the next step to where they are staged; the rest is for later.

    None where that is not worth while, and all is to be staged now: most of it would be copied now anyway, or the
    blocks in which that lies are more than half of the ``memory`` that the save may hold, in bytes (None: no limit).
    And where there are devices of which it is not known how their copies follow upon what is queued there.
    """
    if any(source.tensor.device.type not in ("cpu", "cuda") for source in sources):
        return None
    now = {number for number, source in enumerate(sources) if not stepped.holds(source.tensor)}
    if sum(-source.nbytes if number in now else source.nbytes for number, source in enumerate(sources)) <= 0:
        return None
    placed = _worth_placing(sources, now)
    if memory is not None and blocks_of(sources, placed, first_block_offset) * BLOCK > memory // 2:
        return None
    place = partial(
        place_early, sources, pool=pool, limit=memory, first_block_offset=first_block_offset, threads=threads
    )
    return Overlap(sources, now, placed, stepped, place)


def _worth_placing(sources: Sequence[Source], now: set[int]) -> set[int]:
    """Those of ``now`` that go to where they are staged; the others are cloned, on their device or in `CLONED` bytes.

    Counters and statistics of layers lie all over the stream, and in the first save of a process the caller would wait
    until each of their blocks had been touched (measured, 1 GiB with a BatchNorm behind each layer: 0.85 s, against
    0.07 s).
    """
    room = CLONED
    placed: set[int] = set()
    for number in sorted(now, key=lambda number: sources[number].nbytes):
        source = sources[number]
        if not source.tensor.is_cpu:
            continue
        if source.nbytes <= room:
            room -= source.nbytes
        else:
            placed.add(number)
    return placed
