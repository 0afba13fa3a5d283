"""Calls of the kernel that never return, as on a hung network file system: every wait for one has an end."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
import ranks
import shardckpt
from faults import Disk, Stall, is_shard
from multirank import stall_cases
from shardckpt import Checkpointer, checkpointer
from shardckpt.commit import clearing
from shardckpt.storage import BLOCK
from shardckpt.workers import threads, under_way

pytestmark = pytest.mark.usefixtures("no_lease_left")

TIMEOUT = 2.0
"""Seconds: ``commit_timeout``. Other calls have to return within nine tenths of it, and do within milliseconds."""
HANG_SECONDS = 60.0


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((5 * BLOCK // 4,), float(value)), "step": int(value)}


def found(path: Path) -> int | None:
    """Which state lies at a path, bit for bit; None for no checkpoint."""
    if not shardckpt.is_checkpoint(path):
        return None
    loaded = shardckpt.load(path)
    assert torch.equal(loaded["w"], state(loaded["step"])["w"])
    return int(loaded["step"])


def out(engine: Checkpointer) -> int:
    """Blocks of staging memory that somebody holds."""
    pool = engine._pool
    return pool._touched - len(pool._free)


def join_all() -> None:
    """Until the threads that were stuck are through."""
    for thread in threading.enumerate():
        if thread.name.startswith("shardckpt"):
            thread.join(HANG_SECONDS)
            assert not thread.is_alive()


@pytest.fixture
def disk() -> Iterator[Disk]:
    with faults.broken() as broken:
        yield broken


@pytest.fixture
def stall(disk: Disk) -> Iterator[Stall]:
    """What hangs until the test ends, if not before."""
    stall = Stall()
    yield stall
    stall.over.set()
    join_all()


@pytest.mark.parametrize("compression", (None, "zstd"))
@pytest.mark.parametrize(("call", "what"), (("pwrite", "write"), ("fsync", "sync"), ("ftruncate", "commit")))
def test_a_save_that_hangs_fails_in_bounded_time(
    tmp_path: Path, disk: Disk, stall: Stall, call: str, what: str, compression: Any
) -> None:
    """The error says which call on which file; the next save works; what comes to life again leaves nothing behind."""
    path, engine = tmp_path / "ck", Checkpointer(commit_timeout=TIMEOUT, compression=compression)
    engine.save(state(1), path)
    disk.add(call, stall, matching=is_shard)
    pending = engine.async_save(state(2), path)
    with pytest.raises(shardckpt.SaveFailedError, match=rf"call to {what} {path}/rank-00000-.*\.safetensors has not"):
        pending.result(HANG_SECONDS)
    assert found(path) == 1
    engine.save(state(3), path)
    assert found(path) == 3
    stall.over.set()
    join_all()
    assert found(path) == 3
    record = shardckpt.commit.find(checkpointer.open_storage(path))
    assert record is not None
    assert {file.name for file in path.iterdir()} == {"manifest.json", *record.manifest.file_names()}
    assert out(engine) == 0


def test_memory_that_a_stuck_write_may_still_read_is_not_used_again(tmp_path: Path, disk: Disk, stall: Stall) -> None:
    """What hangs is written from the memory that it was given, with the bytes that were there."""
    written: list[bytes] = []
    engine = Checkpointer(commit_timeout=TIMEOUT)
    disk.add("pwrite", stall, matching=is_shard)
    pending = engine.async_save(state(1), tmp_path / "one")
    with pytest.raises(shardckpt.SaveFailedError):
        pending.result(HANG_SECONDS)
    assert out(engine) == 1
    engine.save(state(2), tmp_path / "two")
    engine.save(state(2), tmp_path / "two")
    assert found(tmp_path / "two") == 2
    disk.saw = lambda data: written.append(bytes(data[-8:]))
    stall.over.set()
    join_all()
    assert torch.full((2,), 1.0).numpy().tobytes() in written
    assert torch.full((2,), 2.0).numpy().tobytes() not in written
    assert out(engine) == 0


@pytest.mark.parametrize("limit", (BLOCK, 3 * BLOCK))
def test_a_caller_that_waits_for_memory_is_told(tmp_path: Path, disk: Disk, stall: Stall, limit: int) -> None:
    """A save that may hold little memory waits for what a stuck write holds, in the foreground."""
    disk.add("pwrite", stall, matching=is_shard)
    engine = Checkpointer(commit_timeout=TIMEOUT, staging_limit=limit)
    big = {"w": torch.zeros(4 * BLOCK), "step": 0}
    with pytest.raises(shardckpt.SaveFailedError, match="has not returned"):
        engine.async_save(big, tmp_path / "ck").result(HANG_SECONDS)
    engine.save(state(2), tmp_path / "two")
    assert found(tmp_path / "two") == 2


def is_manifest_aside(path: str) -> bool:
    return ".tmp-" in path


@pytest.mark.parametrize("over", (False, True), ids=("new", "overwriting"))
def test_a_commit_that_hangs_is_uncertain(tmp_path: Path, disk: Disk, stall: Stall, over: bool) -> None:
    """The record may come into its place whenever the call returns, so no file that it names is removed."""
    path, engine = tmp_path / "ck", Checkpointer(commit_timeout=TIMEOUT)
    if over:
        engine.save(state(1), path)
    # The manifest's name comes by a link where there was none, by a rename where there was one.
    name = "replace" if over else "link"
    disk.add(name, stall, matching=is_manifest_aside, first=2)
    pending = engine.async_save(state(2), path)
    with pytest.raises(shardckpt.UncertainCommitError, match=r"call to write .*manifest\.json has not returned"):
        pending.result(HANG_SECONDS)
    assert found(path) == (1 if over else None)
    stall.over.set()
    join_all()
    assert found(path) == 2


def test_whoever_wakes_up_too_late_commits_nothing(tmp_path: Path, disk: Disk, stall: Stall) -> None:
    """A rank 0 that was stuck before the commit finds the save given up, and the files gone."""
    path, engine = tmp_path / "ck", Checkpointer(commit_timeout=TIMEOUT)
    engine.save(state(1), path)
    disk.add("preadv", stall, matching=lambda path: "/rank-00000" in path and path.endswith(".json"))
    with pytest.raises(shardckpt.SaveFailedError, match=r"call to read .*rank-00000.*json has not returned"):
        engine.async_save(state(2), path).result(HANG_SECONDS)
    stall.over.set()
    join_all()
    assert found(path) == 1
    engine.save(state(3), path)
    assert found(path) == 3


def test_a_place_that_hangs_fails_the_call(tmp_path: Path, disk: Disk, stall: Stall) -> None:
    """Before anything is written too: the call of the save raises, and a marker that comes late goes again."""
    path, engine = tmp_path / "ck", Checkpointer(commit_timeout=TIMEOUT)
    engine.save(state(1), path)
    disk.add("replace", stall, matching=is_manifest_aside)
    with pytest.raises(shardckpt.StorageError, match=r"call to write .*saving-.*json has not returned"):
        engine.async_save(state(2), path)
    stall.over.set()
    join_all()
    assert not clearing._leases
    assert not [*path.glob("saving-*")]
    engine.save(state(3), path)
    assert found(path) == 3


def test_tidying_that_hangs_fails_no_save(tmp_path: Path, disk: Disk, stall: Stall) -> None:
    """What a checkpoint replaced need not be gone for it to be committed."""
    path, engine = tmp_path / "ck", Checkpointer(commit_timeout=TIMEOUT)
    engine.save(state(1), path)
    disk.add("unlink", stall, matching=is_shard)
    assert engine.async_save(state(2), path).result(HANG_SECONDS)
    assert found(path) == 2


def test_a_removal_that_hangs_is_not_waited_for_and_takes_nothing_newer(
    tmp_path: Path, disk: Disk, stall: Stall
) -> None:
    """The next save goes on without it; and by the time it wakes up, another checkpoint may lie there."""
    path, engine = tmp_path / "ck", Checkpointer(commit_timeout=TIMEOUT)
    engine.save(state(1), path)
    gate = Stall()
    disk.add("pwrite", gate, matching=is_shard)
    pending = engine.async_save(state(2), tmp_path / "other")
    assert gate.begun.wait(HANG_SECONDS)
    disk.add("scandir", stall, matching=lambda where: where == str(path))
    engine.remove(path)
    gate.over.set()
    pending.result(HANG_SECONDS)
    engine.save(state(3), path)
    assert stall.begun.is_set()
    stall.over.set()
    join_all()
    assert found(path) == 3


def test_a_process_ends_though_a_write_never_does(tmp_path: Path) -> None:
    """Neither the thread that is stuck nor the one that waits for it keeps the interpreter from its exit."""
    script = (
        "import sys, threading, torch, faults, shardckpt\n"
        "forever = threading.Event()\n"
        "broken = faults.broken()\n"  # kept, so that the disk stays broken to the end
        "broken.__enter__().add('pwrite', forever.wait, matching=faults.is_shard, last=None)\n"
        f"engine = shardckpt.Checkpointer(commit_timeout={TIMEOUT})\n"
        "engine.async_save({'w': torch.zeros(9)}, sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "ck")],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([ranks.TESTS, *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    assert "has not returned" in done.stderr


@pytest.mark.parametrize("which", ("manifest.json", ".safetensors", ".json", ".pkl"))
def test_a_read_that_never_returns_is_an_error_that_names_the_file(
    tmp_path: Path, disk: Disk, stall: Stall, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """No load waits for ever for a file system that has hung, whichever file it is that does not come."""
    path = tmp_path / "ck"
    Checkpointer().save(state(1) | {"odd": Path}, path)
    monkeypatch.setattr(under_way, "READ_SECONDS", 0.5)
    monkeypatch.setattr(threads, "_LOOK_SECONDS", 0.1)

    def matching(where: str) -> bool:
        return where.endswith(which) and (which != ".json" or not where.endswith("manifest.json"))

    disk.add("preadv", stall, matching=matching)
    loading: Callable[[], Any] = lambda: shardckpt.load(path, weights_only=False)  # noqa: E731
    with pytest.raises(shardckpt.StorageError, match=rf"call to read {path}/.*{which} has not returned"):
        loading()
    assert stall.begun.is_set()
    stall.over.set()
    join_all()
    assert loading()["step"] == 1


@pytest.mark.multiprocess
@pytest.mark.parametrize("stuck", (0, 1))
def test_all_ranks_hear_of_one_that_is_stuck(tmp_path: Path, stuck: int) -> None:
    """The rank whose disk hangs says so before the others give it up, and its error is theirs."""
    for kind, text in ranks.world(2).run(stall_cases.one_is_stuck, str(tmp_path / "ck"), stuck):
        assert kind == "SaveFailedError"
        assert f"rank-0000{stuck}" in text
        assert "has not returned" in text


@pytest.mark.multiprocess
def test_a_rank_that_cannot_see_its_place_keeps_no_memory(tmp_path: Path) -> None:
    """What was staged for a shard that is never begun comes back, and whoever waits for memory is told."""
    for kind, text, held in ranks.world(2).run(stall_cases.one_cannot_look, str(tmp_path / "ck")):
        assert kind == "SaveFailedError"
        assert "Stale file handle" in text
        assert held == 0


def test_what_returns_is_forgotten() -> None:
    """The list of calls under way holds what is under way, innermost first, and nothing afterwards."""
    with under_way.call("commit", "/a/b", OSError):
        with suppress(ZeroDivisionError), under_way.call("sync", "/a/b", OSError):
            inner = under_way.longest("/a", 0)
            raise ZeroDivisionError
        outer = under_way.longest("/a/b", 0)
        assert under_way.longest("/a/bc", 0) is None
    assert inner is not None
    assert outer is not None
    assert (inner.what, outer.what) == ("sync", "commit")
    assert under_way.longest("/", 0) is None
