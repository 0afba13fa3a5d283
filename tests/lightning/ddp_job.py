"""Runs `ddp_worker.py`, or a script like it, as the ranks of one job, and says what came of each of its cases."""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import ranks

HERE = Path(__file__).parent


class Outcomes:
    """What each rank reported of each case."""

    def __init__(self, folder: Path, world_size: int, log: str) -> None:
        self.folder = folder
        self.world_size = world_size
        self._log = log

    def of(self, case: str) -> list[Any]:
        """What the case returned on each rank. A test calls this; it fails with the rank's traceback."""
        answers = []
        for rank in range(self.world_size):
            report = report_path(self.folder, case, self.world_size, rank)
            if not report.exists():
                pytest.fail(f"rank {rank} of {self.world_size} did not come to the end of {case!r}:\n{self._log}")
            answer = json.loads(report.read_text())
            if "error" in answer:
                pytest.fail(f"rank {rank} of {self.world_size} in {case!r}:\n{answer['error']}")
            answers.append(answer["result"])
        return answers


def report_path(folder: Path, case: str, world_size: int, rank: int) -> Path:
    return folder / f"{case}.{rank}-of-{world_size}.json"


def run(
    world_size: int,
    flavour: str,
    folder: Path,
    cases: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    seconds: float = 100,
    worker: str = "ddp_worker.py",
) -> Outcomes:
    """Run ``cases`` one after another on ``world_size`` processes; all are dead when it returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Where it is imported already, a process would not be one of the other flavour alone.
    context = ranks.context() if flavour in ranks.PRELOADED else multiprocessing.get_context("spawn")
    processes, logs = [], []
    for rank in range(world_size):
        logs.append(folder / f"rank{rank}-of-{world_size}.log")
        known = {
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        variables = dict(os.environ) | known | dict(environment or {})
        program = [str(HERE / worker), flavour, str(folder), *cases]
        processes.append(context.Process(target=_rank, args=(program, variables, logs[-1]), daemon=True))
        processes[-1].start()
    deadline = time.monotonic() + seconds
    try:
        # One rank that fails leaves the others waiting for it.
        while any(p.exitcode is None for p in processes) and time.monotonic() < deadline:
            if any(p.exitcode for p in processes):
                deadline = min(deadline, time.monotonic() + 3)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return Outcomes(folder, world_size, "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in logs))


def _rank(program: list[str], variables: Mapping[str, str], log: Path) -> None:
    """Become one rank: what runs from here on is the script, as if it had been started by itself."""
    os.environ.clear()
    os.environ.update(variables)
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = program
    sys.path.insert(0, str(HERE))
    import torch

    torch.set_num_threads(1)  # it read OMP_NUM_THREADS before there was one
    runpy.run_path(program[0], run_name="__main__")
