"""Rotten bytes and hostile files: whatever is done to a checkpoint, it is found out, or does not matter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = int(os.environ.get("SHARDCKPT_ROT_CASES", "2500"))
SEED = int(os.environ.get("SHARDCKPT_ROT_SEED", "1"))


def run(name: str, *arguments: object) -> str:
    """What a program beside this file says; it has to end well."""
    program = Path(__file__).with_name(name)
    paths = os.pathsep.join([str(program.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=170 + CASES // 10,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.timeout(180 + CASES // 10)
def test_rot_is_found_or_does_not_matter(tmp_path):
    """Nothing that rots is ever loaded in silence, kills the interpreter or takes boundless memory; verify finds it."""
    assert " 0 wrong" in run("rot.py", tmp_path, CASES, SEED)


@pytest.mark.timeout(180 + CASES // 10)
def test_what_a_hostile_writer_says_is_read_or_refused(tmp_path):
    """Whatever the manifests say, with digests that are right: our errors, bounded memory, nothing else."""
    assert " 0 wrong" in run("hostile.py", tmp_path, CASES // 5, SEED)
