"""The commit protocol: what any crash leaves, who wins, and what may be deleted."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt import Checkpointer, checkpointer, commit, coordinator, filenames
from shardckpt.background import Background
from shardckpt.commit import clearing
from shardckpt.saving import halves
from shardckpt.storage import Storage, open_storage, posix
from storage.wrappers import FaultyStorage, SlowStorage, WrapperStorage

pytestmark = pytest.mark.usefixtures("no_lease_left")

BROKEN = shardckpt.StorageError("the cable is out")


class Crash(BaseException):
    """The process is gone: nothing it still meant to do happens."""


class CrashingStorage(WrapperStorage):
    """From its n-th call on (from 1) every call raises; ``calls`` lists those that came through."""

    def __init__(self, inner: Storage, error: BaseException, at: int, *, once: bool = False) -> None:
        super().__init__(inner)
        self.error = error
        self.at = at
        self.once = once
        self.calls: list[tuple[str, str]] = []
        self._seen = 0
        self._lock = threading.Lock()

    def called(self, method: str, name: str, nbytes: int) -> None:
        with self._lock:
            self._seen += 1
            hit = self._seen == self.at if self.once else self._seen >= self.at
            if not hit:
                self.calls.append((method, name))
        if hit:
            raise self.error


Wrap = Callable[[Callable[[Storage], Storage]], None]


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> Wrap:
    """Have every storage that a Checkpointer opens from now on wrapped in what the argument makes of it."""
    original = checkpointer.open_storage

    def wrap(make: Callable[[Storage], Storage]) -> None:
        monkeypatch.setattr(checkpointer, "open_storage", lambda *args: make(original(*args)))

    return wrap


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((5, 7), value), "b": torch.full((3,), -value), "odd": Path, "step": int(value)}


def found(path: Path) -> int | None:
    """Which state lies at a path: its value, or None for no checkpoint. A mixture fails."""
    if not shardckpt.is_checkpoint(path):
        with pytest.raises(shardckpt.CheckpointNotFoundError):
            shardckpt.load(path)
        return None
    loaded = shardckpt.load(path, weights_only=False)
    value = loaded["step"]
    assert torch.equal(loaded["w"], torch.full((5, 7), float(value)))
    assert torch.equal(loaded["b"], torch.full((3,), -float(value)))
    assert loaded["odd"] is Path
    return int(value)


def files(path: Path) -> list[str]:
    return sorted(os.listdir(path)) if path.exists() else []


def ours(path: Path) -> set[str]:
    """The files that the commit record at a path names, and itself."""
    record = shardckpt.commit.find(checkpointer.open_storage(path))
    assert record is not None
    return {"manifest.json", *record.manifest.file_names()}


def calls_of_a_save(tmp_path: Path, wrapped: Wrap, *, over: bool) -> int:
    path = tmp_path / "counted"
    if over:
        Checkpointer().save(state(1), path)
    storages: list[CrashingStorage] = []
    wrapped(lambda inner: storages.append(CrashingStorage(inner, Crash(), 10**6)) or storages[-1])
    Checkpointer().save(state(2), path)
    return len(storages[0].calls)


def crashing(at: int, *, once: bool) -> Callable[..., Storage]:
    return lambda *args: CrashingStorage(open_storage(*args), BROKEN, at, once=once)


@pytest.mark.parametrize("over", (False, True), ids=("new", "overwriting"))
def test_a_crash_at_any_storage_call_leaves_one_whole_checkpoint_or_none(tmp_path, wrapped, monkeypatch, over):
    """Whatever call is the last, what lies there is the old checkpoint or the new one; the next save tidies up."""
    total = calls_of_a_save(tmp_path, wrapped, over=over)
    monkeypatch.undo()
    assert total > 12
    seen = set()
    for at in range(1, total + 1):
        path = tmp_path / f"at-{at}"
        if over:
            Checkpointer().save(state(1), path)
        with monkeypatch.context() as patch:
            # Dead processes run no clean-up: all later calls fail as well, whatever the code makes of it.
            patch.setattr(checkpointer, "open_storage", crashing(at, once=False))
            with suppress(shardckpt.ShardckptError):
                Checkpointer().save(state(2), path)
        seen.add(found(path))
        Checkpointer().save(state(3), path)
        assert found(path) == 3
        assert set(files(path)) == ours(path)
    assert seen == ({1, 2} if over else {None, 2})


@pytest.mark.parametrize("over", (False, True), ids=("new", "overwriting"))
def test_one_failing_call_is_an_error_or_harmless(tmp_path, wrapped, monkeypatch, over):
    """A storage that fails once: either the save raises and leaves nothing of its own, or it is committed and whole."""
    total = calls_of_a_save(tmp_path, wrapped, over=over)
    monkeypatch.undo()
    for at in range(1, total + 1):
        path = tmp_path / f"at-{at}"
        if over:
            Checkpointer().save(state(1), path)
        before = files(path)
        with monkeypatch.context() as patch:
            patch.setattr(checkpointer, "open_storage", crashing(at, once=True))
            told = _outcome(lambda path=path: Checkpointer().save(state(2), path))
        if isinstance(told, shardckpt.ShardckptError):
            assert "the cable is out" in str(told)
            assert found(path) == (1 if over else None)
            assert files(path) == before
        else:
            assert found(path) == 2


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from shardckpt import Checkpointer, checkpointer
from storage.wrappers import WrapperStorage

original = checkpointer.open_storage
at = 0

class Killing(WrapperStorage):
    seen = 0
    def called(self, method, name, nbytes):
        Killing.seen += 1
        if Killing.seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

checkpointer.open_storage = lambda *a: Killing(original(*a))
for number, path in enumerate(sys.argv[1:], 1):
    child = os.fork()
    if child == 0:
        at = number
        w = torch.full((5, 7), 2.0)
        Checkpointer().save({{"w": w, "b": torch.full((3,), -2.0), "odd": Path, "step": 2}}, path)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_sigkill_at_storage_calls(tmp_path):
    """A process that really dies, at each storage call in turn, leaves the old checkpoint or the new one."""
    paths = [tmp_path / f"at-{at:02d}" for at in range(1, 24)]
    for path in paths:
        Checkpointer().save(state(1), path)
    code = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, timeout=120, check=True
    )
    statuses = [int(line) for line in done.stdout.split()]
    killed = [os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL for status in statuses]
    assert sum(killed) >= 12
    outcomes = []
    for path in paths:
        outcomes.append(found(path))
        Checkpointer().save(state(3), path)
        assert found(path) == 3
        assert set(files(path)) == ours(path)
    assert set(outcomes) == {1, 2}
    assert outcomes == sorted(outcomes)


def test_the_manifest_comes_last(tmp_path, wrapped):
    """Every byte that the commit record names is durable before it is written, and clearing up comes after."""
    path = tmp_path / "ck"
    Checkpointer().save(state(1), path)
    old = ours(path)
    storages: list[CrashingStorage] = []
    wrapped(lambda inner: storages.append(CrashingStorage(inner, Crash(), 10**6)) or storages[-1])
    Checkpointer().save(state(2), path)
    calls = storages[0].calls
    publish = calls.index(("put", "manifest.json"))
    for name in ours(path) - {"manifest.json"}:
        durable = [i for i, call in enumerate(calls) if call in (("writer.commit", name), ("put", name))]
        assert durable
        assert max(durable) < publish
    assert ("sync", "") in calls[:publish]
    deleted = {name for method, name in calls if method == "delete"}
    assert old - {"manifest.json"} <= deleted
    assert all(i > publish for i, (method, _) in enumerate(calls) if method == "delete")


def test_fsync_precedes_the_commit(tmp_path, monkeypatch):
    """On a local disk the files and the directory are synced before manifest.json gets its name."""
    events: list[str] = []
    real_fsync, real_replace, real_link = os.fsync, os.replace, os.link

    def name_of(descriptor: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(f"fsync {name_of(fd)}"), real_fsync(fd))[1])
    monkeypatch.setattr(
        os, "replace", lambda a, b: (events.append(f"name {os.path.basename(b)}"), real_replace(a, b))[1]
    )
    monkeypatch.setattr(
        os, "link", lambda a, b, **o: (events.append(f"name {os.path.basename(b)}"), real_link(a, b, **o))[1]
    )
    Checkpointer().save(state(1), tmp_path / "ck")
    commit_at = events.index("name manifest.json")
    (shard,) = [name for name in files(tmp_path / "ck") if name.endswith(".safetensors")]
    assert f"fsync {shard}" in events[:commit_at]
    assert events[commit_at - 1].startswith("fsync .tmp-")
    assert "fsync ck" in events[:commit_at]
    assert events[commit_at + 1] == "fsync ck"


# -- two writers ----------------------------------------------------------------------------------------------------


def two_writers(path: Path, wrapped: Wrap, *, second_first: bool) -> tuple[Any, Any]:
    """Two saves to one path that overlap; the later one commits first, or last. What became of each."""
    gate = threading.Event()

    class Waiting(WrapperStorage):
        def called(self, method: str, name: str, nbytes: int) -> None:
            if method == "sync":
                gate.wait(30)

    original = checkpointer.open_storage
    checkpointer.open_storage = lambda *a: Waiting(original(*a))  # type: ignore[assignment]
    slow = Checkpointer()
    try:
        if second_first:
            pending = slow.async_save(state(1), path)
            checkpointer.open_storage = original
            fast = _outcome(lambda: Checkpointer().save(state(2), path))
        else:
            quick = Checkpointer()
            checkpointer.open_storage = lambda *a: SlowStorage(original(*a), delay=0.2, methods=["writer.commit"])  # type: ignore[assignment]
            earlier = quick.async_save(state(2), path)
            checkpointer.open_storage = lambda *a: Waiting(original(*a))  # type: ignore[assignment]
            pending = slow.async_save(state(1), path)
            fast = _outcome(lambda: earlier.result(30))
    finally:
        checkpointer.open_storage = original
        gate.set()
    return fast, _outcome(lambda: pending.result(30))


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except shardckpt.ShardckptError as error:
        return error


@pytest.mark.parametrize("over", (False, True), ids=("new", "overwriting"))
@pytest.mark.parametrize("second_first", (True, False))
def test_of_two_writers_one_wins_and_loses_nothing(tmp_path, wrapped, over, second_first):
    """Two jobs save to one path: the first to commit stands whole, the other is told so, and leaves nothing."""
    path = tmp_path / "ck"
    if over:
        Checkpointer().save(state(9), path)
    fast, slow = two_writers(path, wrapped, second_first=second_first)
    assert isinstance(fast, shardckpt.SaveReport)
    assert isinstance(slow, shardckpt.SaveFailedError)
    assert "another save was committed to" in str(slow)
    assert "Two jobs must not save to one path" in str(slow)
    assert found(path) == 2
    assert set(files(path)) == ours(path)


def test_clearing_spares_a_save_that_is_alive(tmp_path, wrapped):
    """A commit removes no file of a save that still runs, whichever began first."""
    path = tmp_path / "ck"
    gate = threading.Event()

    class Waiting(WrapperStorage):
        def called(self, method: str, name: str, nbytes: int) -> None:
            if method == "sync":
                gate.wait(30)

    original = checkpointer.open_storage
    wrapped(Waiting)
    pending = Checkpointer().async_save(state(1), path)
    checkpointer.open_storage = original
    deadline = time.monotonic() + 20
    while not any(name.endswith(f"{pending.save_id}.json") and "rank" in name for name in files(path)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    Checkpointer().save(state(2), path)
    assert filenames.shard_name(0, pending.save_id) in files(path)
    assert filenames.marker_name(pending.save_id) in files(path)
    shardckpt.commit.remove(original(path))
    assert filenames.shard_name(0, pending.save_id) in files(path)
    gate.set()
    pending.result(30)
    assert found(path) == 1
    assert set(files(path)) == ours(path)


def marker_of(path: Path, save_id: str, **fields: Any) -> Path:
    """A dead save's remains: a shard and a marker that says ``fields``."""
    path.mkdir(exist_ok=True)
    (path / filenames.shard_name(0, save_id)).write_bytes(b"half")
    marker = path / filenames.marker_name(save_id)
    marker.write_text(json.dumps(fields))
    return marker


def test_which_remains_are_rubbish(tmp_path):
    """Dead: no marker, a marker of a process that is gone, one not renewed. Alive: another host's, renewed just now."""
    path = tmp_path / "ck"
    gone = subprocess.Popen(["true"])
    gone.wait()
    marker_of(path, "aaaaaaaaaaaaaa1").unlink()
    marker_of(path, "aaaaaaaaaaaaaa2", machine=clearing._machine(), pid=gone.pid)
    old = marker_of(path, "aaaaaaaaaaaaaa3", machine="elsewhere", pid=1)
    os.utime(old, (1e9, 1e9))
    # Its own process, but no save that it leads: a save whose clearing up failed.
    marker_of(path, "aaaaaaaaaaaaaa4", machine=clearing._machine(), pid=os.getpid())
    marker_of(path, "zzzzzzzzzzzzzz5", machine="elsewhere", pid=1)
    marker_of(path, "aaaaaaaaaaaaaa6", machine=clearing._machine(), pid=os.getppid())
    aside = path / ".tmp-0123456789abcdef"
    aside.write_bytes(b"")
    fresh = path / ".tmp-0123456789abcdee"
    fresh.write_bytes(b"")
    os.utime(aside, (1e9, 1e9))
    Checkpointer().save(state(1), path)
    left = set(files(path)) - ours(path)
    alive = ("zzzzzzzzzzzzzz5", "aaaaaaaaaaaaaa6")
    assert left == {f(s) for s in alive for f in (filenames.marker_name, lambda s: filenames.shard_name(0, s))} | {
        fresh.name
    }


def test_prune(tmp_path):
    """What dead saves left goes without another save; the checkpoint, live saves and files of others stay."""
    path = tmp_path / "ck"
    Checkpointer().save(state(1), path)
    marker_of(path, "aaaaaaaaaaaaaa1").unlink()
    marker_of(path, "zzzzzzzzzzzzzz5", machine="elsewhere", pid=1)
    (path / "notes.txt").write_text("mine")
    assert Checkpointer().prune(path) == [filenames.shard_name(0, "aaaaaaaaaaaaaa1")]
    alive = {filenames.marker_name("zzzzzzzzzzzzzz5"), filenames.shard_name(0, "zzzzzzzzzzzzzz5"), "notes.txt"}
    assert set(files(path)) == ours(path) | alive
    assert Checkpointer().prune(path) == []
    assert shardckpt.is_checkpoint(path)
    marker_of(tmp_path / "none", "aaaaaaaaaaaaaa1").unlink()
    assert len(Checkpointer().prune(tmp_path / "none")) == 1
    assert not (tmp_path / "none").exists()


def test_prune_at_every_step_of_a_save(tmp_path, wrapped):
    """Whoever prunes beside a save of the same process, at whatever moment, takes nothing that it needs."""
    path = tmp_path / "ck"
    Checkpointer().save(state(1), path)
    original = checkpointer.open_storage
    pruned: list[str] = []

    class Pruned(WrapperStorage):
        def called(self, method: str, name: str, nbytes: int) -> None:
            pruned.extend(commit.prune(original(path)))

        def put(self, name: str, data: bytes, *, replace: bool | bytes, durable: bool = True) -> None:
            super().put(name, data, replace=replace, durable=durable)
            self.called("put is over", name, 0)

    wrapped(Pruned)
    for number in (2, 3):
        Checkpointer().save(state(number), path)
        assert found(path) == number
    assert set(files(path)) == ours(path)
    # What the new one replaces, and its marker, may go as soon as it is committed.
    assert pruned
    assert not set(pruned) & ours(path)


def test_a_save_that_commits_amid_a_prune_keeps_its_files(tmp_path, wrapped):
    """Of a save that ends between the looks of a prune, the prune sees the lease or the commit."""
    path = tmp_path / "ck"
    writes, cleans = threading.Event(), threading.Event()

    class Held(WrapperStorage):
        """Commits when it may, and then stops before its marker goes."""

        def called(self, method: str, name: str, nbytes: int) -> None:
            if method == "sync":
                assert writes.wait(30)
            if method == "delete":
                cleans.set()
                assert done.wait(30)

    class Looking(WrapperStorage):
        """Lets the save commit right after it has looked for a commit record."""

        def get(self, name: str, *, limit: int = 1 << 20) -> bytes:
            try:
                return self.inner.get(name, limit=limit)
            finally:
                if name == filenames.MANIFEST:
                    writes.set()
                    assert cleans.wait(30)

    done = threading.Event()
    original = checkpointer.open_storage
    wrapped(Held)
    pending = Checkpointer().async_save(state(1), path)
    deadline = time.monotonic() + 20
    while filenames.rank_manifest_name(0, pending.save_id) not in files(path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert commit.prune(Looking(original(path))) == []
    done.set()
    pending.result(30)
    assert found(path) == 1


def test_prune_goes_by_the_clock_of_the_storage(tmp_path, monkeypatch):
    """A clock here that is ahead of the file server's makes no live save on another machine look dead."""
    path = tmp_path / "ck"
    marker = marker_of(path, "zzzzzzzzzzzzzz5", machine="elsewhere", pid=1)
    now = time.time()
    monkeypatch.setattr(clearing.time, "time", lambda: now + 3600)
    assert Checkpointer().prune(path) == []
    os.utime(marker, (now - 3600, now - 3600))
    assert len(Checkpointer().prune(path)) == 2


def test_files_of_users_that_are_named_like_ours_stay(tmp_path):
    """``.tmp-`` begins many a name; ours go on with 16 digits, and nothing else is rubbish for its age."""
    path = tmp_path / "ck"
    Checkpointer().save(state(1), path)
    theirs = [path / name for name in (".tmp-notes.txt", ".tmp-0123456789abcdef.bak", ".tmp-0123456789ABCDEF")]
    for file in theirs:
        file.write_bytes(b"mine")
        os.utime(file, (1e9, 1e9))
    assert Checkpointer().prune(path) == []
    Checkpointer().save(state(2), path)
    shardckpt.commit.remove(open_storage(path))
    assert {file.name for file in theirs} == set(files(path))


def test_a_running_save_renews_its_marker(tmp_path, wrapped, monkeypatch):
    """A save that takes longer than a lease keeps it: the marker's time moves on while it runs, and ends with it."""
    monkeypatch.setattr(clearing, "RENEW_SECONDS", 0.02)
    path = tmp_path / "ck"
    wrapped(lambda inner: SlowStorage(inner, delay=0.3, methods=["writer.commit"]))
    pending = Checkpointer().async_save(state(1), path)
    marker = path / filenames.marker_name(pending.save_id)
    first = marker.stat().st_mtime_ns
    time.sleep(0.15)
    assert marker.stat().st_mtime_ns > first
    pending.result(30)
    assert set(files(path)) == ours(path)
    assert not [t for t in threading.enumerate() if t.name == "shardckpt-lease"]


# -- the moment of the commit ---------------------------------------------------------------------------------------


class LostAnswer(WrapperStorage):
    """The put of manifest.json succeeds, but its answer is lost; ``silent`` storages answer nothing from then on."""

    def __init__(
        self, inner: Storage, *, silent: bool, lands: bool = True, error: Exception = BROKEN, has_places: bool = True
    ) -> None:
        super().__init__(inner)
        self.has_places = has_places
        self.error = error
        self.silent = silent
        self.lands = lands
        self.lost = False

    def called(self, method: str, name: str, nbytes: int) -> None:
        if self.lost and self.silent:
            raise BROKEN

    def put(self, name: str, data: bytes, *, replace: bool | bytes, durable: bool = True) -> None:
        if name != "manifest.json":
            return super().put(name, data, replace=replace, durable=durable)
        if self.lands:
            super().put(name, data, replace=replace, durable=durable)
        self.lost = True
        raise self.error


@pytest.mark.parametrize("over", (False, True), ids=("new", "overwriting"))
def test_a_lost_answer_to_a_commit_that_landed_is_success(tmp_path, wrapped, over):
    """The storage took the manifest and only its answer was lost: the save succeeded and is whole."""
    path = tmp_path / "ck"
    if over:
        Checkpointer().save(state(1), path)
    path.mkdir(exist_ok=True)
    wrapped(lambda inner: LostAnswer(inner, silent=False, has_places=False))  # an object store: what it shows lasts
    Checkpointer().save(state(2), path)
    assert found(path) == 2
    assert set(files(path)) == ours(path)


def test_an_answer_that_nfs_lost_is_success(tmp_path, wrapped):
    """It asks again when the answer to a new name is lost, and hears of the name that it has made itself."""
    path = tmp_path / "ck"
    wrapped(lambda inner: LostAnswer(inner, silent=False, error=shardckpt.errors.ObjectExistsError("it exists")))
    Checkpointer().save(state(2), path)
    assert found(path) == 2
    assert set(files(path)) == ours(path)


@pytest.mark.parametrize("lands", (True, False))
@pytest.mark.parametrize("over", (False, True), ids=("new", "overwriting"))
def test_a_storage_that_falls_silent_at_the_commit_loses_nothing(tmp_path, wrapped, over, lands):
    """Nobody can know whether the commit happened: no file is deleted, so whichever record is there is whole."""
    path = tmp_path / "ck"
    if over:
        Checkpointer().save(state(1), path)
    wrapped(lambda inner: LostAnswer(inner, silent=True, lands=lands))
    with pytest.raises(shardckpt.UncertainCommitError, match="cannot be asked whether it was"):
        Checkpointer().save(state(2), path)
    assert found(path) == (2 if lands else 1 if over else None)


@pytest.mark.parametrize("silent", (True, False))
def test_a_report_tells_a_lost_save_from_one_that_may_be_there(tmp_path, wrapped, silent):
    """Who goes on after a failed save has to know whether the path may hold it, without reading prose."""
    wrapped(lambda inner: LostAnswer(inner, silent=True) if silent else FaultyStorage(inner, "create", BROKEN))
    report = Checkpointer(on_save_error="warn").save(state(1), tmp_path / "ck")
    assert report.error is not None
    assert report.uncertain is silent
    assert ("uncertain: " in repr(report)) is silent


@pytest.mark.parametrize("method", ("list", "get", "delete"))
def test_nothing_after_the_commit_fails_the_save(tmp_path, wrapped, caplog, method):
    """Once committed, a save is a success, though what it replaced may have to stay; that is logged."""
    path = tmp_path / "ck"
    Checkpointer().save(state(1), path)

    class AfterCommit(WrapperStorage):
        committed = False

        def called(self, called: str, name: str, nbytes: int) -> None:
            if self.committed and called == method:
                raise RuntimeError("no")
            self.committed |= (called, name) == ("put", "manifest.json")

    wrapped(AfterCommit)
    Checkpointer().save(state(2), path)
    assert found(path) == 2
    assert ("could not be removed" in caplog.text) == (method != "get" or "could not" in caplog.text)


def test_a_damaged_checkpoint_can_be_overwritten(tmp_path):
    """A path whose manifest is garbage is not lost for ever: the next save replaces it."""
    path = tmp_path / "ck"
    Checkpointer().save(state(1), path)
    (path / "manifest.json").write_bytes(b"garbage")
    Checkpointer().save(state(2), path)
    assert found(path) == 2
    assert set(files(path)) == ours(path)


def check_gone_and_again(engine: Checkpointer, path: Path, broken: pytest.MonkeyPatch) -> None:
    """Nothing is left of a save that failed, and the next one, with what was broken mended, works."""
    assert not path.exists()
    broken.undo()
    engine.save(state(1), path)
    assert found(path) == 1


def test_a_failed_plan_is_everybodys_failure(tmp_path, monkeypatch):
    """What goes wrong between the agreement and the staging still ends the save, and leaves no marker behind."""

    def broken(*_: Any, **__: Any) -> Any:
        raise shardckpt.UsageError("too many tensors for one file")

    monkeypatch.setattr(halves, "ShardWriter", broken)
    engine = Checkpointer()
    pending = engine.async_save(state(1), tmp_path / "ck")
    with pytest.raises(shardckpt.SaveFailedError, match="too many tensors"):
        pending.result(30)
    check_gone_and_again(engine, tmp_path / "ck", monkeypatch)


def test_ctrl_c_before_staging_ends_the_save(tmp_path, monkeypatch):
    """The others are under way by then: the verdict is a failure, told at the next call, and no marker is left."""

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(halves, "ShardWriter", interrupted)
    engine = Checkpointer()
    with pytest.raises(KeyboardInterrupt):
        engine.async_save(state(1), tmp_path / "ck")
    with pytest.raises(shardckpt.SaveFailedError, match="interrupted by KeyboardInterrupt"):
        engine.wait()
    check_gone_and_again(engine, tmp_path / "ck", monkeypatch)


@pytest.mark.parametrize(
    ("limit", "is_warm", "expected"),
    [
        (None, True, ["staged", "write"]),
        (None, False, ["write", "staged"]),
        (16 << 20, True, ["write", "staged"]),
        (40 << 20, True, ["staged", "write"]),
    ],
)
def test_writing_waits_for_staging_where_memory_allows(tmp_path, monkeypatch, limit, is_warm, expected):
    """The caller waits for copies alone; where memory is short, or has yet to be touched, blocks must come back."""
    events: list[str] = []
    begun = threading.Event()
    original_open, original_stage = checkpointer.open_storage, halves.stage

    def stage(*args: Any, **kwargs: Any) -> None:
        # A save that writes beside staging has begun before; one that doesn't would never begin.
        begun.wait(10 if expected[0] == "write" else 0)
        original_stage(*args, **kwargs)
        events.append("staged")

    class Noting(WrapperStorage):
        def called(self, method: str, name: str, nbytes: int) -> None:
            if method == "create":
                events.append("write")
                begun.set()

    monkeypatch.setattr(checkpointer, "open_storage", lambda *args: Noting(original_open(*args)))
    monkeypatch.setattr(halves, "stage", stage)
    engine = Checkpointer(staging_limit=limit)
    tensors = {"a": torch.arange(7 << 20, dtype=torch.int32)}
    if is_warm:
        engine._pool.reserve(40 << 20)
    engine.async_save(tensors, tmp_path / "ck").result(30)
    assert events == expected
    assert torch.equal(shardckpt.load(tmp_path / "ck")["a"], tensors["a"])
    engine.close()


def test_a_save_warms_memory_for_the_next(tmp_path):
    """Only the first save of a process touches memory, and it doesn't wait for all of that."""
    engine = Checkpointer()
    engine.async_save({"a": torch.zeros(20 << 20, dtype=torch.uint8)}, tmp_path / "ck").result(30)
    until = time.monotonic() + 30
    while engine._pool.nbytes < 24 << 20 and time.monotonic() < until:
        time.sleep(0.01)
    assert engine._pool.nbytes == 24 << 20
    engine.close()


def test_a_save_that_gets_no_thread_fails_on_all_ranks(tmp_path, monkeypatch):
    """A process at its limit of threads joins the verdict in the caller's thread; nobody waits for it in vain."""
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "shardckpt-background":
            raise RuntimeError("can't start new thread")
        start(self)

    engine = Checkpointer()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    pending = engine.async_save(state(1), tmp_path / "ck")
    with pytest.raises(shardckpt.SaveFailedError, match="can't start new thread"):
        pending.result(30)
    check_gone_and_again(engine, tmp_path / "ck", monkeypatch)


def test_an_interrupt_before_staging_ends_the_save(tmp_path, monkeypatch):
    """Ctrl-C just as staging begins leaves no background that waits for it, and a process that can end."""
    engine = Checkpointer()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(halves._Staging, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.async_save(state(1), tmp_path / "ck")
    with pytest.raises(shardckpt.SaveFailedError, match="KeyboardInterrupt"):
        engine.wait()
    check_gone_and_again(engine, tmp_path / "ck", monkeypatch)


def test_an_interrupt_at_the_start_of_the_background_keeps_its_job(monkeypatch):
    """Ctrl-C while the thread starts: the job is done, and waited for, since other ranks count on it."""
    background, go, done = Background(), threading.Event(), threading.Event()
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        start(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            background.submit(lambda: (go.wait(30), done.set()))
    assert background.busy
    go.set()
    background.wait()
    assert done.is_set()


def test_an_interrupt_before_the_background_starts_ends_the_save(tmp_path, monkeypatch):
    """Ctrl-C before there is a thread: the others are told by this one, and nobody waits for a thread that is none."""
    engine = Checkpointer()
    init = threading.Thread.__init__

    def interrupted(self: threading.Thread, *args: Any, **options: Any) -> None:
        if options.get("name") == "shardckpt-background":
            raise KeyboardInterrupt
        init(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.async_save(state(1), tmp_path / "ck")
    assert not engine._background.busy
    with pytest.raises(shardckpt.SaveFailedError, match="KeyboardInterrupt"):
        engine.wait()
    check_gone_and_again(engine, tmp_path / "ck", monkeypatch)


def test_a_failed_save_keeps_no_tensor(tmp_path, monkeypatch):
    """Its error is kept until somebody asks, and memory that training needs would be kept by its traceback."""
    engine = Checkpointer()
    tensor = torch.ones(1000)
    found = weakref.ref(tensor)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr("shardckpt.storage.local.LocalWriter.commit", refuse)
    pending = engine.async_save({"t": tensor}, tmp_path / "ck")
    assert isinstance(pending.outcome(), shardckpt.SaveFailedError)
    engine._background.wait()
    del tensor
    assert found() is None
    with pytest.raises(shardckpt.SaveFailedError, match="bad sector"):
        pending.result()


def test_saves_that_share_do_not_keep_each_other(tmp_path):
    """A run that saves one state under a thousand names would keep what each of them was made of."""
    engine = Checkpointer()
    state = {"t": torch.ones(4), "step": 0}
    jobs = []
    for number in range(4):
        engine.save(state, tmp_path / str(number), state_version=1)
        assert engine._series._last is not None
        jobs.append(weakref.ref(engine._series._last.job))
    engine.wait()
    gc.collect()
    assert [job() is not None for job in jobs] == [False, False, False, True]
    assert shardckpt.load(tmp_path / "3")["step"] == 0


def test_a_commit_that_may_not_last_removes_nothing(tmp_path, monkeypatch):
    """The record is in place, and its directory could not be synced: what it replaces may be what is left."""
    engine = Checkpointer()
    engine.save(state(1), tmp_path / "ck")
    before = ours(tmp_path / "ck") - {"manifest.json"}
    replace = os.replace
    asked: list[str] = []

    def replacing(source: str, target: str) -> None:
        replace(source, target)
        if target.endswith("manifest.json"):
            monkeypatch.setattr(posix, "sync_directory", refuse)

    def refuse(directory: str) -> None:
        asked.append(directory)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", replacing)
    with pytest.raises(shardckpt.UncertainCommitError, match="may be lost if the machine fails now"):
        engine.save(state(2), tmp_path / "ck")
    assert len(asked) == 1, "after a failed fsync one that works proves nothing"
    assert before <= set(files(tmp_path / "ck"))
    monkeypatch.undo()
    assert found(tmp_path / "ck") == 2
    engine.save(state(3), tmp_path / "ck")
    assert found(tmp_path / "ck") == 3
    assert not before & set(files(tmp_path / "ck"))


def test_what_another_rank_spoils_is_taken_back(tmp_path, monkeypatch):
    """Rank 0 has opened the place when another rank fails to come: no marker, no lease and no directory is left."""
    solo = coordinator.operation.SoloOperation
    agree = solo.agree

    def late(self: Any, point: str, word: bytes | Exception, timeout: float | None = None) -> list[bytes]:
        if point == "place":
            assert files(tmp_path / "ck")
            raise shardckpt.RankTimeoutError("rank 1 did not come")
        return agree(self, point, word, timeout)

    monkeypatch.setattr(solo, "agree", late)
    with pytest.raises(shardckpt.RankTimeoutError):
        Checkpointer().save(state(1), tmp_path / "ck")
    assert files(tmp_path) == []
    assert not clearing._leases


# -- removal --------------------------------------------------------------------------------------------------------


def test_removal_takes_the_manifest_first(tmp_path, wrapped):
    """A removal that is cut short leaves no checkpoint, never half of one; the next one takes the rest."""
    path = tmp_path / "ck"
    Checkpointer().save(state(1), path)
    names = files(path)
    for first in range(1, len(names) + 1):
        Checkpointer().save(state(1), path)
        storage = CrashingStorage(checkpointer.open_storage(path), BROKEN, 10**6)
        commit.remove(storage)
        assert next(name for method, name in storage.calls if method == "delete") == "manifest.json"
        assert not path.exists()
        Checkpointer().save(state(1), path)
        with pytest.raises(shardckpt.StorageError):
            commit.remove(FaultyStorage(checkpointer.open_storage(path), "delete", BROKEN, first=first, last=10**6))
        assert found(path) == (1 if first == 1 else None)
        Checkpointer().remove(path)
        assert not path.exists()


def test_removal_spares_foreign_files(tmp_path):
    """What shardckpt did not write is not its to delete, nor the directory it lies in."""
    path = tmp_path / "ck"
    Checkpointer().save(state(1), path)
    (path / "notes.txt").write_text("mine")
    (path / "sub").mkdir()
    Checkpointer().save(state(2), path)
    Checkpointer().remove(path)
    assert files(path) == ["notes.txt", "sub"]


def test_removing_nothing_is_fine(tmp_path):
    """A second removal, or one of a path that never was, does nothing and makes nothing."""
    Checkpointer().remove(tmp_path / "none")
    assert files(tmp_path) == []
    (tmp_path / "empty").mkdir()
    Checkpointer().remove(tmp_path / "empty")
    assert files(tmp_path) == []


def test_a_link_is_unlinked_and_never_followed(tmp_path):
    """Removing or overwriting ``last.ckpt`` must not touch the checkpoint it points to."""
    Checkpointer().save(state(1), tmp_path / "step=1.ckpt")
    link = tmp_path / "last.ckpt"
    link.symlink_to("step=1.ckpt")
    assert found(link) == 1
    Checkpointer().remove(link)
    assert files(tmp_path) == ["step=1.ckpt"]
    link.symlink_to("step=1.ckpt")
    Checkpointer().save(state(2), link)
    assert not link.is_symlink()
    assert (found(tmp_path / "step=1.ckpt"), found(link)) == (1, 2)


def slow_or_failing(wrapped: Wrap, *, fails: bool) -> None:
    class Both(SlowStorage):
        def called(self, method: str, name: str, nbytes: int) -> None:
            super().called(method, name, nbytes)
            if fails and method == "writer.commit":
                raise BROKEN

    wrapped(lambda inner: Both(inner, delay=0.3, methods=["writer.commit"]))


@pytest.mark.parametrize("fails", (False, True))
def test_removal_during_a_save_waits_and_is_dropped_if_it_fails(tmp_path, monkeypatch, wrapped, fails, caplog):
    """The last good checkpoint outlives the save that is to replace it, however that ends."""
    engine = Checkpointer()
    engine.save(state(1), tmp_path / "old")
    slow_or_failing(wrapped, fails=fails)
    pending = engine.async_save(state(2), tmp_path / "new")
    engine.remove(tmp_path / "old")
    assert found(tmp_path / "old") == 1
    if fails:
        with pytest.raises(shardckpt.SaveFailedError):
            pending.result(30)
    engine.wait()
    assert found(tmp_path / "old") == (1 if fails else None)
    assert found(tmp_path / "new") == (None if fails else 2)
    assert ("is kept" in caplog.text) == fails


def test_removal_after_a_failure_nobody_has_seen_is_dropped(tmp_path, wrapped, monkeypatch):
    """The save failed before the removal was asked for, and nobody knew: the good checkpoint stays. Told, it may go."""
    engine = Checkpointer()
    engine.save(state(1), tmp_path / "old")
    wrapped(lambda inner: FaultyStorage(inner, "create", BROKEN))
    pending = engine.async_save(state(2), tmp_path / "new")
    while not pending.done():
        time.sleep(0.01)
    monkeypatch.undo()
    engine.remove(tmp_path / "old")
    with pytest.raises(shardckpt.SaveFailedError, match="cable"):
        engine.wait()
    assert found(tmp_path / "old") == 1
    engine.remove(tmp_path / "old")
    assert not (tmp_path / "old").exists()


# -- aliases --------------------------------------------------------------------------------------------------------


def test_aliases_share_shards_and_outlive_their_source(tmp_path):
    """Chained aliases are hard links with manifests of their own: each is whole when the others are gone."""
    engine = Checkpointer()
    reports = [engine.save(state(1) | {"name": n}, tmp_path / n, state_version=7) for n in ("a", "b", "c")]
    assert [report.alias for report in reports] == [False, True, True]
    inodes = {n: {p.stat().st_ino for p in (tmp_path / n).glob("*.safetensors")} for n in "abc"}
    assert inodes["a"] == inodes["b"] == inodes["c"]
    assert shardckpt.latest(tmp_path) == str(tmp_path / "c")
    for name in "ab":
        engine.remove(tmp_path / name)
        assert found(tmp_path / "c") == 1
    assert shardckpt.load(tmp_path / "c", weights_only=False)["name"] == "c"
    assert set(files(tmp_path / "c")) == ours(tmp_path / "c")


def test_an_alias_of_what_was_removed_is_written_anew(tmp_path):
    """When the source is gone, by us or behind our back, the promise of equal tensors is kept by writing them."""
    engine = Checkpointer()
    engine.save(state(1), tmp_path / "a", state_version=7)
    engine.remove(tmp_path / "a")
    assert not engine.save(state(1), tmp_path / "b", state_version=7).alias
    for file in (tmp_path / "b").iterdir():
        file.unlink()
    assert not engine.save(state(1), tmp_path / "c", state_version=7).alias
    assert found(tmp_path / "c") == 1


def test_an_alias_over_an_older_alias(tmp_path):
    """``last.ckpt`` is overwritten by alias after alias; only the newest's files stay, the sources are untouched."""
    engine = Checkpointer()
    for step in (1, 2, 3):
        engine.save(state(step), tmp_path / f"step={step}", state_version=step)
        assert engine.save(state(step), tmp_path / "last", state_version=step).alias
        assert found(tmp_path / "last") == step
        assert set(files(tmp_path / "last")) == ours(tmp_path / "last")
    assert [found(tmp_path / f"step={step}") for step in (1, 2, 3)] == [1, 2, 3]


def test_an_alias_onto_its_own_source(tmp_path):
    """Saving twice to one path with one version changes the plain values, and keeps the shards."""
    engine = Checkpointer()
    engine.save(state(1) | {"name": "first"}, tmp_path / "a", state_version=7)
    assert engine.save(state(1) | {"name": "second"}, tmp_path / "a", state_version=7).alias
    assert found(tmp_path / "a") == 1
    assert shardckpt.load(tmp_path / "a", weights_only=False)["name"] == "second"
    assert set(files(tmp_path / "a")) == ours(tmp_path / "a")


def test_an_alias_fails_with_its_source(tmp_path, wrapped, monkeypatch):
    """A source that fails takes the alias with it, but not what the alias was to replace."""
    engine = Checkpointer()
    engine.save(state(1), tmp_path / "last")
    slow_or_failing(wrapped, fails=True)
    source = engine.async_save(state(2), tmp_path / "a", state_version=2)
    alias = engine.async_save(state(2), tmp_path / "last", state_version=2)
    for pending in (source, alias):
        with pytest.raises(shardckpt.SaveFailedError, match="cable|whose shards it shares"):
            pending.result(30)
    monkeypatch.undo()
    assert found(tmp_path / "last") == 1
    assert set(files(tmp_path / "last")) == ours(tmp_path / "last")
    assert not (tmp_path / "a").exists()
    assert not engine.save(state(2), tmp_path / "a", state_version=2).alias
    assert found(tmp_path / "a") == 2


def test_an_alias_whose_links_fail_harms_nobody(tmp_path, wrapped, monkeypatch):
    """The second link cannot be made: the source is whole, what the alias was to replace too, and no link is left."""
    engine = Checkpointer()
    engine.save(state(1), tmp_path / "last")
    wrapped(lambda inner: FaultyStorage(inner, "copy_from", BROKEN, first=2, last=10))
    engine.save(state(2), tmp_path / "a", state_version=2)
    with pytest.raises(shardckpt.SaveFailedError, match="cable"):
        engine.save(state(2), tmp_path / "last", state_version=2)
    assert (found(tmp_path / "a"), found(tmp_path / "last")) == (2, 1)
    assert set(files(tmp_path / "last")) == ours(tmp_path / "last")


# -- finding --------------------------------------------------------------------------------------------------------


def test_latest_and_is_checkpoint_on_odd_directories(tmp_path):
    """Only complete checkpoints count; whatever else lies in a run's directory neither counts nor disturbs."""
    assert shardckpt.latest(tmp_path / "none") is None
    assert shardckpt.latest(tmp_path) is None
    Checkpointer().save(state(1), tmp_path / "z")
    Checkpointer().save(state(2), tmp_path / "a")
    odd = {
        "file": lambda p: p.write_text("x"),
        "empty": lambda p: p.mkdir(),
        "cut": lambda p: marker_of(p, "zzzzzzzzzzzzzzz"),
        "damaged": lambda p: (p.mkdir(), (p / "manifest.json").write_text("{")),
        "folder": lambda p: (p / "manifest.json").mkdir(parents=True),
        "linked": lambda p: (p.mkdir(), (p / "manifest.json").symlink_to(tmp_path / "a" / "manifest.json")),
        "dangling": lambda p: p.symlink_to("nowhere"),
        "loop": lambda p: p.symlink_to("loop"),
    }
    for name, make in odd.items():
        make(tmp_path / name)
    (tmp_path / "link").symlink_to("a")
    assert shardckpt.latest(tmp_path) in (str(tmp_path / "a"), str(tmp_path / "link"))
    complete = {name for name in files(tmp_path) if shardckpt.is_checkpoint(tmp_path / name)}
    assert complete == {"z", "a", "link", "damaged"}
    assert shardckpt.is_checkpoint(tmp_path / "a" / "manifest.json")
    assert not shardckpt.is_checkpoint(tmp_path / "file" / "below")
    with pytest.raises(shardckpt.CorruptCheckpointError, match="symbolic link"):
        shardckpt.load(tmp_path / "linked")


# -- the end of a process -------------------------------------------------------------------------------------------

EXITING = """
import sys, torch, shardckpt
from shardckpt import checkpointer
sys.path.insert(0, {tests!r})
from storage.wrappers import SlowStorage
original = checkpointer.open_storage
checkpointer.open_storage = lambda *a: SlowStorage(original(*a), delay=0.2, methods=["put", "writer.write"])
shardckpt.async_save({{"w": torch.arange(3_000_000.0), "step": 5}}, {path!r})
{end}
"""


@pytest.mark.parametrize("end", ("", "sys.exit(3)", "raise RuntimeError('bug')"))
def test_a_process_that_ends_without_waiting_still_commits(tmp_path, end):
    """The last save of a script is not lost because nobody waited for it, whichever way the script ends."""
    path = tmp_path / "ck"
    code = EXITING.format(tests=str(Path(__file__).parent), path=str(path), end=end)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == {"": 0, "sys.exit(3)": 3}.get(end, 1), done.stderr
    loaded = shardckpt.load(path)
    assert loaded["step"] == 5
    assert torch.equal(loaded["w"], torch.arange(3_000_000.0))
    assert set(files(path)) == ours(path)


@pytest.mark.s3
def test_a_process_that_ends_with_an_upload_in_flight_still_commits(s3_place):
    """The same on S3, whose client needs threads that Python no longer gives out once it has begun to shut down."""
    path = f"{s3_place.url}/ck"
    code = EXITING.format(tests=str(Path(__file__).parent), path=path, end="")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.equal(shardckpt.load(path)["w"], torch.arange(3_000_000.0))


def test_a_queued_removal_is_not_overtaken_by_a_shared_save(tmp_path):
    """A save that shares shards does not wait for the queue, unless the queue removes what it replaces."""
    checkpointer = Checkpointer()
    first, second = tmp_path / "a", tmp_path / "b"
    checkpointer.save(state(0), second)
    checkpointer.async_save(state(1), first, state_version=1)
    checkpointer.remove(second)
    checkpointer.async_save(state(1), second, state_version=1).result(60)
    assert found(first) == found(second) == 1


def test_calls_with_other_options_wait_for_each_other(tmp_path):
    """The functions share one Checkpointer, so a load sees the save before it, whatever its options."""
    shardckpt.save(state(0), tmp_path / "ck")
    shardckpt.async_save(state(1), tmp_path / "ck", compression="zstd")
    assert found(tmp_path / "ck") == 1


def test_a_finished_save_keeps_no_tensor_alive(tmp_path):
    """On a GPU, `del model; torch.cuda.empty_cache()` must free the model, also after it has been saved."""
    checkpointer = Checkpointer()
    tensor = torch.ones(1000)
    alive = weakref.ref(tensor.untyped_storage())
    checkpointer.async_save({"t": tensor}, tmp_path / "ck").result(60)
    del tensor
    gc.collect()
    assert alive() is None
