"""Disks that fail, fill up, dawdle or hide what is on them, in whatever call it is that meets them."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
import shardckpt
from faults import Disk, is_shard
from shardckpt import Checkpointer, checkpointer

pytestmark = pytest.mark.usefixtures("no_lease_left")

MIB = 1 << 20


def state(value: float) -> dict[str, Any]:
    """More than one block of the storage, and what is pickled."""
    return {
        "w": torch.full((3 * MIB,), float(value)),
        "b": torch.full((3,), -float(value)),
        "odd": Path,
        "step": int(value),
    }


def found(path: Path) -> int | None:
    """Which state lies at a path, bit for bit; None for no checkpoint."""
    if not shardckpt.is_checkpoint(path):
        return None
    loaded = shardckpt.load(path, weights_only=False)
    value = loaded["step"]
    assert torch.equal(loaded["w"], torch.full((3 * MIB,), float(value)))
    assert torch.equal(loaded["b"], torch.full((3,), -float(value)))
    return int(value)


def files(path: Path) -> set[str]:
    return set(os.listdir(path)) if path.exists() else set()


def named(path: Path) -> set[str]:
    """The files that the commit record at a path names, and itself."""
    record = shardckpt.commit.find(checkpointer.open_storage(path))
    return set() if record is None else {"manifest.json", *record.manifest.file_names()}


@pytest.fixture
def disk() -> Iterator[Disk]:
    with faults.broken() as broken:
        yield broken


def is_word(path: str) -> bool:
    return ".tmp-" in path or path.endswith(".json")


def is_place(path: str) -> bool:
    return os.path.isdir(path)


SHARD_FAULTS = {
    "EIO at write": ("pwrite", errno.EIO, is_shard),
    "ENOSPC at write": ("pwrite", errno.ENOSPC, is_shard),
    "EDQUOT at write": ("pwrite", errno.EDQUOT, is_shard),
    "EFBIG at write": ("pwrite", errno.EFBIG, is_shard),
    "EIO at fsync": ("fsync", errno.EIO, is_shard),
    "EDQUOT at fsync": ("fsync", errno.EDQUOT, is_shard),
    "EROFS at create": ("open", errno.EROFS, is_shard),
    "ESTALE at truncate": ("ftruncate", errno.ESTALE, is_shard),
    "EIO at directory fsync": ("fsync", errno.EIO, is_place),
}
"""What befalls a save after its call: the system call, the error, and the paths on which it is met."""


def begin(how: str, engine: Checkpointer, value: float, path: Path) -> Callable[[], Any]:
    if how == "async":
        return engine.async_save(state(value), path).result
    return lambda: engine.save(state(value), path)


@pytest.mark.parametrize("over", (False, True), ids=("new", "overwriting"))
@pytest.mark.parametrize("how", ("sync", "async"))
@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_a_save_on_a_failing_disk(tmp_path: Path, disk: Disk, fault: str, how: str, over: bool) -> None:
    """The error is ours and names file and cause; what was there before loads, rubbish is gone, the next save works."""
    path, engine = tmp_path / "ck", Checkpointer()
    if over:
        engine.save(state(1), path)
    else:
        path.mkdir()  # whose making syncs a directory too
    call, number, matching = SHARD_FAULTS[fault]
    disk.add(call, faults.fails(number), matching=matching, last=None)
    with pytest.raises(shardckpt.ShardckptError) as caught:
        begin(how, engine, 2, path)()
    disk.clear()
    assert str(path) in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert isinstance(caught.value, shardckpt.SaveFailedError)
    assert found(path) == (1 if over else None)
    assert files(path) == named(path)
    engine.save(state(3), path)
    assert found(path) == 3
    assert files(path) == named(path)


@pytest.mark.parametrize("over", (False, True), ids=("new", "overwriting"))
@pytest.mark.parametrize("number", (errno.EIO, errno.ENOSPC, errno.ESTALE))
@pytest.mark.parametrize("call", ("replace", "link"))
def test_a_rename_that_fails_commits_nothing(tmp_path: Path, disk: Disk, call: str, number: int, over: bool) -> None:
    """The switch to the new checkpoint is one rename or link: where that fails, the old one stays."""
    path, engine = tmp_path / "ck", Checkpointer()
    if over:
        engine.save(state(1), path)
    fault = disk.add(call, faults.fails(number), matching=is_word, last=None)
    with pytest.raises(shardckpt.ShardckptError, match=os.strerror(number)):
        engine.save(state(2), path)
    assert fault.hits
    disk.clear()
    assert found(path) == (1 if over else None)
    assert files(path) == named(path)
    engine.save(state(3), path)
    assert found(path) == 3


@pytest.mark.parametrize("what", ("shard", "word"))
def test_a_failed_fsync_is_never_tried_again(tmp_path: Path, disk: Disk, what: str) -> None:
    """The kernel may have dropped what it could not write: a second fsync that succeeds would prove nothing."""
    fault = disk.add("fsync", faults.fails(errno.EIO), matching=is_shard if what == "shard" else is_word)
    with pytest.raises(shardckpt.SaveFailedError, match=os.strerror(errno.EIO)):
        Checkpointer().save(state(1), tmp_path / "ck")
    assert fault.seen == fault.hits == 1
    assert found(tmp_path / "ck") is None


def test_short_writes_and_reads_are_gone_on_with(tmp_path: Path, disk: Disk) -> None:
    """A write or read that does half of what it was asked is no error, and loses nothing."""
    short = [disk.add(call, None, last=None, matching=is_shard) for call in ("pwrite", "preadv")]
    Checkpointer().save(state(1), tmp_path / "ck")
    assert found(tmp_path / "ck") == 1
    assert all(fault.hits for fault in short)


def test_slow_writes_only_take_time(tmp_path: Path, disk: Disk) -> None:
    """A disk that dawdles is waited for."""
    slow = disk.add("pwrite", faults.is_slow(0.05), last=None)
    Checkpointer().async_save(state(1), tmp_path / "ck").result()
    assert slow.hits
    assert found(tmp_path / "ck") == 1


@pytest.mark.parametrize("number", (errno.EIO, errno.ESTALE, errno.ETIMEDOUT))
@pytest.mark.parametrize("which", ("shard", "manifest"))
def test_a_read_that_fails_is_ours_and_harms_nothing(tmp_path: Path, disk: Disk, which: str, number: int) -> None:
    """A sector that cannot be read names its file; nothing is taken for a missing checkpoint or for a damaged one."""
    path = tmp_path / "ck"
    Checkpointer().save(state(1), path)
    matching = is_shard if which == "shard" else (lambda path: path.endswith("manifest.json"))
    fault = disk.add("preadv", faults.fails(number), matching=matching, last=None)
    live = state(5)
    del live["odd"]
    with pytest.raises(shardckpt.ShardckptError, match=os.strerror(number)) as caught:
        Checkpointer().load(path, live, strict=False)
    assert fault.hits
    assert (".safetensors" if which == "shard" else "manifest.json") in str(caught.value)
    assert not isinstance(caught.value, (shardckpt.CheckpointNotFoundError, shardckpt.CorruptCheckpointError))
    disk.clear()
    assert found(path) == 1


@pytest.mark.parametrize("call", ("unlink", "fsync", "rmdir", "scandir"))
def test_a_removal_that_fails(tmp_path: Path, disk: Disk, call: str) -> None:
    """A checkpoint that could not be removed is whole or gone, and can be removed once the disk is well."""
    path, engine = tmp_path / "ck", Checkpointer()
    engine.save(state(1), path)
    fault = disk.add(call, faults.fails(errno.EIO), last=None)
    with suppress(shardckpt.StorageError):
        engine.remove(path)
    assert fault.hits
    disk.clear()
    assert found(path) in (None, 1)
    engine.remove(path)
    assert not path.exists()


@pytest.mark.parametrize("call", ("unlink", "scandir", "open", "preadv"))
def test_a_prune_that_fails_takes_nothing_that_counts(tmp_path: Path, disk: Disk, call: str) -> None:
    """Whatever prune cannot look at or remove, the checkpoint stays; later it removes the rest."""
    path, engine = tmp_path / "ck", Checkpointer()
    engine.save(state(1), path)
    rubbish = path / "rank-00000-000000000000000.safetensors"
    rubbish.write_bytes(b"x")
    fault = disk.add(call, faults.fails(errno.EIO), last=None)
    with suppress(shardckpt.StorageError):
        engine.prune(path)
    assert fault.hits
    disk.clear()
    assert found(path) == 1
    engine.prune(path)
    assert files(path) == named(path)


# -- file systems that really are so -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """30 MiB: room for two of these states and a bit."""
    if sys.platform != "linux":
        pytest.skip("mounts are Linux's")
    try:
        with faults.tmpfs(tmp_path / "disk", 30 * MIB) as where:
            yield where
    except PermissionError as error:
        pytest.skip(f"this process may not mount: {error}")


@pytest.mark.parametrize("how", ("sync", "async"))
@pytest.mark.parametrize("is_announced", (True, False))
def test_a_disk_that_is_full(small_disk: Path, monkeypatch: pytest.MonkeyPatch, how: str, is_announced: bool) -> None:
    """Known beforehand or met while writing, it is one error; the checkpoint stays, and what was begun is removed."""
    path, engine = small_disk / "ck", Checkpointer()
    engine.save(state(1), path)
    if not is_announced:
        monkeypatch.setattr("shardckpt.storage.local.LocalStorage.free_bytes", lambda self: None)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(12 * MIB))
    with pytest.raises(shardckpt.ShardckptError) as caught:
        begin(how, engine, 2, path)()
    assert str(path) in str(caught.value)
    cause = caught.value if is_announced else caught.value.__cause__
    assert isinstance(cause, shardckpt.StorageFullError)
    assert found(path) == 1
    assert files(path) == named(path)
    filler.unlink()
    engine.save(state(3), path)
    assert found(path) == 3


def test_a_full_disk_can_be_pruned_and_cleared(small_disk: Path) -> None:
    """Removing takes no room: on a disk without a free byte, checkpoints and rubbish can go."""
    path, engine = small_disk / "ck", Checkpointer()
    engine.save(state(1), path)
    (path / "rank-00000-000000000000000.safetensors").write_bytes(b"x")
    with suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while file.write(bytes(MIB // 4)):
            pass
    with suppress(OSError), open(small_disk / "crumbs", "wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass
    engine.prune(path)
    assert files(path) == named(path)
    assert found(path) == 1
    engine.remove(path)
    assert not path.exists()


def test_a_disk_mounted_read_only(small_disk: Path) -> None:
    """After errors, kernels mount a disk read-only: saves and removals are refused by name, and loads go on."""
    path, engine = small_disk / "ck", Checkpointer()
    engine.save(state(1), path)
    with faults.read_only(small_disk):
        with pytest.raises(shardckpt.StorageAccessError, match="Read-only file system"):
            engine.save(state(2), path)
        with pytest.raises(shardckpt.StorageAccessError, match="Read-only file system"):
            engine.save(state(2), small_disk / "other")
        with pytest.raises(shardckpt.StorageAccessError, match="Read-only file system"):
            engine.remove(path)
        assert engine.prune(path) == []
        assert found(path) == 1
    engine.save(state(3), path)
    assert found(path) == 3


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """Under ``ulimit -f`` a file that grows too large is an error of the save, and not a signal that ends the job."""
    path = tmp_path / "ck"
    Checkpointer().save(state(1), path)
    script = (
        "import sys, torch, shardckpt\n"
        "try:\n"
        f"    shardckpt.save({{'w': torch.zeros({3 * MIB})}}, sys.argv[1])\n"
        "except shardckpt.SaveFailedError as error:\n"
        "    assert isinstance(error.__cause__, shardckpt.StorageFullError), error\n"
        "    print(error)\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert str(path) in done.stdout
    assert found(path) == 1
    assert files(path) == named(path)


def test_the_temporary_tree_can_be_taken_away(tmp_path: Path) -> None:
    """Somebody removes the directory beneath a save that has begun: an error of ours, and the next save works."""
    path, engine = tmp_path / "run" / "ck", Checkpointer()
    pending = engine.async_save(state(1), path)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with suppress(shardckpt.SaveFailedError):
        pending.result()
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    engine.save(state(2), path)
    assert found(path) == 2
