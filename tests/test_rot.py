"""Rotten bytes: whatever happens to the files of a checkpoint, it is found out, or does not matter."""

import os
import subprocess
import sys
from pathlib import Path

CASES = int(os.environ.get("SHARDCKPT_ROT_CASES", "3000"))
SEED = int(os.environ.get("SHARDCKPT_ROT_SEED", "1"))


def test_rot_is_found_or_does_not_matter(tmp_path):
    """Nothing that rots is ever loaded in silence, kills the interpreter or takes boundless memory; verify finds it."""
    program = Path(__file__).with_name("rot.py")
    paths = os.pathsep.join([str(program.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, program, tmp_path, str(CASES), str(SEED)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120 + CASES,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " 0 wrong" in done.stdout
