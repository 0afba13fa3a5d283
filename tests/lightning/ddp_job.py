"""Runs `ddp_worker.py`, or a script like it, as the ranks of one job, and says what came of each of its cases."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

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
    processes, logs = [], []
    for rank in range(world_size):
        log = folder / f"rank{rank}-of-{world_size}.log"
        logs.append(log)
        known = {
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, str(HERE / worker), flavour, str(folder), *cases]
        with log.open("w") as out:
            processes.append(
                subprocess.Popen(command, env=os.environ | known | dict(environment or {}), stdout=out, stderr=out)
            )
    deadline = time.monotonic() + seconds
    try:
        # One rank that fails leaves the others waiting for it.
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if any(p.poll() for p in processes):
                deadline = min(deadline, time.monotonic() + 3)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return Outcomes(folder, world_size, "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in logs))
