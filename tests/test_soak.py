"""`scripts/soak.py` for a moment: nothing wrong, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "soak.py"


@pytest.mark.parametrize("seed", (1, 2))
def test_a_short_soak_finds_and_leaves_nothing(tmp_path: Path, seed: int) -> None:
    """Saves and loads on a failing disk stay right to the bit, and use up neither memory nor threads nor files."""
    found = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--rounds", "80", "--warm", "30", "--seed", str(seed), "--json", str(found)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    figures = json.loads(found.read_text()) if found.exists() else {}
    assert done.returncode == 0, (figures.get("wrong"), done.stderr[-3000:])
    assert figures["wrong"] == []
    assert min(figures[what] for what in ("saves", "committed", "failed_saves", "loads", "faults")) > 10


def test_a_leak_is_told_by_the_exit_code(tmp_path: Path) -> None:
    """A soak that cannot fail shows nothing: one file left open at each load is found."""
    script = (
        "import os, runpy, sys\n"
        "import shardckpt\n"
        "load = shardckpt.Checkpointer.load\n"
        "def leaking(self, *arguments, **options):\n"
        "    os.open('/dev/null', os.O_RDONLY)\n"
        "    return load(self, *arguments, **options)\n"
        "shardckpt.Checkpointer.load = leaking\n"
        "sys.argv = ['soak', '--rounds', '30', '--warm', '10']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert any(line.startswith("descriptors grew") for line in json.loads(done.stdout)["wrong"])
