"""The launch script from the outside: what a new user runs first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]

# Several processes that import torch and Lightning three times over take minutes on a busy machine.
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(450)]


def launch(*arguments: str, timeout: float = 420, **settings: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", str(REPO / "scripts" / "launch_ddp.sh"), *arguments],
        env={**os.environ, "VENV": sys.prefix, **settings},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.lightning
@pytest.mark.parametrize(
    ("storage", "resume_on", "steps"), [("local", "1", "24"), pytest.param("s3", "3 1", "36", marks=pytest.mark.s3)]
)
def test_the_demonstration_is_equal(storage: str, resume_on: str, steps: str, tmp_path: Path) -> None:
    """Train on 2, SIGKILL, resume on 3 and on 1: every rank holds the state that was saved, on disk and on S3.

    Both resumptions are tried on S3, one on disk: what they cost is importing torch and Lightning in each process.
    """
    run = tmp_path / "run"
    done = launch("--storage", storage, RUN_DIR=str(run), MAX_STEPS=steps, WIDTH="16", RESUME_ON=resume_on)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILL to 3 processes" in done.stdout
    assert done.stdout.count("entries equal") == sum(int(ranks) for ranks in resume_on.split())
    assert done.stdout.rstrip().endswith("EQUAL: bit for bit, on every rank of every resumed run")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_script_of_ones_own(tmp_path: Path) -> None:
    """The script is a launcher too: arguments arrive, ranks exist, and its exit code is the script's."""
    script = tmp_path / "mine.py"
    script.write_text("import os, sys; open(sys.argv[2] + os.environ['RANK'], 'w'); sys.exit(sys.argv[1] == 'fail')\n")
    done = launch(str(script), "--rank-files", str(tmp_path / "rank"), NPROC="2")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"]
    assert launch(str(script), "fail", str(tmp_path / "rank"), NPROC="2").returncode != 0


@pytest.mark.parametrize("arguments", [["--storage", "nfs"], ["--stroage", "s3"], ["no_such_script.py"]])
def test_a_wrong_call_says_so(arguments: list[str]) -> None:
    """A typing mistake ends at once with a message, before anything is installed or emptied."""
    done = launch(*arguments)
    assert done.returncode == 2
    assert arguments[-1] in done.stderr or arguments[0] in done.stderr


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    """RUN_DIR is emptied only if an earlier demonstration filled it."""
    (tmp_path / "thesis.tex").write_text("years of work")
    done = launch(RUN_DIR=str(tmp_path))
    assert done.returncode != 0
    assert "RUN_DIR" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
