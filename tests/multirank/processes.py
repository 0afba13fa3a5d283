"""Ranks in processes of their own, that may die or end as users' do: nobody waits for them, and no world survives them.

The processes of `ranks` live on after a case; these end when it does, and what ends with one (the Store that it hosts,
its connections, its background) is gone for the others.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import pytest

import ranks

SECONDS: Final = 60.0
"""After which a rank is taken to hang."""
HOST: Final = -1
"""In place of a rank: the process that hosts the Store and does nothing else."""


class Death:
    """Kills processes of a run, from inside a rank."""

    def __init__(self, pids: Any) -> None:
        self._pids = pids

    def of(self, rank: int) -> None:
        """SIGKILL of a rank, or of the Store's `HOST`; returns when it is dead, unless it was this one."""
        os.kill(self._pids[rank], signal.SIGKILL)
        self.wait_for(rank, SECONDS)

    def wait_for(self, rank: int, seconds: float) -> None:
        """Wait until a rank is dead, so many seconds at most."""
        deadline = time.monotonic() + seconds
        while _runs(self._pids[rank]) and time.monotonic() < deadline:
            time.sleep(0.002)


def run(case: Callable[..., Any], size: int, *args: Any, host: bool = False, without: Sequence[int] = ()) -> list[Any]:
    """Run ``case(rank, death, *args)`` on ``size`` new ranks; by rank what it returned, None for one that said nothing.

    ``host``: the Store is in a process of its own, which ends last; otherwise in that of rank 0. ``without``: ranks
    that are not waited for.
    """
    context = ranks.context()
    port = ranks._free_port()
    pids = context.Array("q", size + 1, lock=False)
    processes, pipes = [], []
    try:
        for rank in [*range(size), *([HOST] if host else [])]:
            ours, theirs = context.Pipe(duplex=False)
            arguments = (case, rank, size, port, host, theirs, pids, args)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            pids[rank] = process.pid
            processes.append(process)
            pipes.append(ours)
        return [None if rank in without else _told(pipe, rank) for rank, pipe in enumerate(pipes[:size])]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _told(pipe: Any, rank: int) -> Any:
    if not pipe.poll(SECONDS):
        pytest.fail(f"rank {rank} hangs")
    try:
        result = pipe.recv()
    except EOFError:
        return None
    assert not isinstance(result, ranks.Failed), result.trace
    return result


def _rank(
    case: Callable[..., Any], rank: int, size: int, port: int, host: bool, pipe: Any, pids: Any, args: tuple[Any, ...]
) -> None:
    sys.path.insert(0, ranks.TESTS)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    is_master = rank == (HOST if host else 0)
    store = dist.TCPStore("127.0.0.1", port, None, is_master, timeout=timedelta(seconds=10), wait_for_workers=False)
    if rank == HOST:
        time.sleep(10 * SECONDS)
        return
    dist.init_process_group("gloo", rank=rank, world_size=size, store=store, timeout=timedelta(seconds=SECONDS))
    del store
    dist.barrier()
    try:
        told = case(rank, Death(pids), *args)
    except Exception as error:  # noqa: BLE001 - told to the test
        told = ranks.Failed(type(error).__name__, str(error), traceback.format_exc())
    pipe.send(told)


def _runs(pid: int) -> bool:
    """Whether a process is alive: one that is dead stays until its parent has looked."""
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
