"""Real gloo processes that live through a whole test session, one set per world size.

Importing torch costs seconds, so that is done once, in a server from which processes fork (`context`), and a rank runs
many cases. A case is a module-level function of an importable module; it gets its rank and the arguments, and what it
returns or raises comes back by rank. A case that hangs kills its processes and fails; the next one starts new ones.
"""

import importlib
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest

HANG_SECONDS = 120.0
TESTS = str(Path(__file__).parent)


PRELOADED = ("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "shardckpt", "lightning.pytorch")
"""What the server of processes has imported. What is not installed is left out."""
SPAWNED: Final = 3
"""Ranks of the world whose processes start from scratch, each with hashes of strings of its own, as users' ranks have:
what forks from one server has one order of sets in all ranks, and no test would see a plan that depends on it."""


def context() -> Any:
    """How tests start Python processes: each forks from a server that has imported what they need, and nothing else."""
    started = multiprocessing.get_context("forkserver")
    started.set_forkserver_preload(list(PRELOADED))
    return started


@dataclass
class Failed:
    """What a rank raised."""

    kind: str
    text: str
    trace: str


class RankFailures(AssertionError):
    """One or more ranks raised; `failures` has them by rank."""

    def __init__(self, failures: dict[int, Failed]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"--- rank {rank}\n{failed.trace}" for rank, failed in failures.items()))


class World:
    """``size`` processes in one gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []

    def run(self, case: Callable[..., Any], *args: Any, timeout: float = HANG_SECONDS, **options: Any) -> list[Any]:
        """Run ``case(rank, *args)`` on every rank; the results by rank. Raises RankFailures if any rank raised."""
        results = self.outcomes(case, *args, timeout=timeout, **options)
        failures = {rank: result for rank, result in enumerate(results) if isinstance(result, Failed)}
        if failures:
            raise RankFailures(failures)
        return results

    def outcomes(
        self, case: Callable[..., Any], *args: Any, timeout: float = HANG_SECONDS, **options: Any
    ) -> list[Any]:
        """Like `run`, but what a rank raised stands in its place as a `Failed`."""
        self._start()
        for pipe in self._pipes:
            pipe.send((case.__module__, case.__qualname__, args, options))
        deadline = time.monotonic() + timeout
        results: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    self.stop()
                    pytest.fail(f"rank {rank} of {self.size} did not finish {case.__qualname__} within {timeout} s")
                results.append(pipe.recv())
            except EOFError:
                codes = [process.exitcode for process in self._processes]
                self.stop()
                pytest.fail(f"rank {rank} of {self.size} died in {case.__qualname__}; exit codes {codes}")
        return results

    def _start(self) -> None:
        if self._processes:
            return
        processes = multiprocessing.get_context("spawn") if self.size == SPAWNED else context()
        port = _free_port()
        for rank in range(self.size):
            ours, theirs = processes.Pipe()
            process = processes.Process(
                target=_serve, args=(rank, self.size, port, theirs, TESTS, dict(os.environ)), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=0.5)
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _serve(
    rank: int, size: int, port: int, pipe: multiprocessing.connection.Connection, tests: str, environ: dict[str, str]
) -> None:
    sys.path.insert(0, tests)
    os.environ.clear()  # the server's, which is that of the first test that started one
    os.environ.update(environ)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", rank=rank, world_size=size, store=store, timeout=timedelta(seconds=60))
    while True:
        try:
            module, name, args, options = pipe.recv()
        except EOFError:
            break
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            result = function(rank, *args, **options)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test wants to see it
            result = Failed(type(error).__name__, str(error), traceback.format_exc())
        _drop_groups()
        pipe.send(result)


def _drop_groups() -> None:
    """Destroy the groups that a case has made: gloo has two threads poll for each, and hundreds keep a machine busy."""
    import torch.distributed as dist

    from shardckpt.reader import group as exchanging

    kept = {dist.group.WORLD, *exchanging._groups.values()}
    for group in [group for group in dist.distributed_c10d._world.pg_map if group not in kept]:
        dist.destroy_process_group(group)


_worlds: dict[int, World] = {}


def world(size: int) -> World:
    """The session's processes for this world size."""
    return _worlds.setdefault(size, World(size))


def stop_all() -> None:
    for started in _worlds.values():
        started.stop()
    _worlds.clear()
