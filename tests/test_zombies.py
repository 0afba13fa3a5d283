"""A job that was stopped for so long that others took it for dead, and that wakes up beside the one in its place."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt import filenames
from shardckpt.commit.clearing import LEASE_SECONDS

ZOMBIE = """
import signal, sys, threading, torch, shardckpt
from shardckpt import Checkpointer, checkpointer
from storage.wrappers import WrapperStorage

path, method, begin = sys.argv[1:]

class Stopping(WrapperStorage):
    was_stopped = False

    def called(self, called, name, nbytes):
        if called == method and name.startswith(begin) and not self.was_stopped:
            self.was_stopped = True
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # by its own thread: it takes no step more

opened = checkpointer.open_storage
checkpointer.open_storage = lambda *arguments: Stopping(opened(*arguments))
try:
    Checkpointer().save({"w": torch.full((1000,), 1.0)}, path)
    print("committed")
except shardckpt.SaveFailedError as error:
    print(error)
"""
MOMENTS = [("writer.commit", "rank-"), ("put", "rank-"), ("sync", ""), ("get", "saving-")]
"""Calls of the storage before which it is stopped: the last are the very last before the commit."""


@contextmanager
def stopped(path: Path, moment: tuple[str, str]) -> Iterator[Callable[[], str]]:
    """A save that is stopped, and was so, by its marker, for longer than a lease lasts. Yields what wakes it up."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", ZOMBIE, str(path), *moment], stdout=subprocess.PIPE, text=True, env=environment
    ) as zombie:
        try:
            _, status = os.waitpid(zombie.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), "it ended before it came to where it was to be stopped"
            (marker,) = [file for file in path.iterdir() if filenames.is_marker(file.name)]
            long_ago = marker.stat().st_mtime - 2 * LEASE_SECONDS
            os.utime(marker, (long_ago, long_ago))

            def wake() -> str:
                zombie.send_signal(signal.SIGCONT)
                out, _ = zombie.communicate(timeout=60)
                assert zombie.returncode == 0
                return out

            yield wake
        finally:
            zombie.kill()


def _save(path: Path, value: float) -> None:
    shardckpt.save({"w": torch.full((1000,), value)}, path)


def _check(path: Path, value: float) -> None:
    """What is there is one whole checkpoint and nothing else."""
    assert torch.equal(shardckpt.load(path)["w"], torch.full((1000,), value))
    assert shardckpt.verify(path).ok
    assert len([*path.iterdir()]) == 3, "a manifest, a shard and its manifest"


@pytest.mark.parametrize("moment", MOMENTS[1::2], ids="-".join)
def test_who_wakes_up_in_time_commits(tmp_path: Path, moment: tuple[str, str]) -> None:
    """A pause, however long, costs no checkpoint where nobody came in between."""
    with stopped(tmp_path / "ck", moment) as wake:
        assert wake() == "committed\n"
    _check(tmp_path / "ck", 1)


@pytest.mark.parametrize("moment", MOMENTS[::2], ids="-".join)
def test_the_job_in_its_place_wins_whole(tmp_path: Path, moment: tuple[str, str]) -> None:
    """An elastic restart saves where the old job was about to: that one is told, and leaves nothing."""
    with stopped(tmp_path / "ck", moment) as wake:
        _save(tmp_path / "ck", 2)
        assert "failed" in wake()
    _check(tmp_path / "ck", 2)


@pytest.mark.parametrize(("moment", "over"), [*((moment, True) for moment in MOMENTS), (MOMENTS[1], False)])
def test_nobody_commits_what_was_cleared_up(tmp_path: Path, moment: tuple[str, str], over: bool) -> None:
    """A manifest that names files which a prune has taken would be a checkpoint that cannot be loaded."""
    if over:
        _save(tmp_path / "ck", 3)
    with stopped(tmp_path / "ck", moment) as wake:
        assert shardckpt.Checkpointer().prune(tmp_path / "ck")
        told = wake()
    assert "failed" in told
    if over:
        assert "took it for dead" in told
        _check(tmp_path / "ck", 3)
    else:
        assert not shardckpt.is_checkpoint(tmp_path / "ck")
        assert not (tmp_path / "ck").exists()
