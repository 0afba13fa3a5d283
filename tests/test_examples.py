"""The examples that are scripts for ranks, run as users run them: under torchrun, in processes of their own."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

import shardckpt
from lowest import CANNOT

pytestmark = pytest.mark.multiprocess

FSDP2 = Path(__file__).resolve().parent.parent / "examples" / "train_fsdp2.py"
STEPS = ("--steps", "30", "--every", "5")


@contextmanager
def torchrun(size: int, *command: str) -> Iterator[IO[str]]:
    """What the ranks print; whatever of them is left is killed at the end."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *command]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        # The ranks are in the session of torchrun, which may have gone before them.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.stdout.close()
        process.wait()


def losses(lines: list[str]) -> dict[int, float]:
    """By step, as they were printed."""
    found = (re.match(r"step (\d+) on \d+ ranks: loss (\d\.\d{4})\n", line) for line in lines)
    return {int(one[1]): float(one[2]) for one in found if one is not None}


@pytest.mark.skipif(bool(CANNOT), reason="FSDP2 of torch 2.6 does not run on a CPU")
def test_the_fsdp2_example_goes_on_where_it_was_killed(tmp_path):
    """The script that users start from loses nothing by a SIGKILL, and learns the same on another number of ranks."""
    assert len(FSDP2.read_text().splitlines()) < 60
    with torchrun(2, str(FSDP2), str(tmp_path / "whole"), *STEPS) as output:
        whole = losses(lines := list(output))
    assert list(whole) == [5, 10, 15, 20, 25, 30], lines

    with torchrun(2, str(FSDP2), str(tmp_path / "killed"), *STEPS) as output:
        for line in output:
            if line.startswith("step 20 "):
                break
    step = shardckpt.CheckpointManager(tmp_path / "killed").steps()[-1]
    assert step in (15, 20)  # the save at 20 was under way

    with torchrun(3, str(FSDP2), str(tmp_path / "killed"), *STEPS) as output:
        rest = losses(lines := list(output))
    assert list(rest) == list(range(step + 5, 35, 5)), lines
    assert rest == pytest.approx({step: whole[step] for step in rest}, abs=2e-3)
