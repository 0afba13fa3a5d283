"""Bad input: each has its own clear error, says what to do, and nothing is changed or lost."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt import Checkpointer, checkpointer
from storage.wrappers import SlowStorage, WrapperStorage

OLD = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5), "step": 1}


class Odd:
    """What no format knows; pickled by reference to this module."""

    def __init__(self, value: int) -> None:
        self.value = value


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("it holds a socket")


def live() -> dict[str, Any]:
    return {"w": torch.full((3, 4), 7.0), "b": torch.full((5,), 7), "step": 7}


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a path, with its bytes and its links."""
    return {
        str(p.relative_to(path)): os.readlink(p).encode() if p.is_symlink() else p.read_bytes()
        for p in path.rglob("*")
        if p.is_symlink() or p.is_file()
    } | {f"{p.relative_to(path)}/": b"" for p in path.rglob("*") if p.is_dir()}


@contextmanager
def refused(error: type[Exception], *named: str, root: Path) -> Iterator[None]:
    """The block raises ``error``, whose message has every word of ``named``; nothing below ``root`` changes."""
    before = contents(root)
    with pytest.raises(error) as caught:
        yield
    assert isinstance(caught.value, shardckpt.ShardckptError)
    for word in named:
        assert word in str(caught.value)
    assert contents(root) == before


def load_refused(
    path: Path, error: type[Exception], *named: str, root: Path | None = None, extra: Any = None, **options: Any
) -> None:
    """Loading raises, with a live state and without, and the live state keeps every bit."""
    state = live() | (extra or {})
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    with refused(error, *named, root=root or path.parent):
        shardckpt.load(path, state, **options)
    assert state.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(state[key], value) if isinstance(value, torch.Tensor) else state[key] == value
    with refused(error, *named, root=root or path.parent):
        shardckpt.load(path, weights_only=options.get("weights_only"))


def assert_old(path: Path) -> None:
    loaded = shardckpt.load(path)
    assert torch.equal(loaded["w"], OLD["w"])
    assert torch.equal(loaded["b"], OLD["b"])
    assert loaded["step"] == 1


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    shardckpt.save(OLD, tmp_path / "step=1.ckpt")
    return tmp_path / "step=1.ckpt"


def shard_of(path: Path) -> Path:
    (found,) = path.glob("*.safetensors")
    return found


# -- the path -------------------------------------------------------------------------------------------------------


def test_path_that_does_not_exist(tmp_path, saved):
    """A mistyped path is a FileNotFoundError that names it, and the newest checkpoint beside it."""
    path = tmp_path / "step=2.ckpt"
    load_refused(path, shardckpt.CheckpointNotFoundError, str(path), "nothing is there", f"beside it is {saved}")
    with pytest.raises(FileNotFoundError):
        shardckpt.read_tensor(path, "w")
    assert not path.exists()


def test_parent_that_does_not_exist(tmp_path):
    """The same where even the run's directory is missing: there is nothing beside it to name."""
    load_refused(tmp_path / "x" / "y", shardckpt.CheckpointNotFoundError, "nothing is there", root=tmp_path)


def test_directory_without_a_manifest(tmp_path, saved):
    """A save that was cut short is told from a directory of other things, and the complete checkpoint is named."""
    cut = tmp_path / "step=2.ckpt"
    shutil.copytree(saved, cut, ignore=shutil.ignore_patterns("manifest.json"))
    load_refused(cut, shardckpt.CheckpointNotFoundError, str(cut), "cut short", f"beside it is {saved}")
    other = tmp_path / "logs"
    other.mkdir()
    (other / "events").write_text("x")
    load_refused(other, shardckpt.CheckpointNotFoundError, str(other), "no manifest.json", str(saved))


def test_file_in_place_of_a_directory(tmp_path, saved):
    """A file that torch.save wrote is named as such, with what reads it; saving to it leaves it alone."""
    path = tmp_path / "old.ckpt"
    torch.save({"w": 1}, path)
    load_refused(path, shardckpt.CheckpointNotFoundError, str(path), "is a file", "torch.load", str(saved))
    load_refused(path / "below", shardckpt.ShardckptError, str(path), root=tmp_path)
    for target in (path, path / "below"):
        with refused(shardckpt.StorageError, str(path), root=tmp_path):
            shardckpt.save(OLD, target)


@pytest.mark.parametrize("path", ("", "a\0b", "nosuchscheme://bucket/x", Path("s3://bucket/run")))
def test_paths_that_are_none(tmp_path, path):
    """Empty paths, unknown schemes and URLs that went through pathlib are the caller's error, on save and load."""
    with refused(shardckpt.UsageError, root=tmp_path):
        shardckpt.save(OLD, path)
    with refused(shardckpt.UsageError, root=tmp_path):
        shardckpt.load(path)


# -- damage ---------------------------------------------------------------------------------------------------------

DAMAGE: dict[str, tuple[Callable[[Path], Any], type[Exception], tuple[str, ...]]] = {
    "truncated": (
        lambda p: os.truncate(p / "manifest.json", 200),
        shardckpt.CorruptCheckpointError,
        ("manifest.json", "damaged or truncated", "load another"),
    ),
    "empty": (lambda p: os.truncate(p / "manifest.json", 0), shardckpt.CorruptCheckpointError, ("manifest.json",)),
    "not JSON": (
        lambda p: (p / "manifest.json").write_bytes(b"\x80\x02}q\x00."),
        shardckpt.CorruptCheckpointError,
        ("manifest.json", "not a manifest"),
    ),
    "newer": (
        lambda p: _edit(p, version=2),
        shardckpt.UnsupportedFormatError,
        ("manifest.json", "format v2", "Upgrade shardckpt"),
    ),
    "shard missing": (
        lambda p: shard_of(p).unlink(),
        shardckpt.CorruptCheckpointError,
        ("missing", "rank-00000-", ".safetensors"),
    ),
    "shard short": (
        lambda p: os.truncate(shard_of(p), shard_of(p).stat().st_size - 1),
        shardckpt.CorruptCheckpointError,
        ("rank-00000-", ".safetensors", "should have", "bytes, and has"),
    ),
    "shard longer": (
        lambda p: os.truncate(shard_of(p), shard_of(p).stat().st_size + 1),
        shardckpt.CorruptCheckpointError,
        (".safetensors", "should have"),
    ),
    "rank manifest missing": (
        lambda p: next(p.glob("rank-*.json")).unlink(),
        shardckpt.CorruptCheckpointError,
        ("missing", "rank-00000-", ".json"),
    ),
    "rank manifest changed": (
        lambda p: _flip(next(p.glob("rank-*.json")), 40),
        shardckpt.CorruptCheckpointError,
        ("rank-00000-", "not the file that was written"),
    ),
    "shard is a link": (
        lambda p: _link_elsewhere(shard_of(p)),
        shardckpt.CorruptCheckpointError,
        (".safetensors", "symbolic link"),
    ),
}


def _edit(path: Path, **fields: Any) -> None:
    document = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps(document | fields))


def _flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def _link_elsewhere(file: Path) -> None:
    moved = file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(moved)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint(tmp_path, saved, kind):
    """Every kind of damage names the file and what is wrong with it, before a single live byte has changed."""
    other = tmp_path / "step=0.ckpt"
    shutil.copytree(saved, other)
    damage, error, named = DAMAGE[kind]
    damage(saved)
    load_refused(saved, error, str(saved), *named)
    assert_old(other)


@pytest.mark.parametrize("compression", (None, "zstd"))
def test_flipped_bit_names_tensor_file_and_byte(tmp_path, compression):
    """Silent corruption of one tensor is found, located, and never handed to training."""
    path = tmp_path / "ck"
    shardckpt.save(OLD, path, compression=compression)
    offset = json.loads((path / "manifest.json").read_bytes())["tensors"]["w"]["offset"][0]
    _flip(shard_of(path), offset + 1)
    state = {"w": torch.zeros(3, 4)}
    with refused(shardckpt.CorruptCheckpointError, "'w'", shard_of(path).name, f"byte {offset}", root=tmp_path):
        shardckpt.load(path, state)
    assert torch.equal(state["w"], torch.zeros(3, 4))
    assert torch.equal(shardckpt.read_tensor(path, "b"), OLD["b"])


# -- the live state -------------------------------------------------------------------------------------------------


def test_every_difference_is_named_before_anything_changes(tmp_path, saved):
    """Shapes, dtypes, missing and unexpected keys in one message; the live state is as it was."""
    model = torch.nn.Linear(4, 3)
    shardckpt.save({"model": model, "w": OLD["w"], "b": OLD["b"], "n": [torch.ones(1)]}, tmp_path / "ck")
    target = torch.nn.Sequential(torch.nn.Linear(4, 3))
    state = {
        "model": target,
        "w": torch.zeros(3, 5),
        "b": torch.zeros(5),
        "n": [torch.zeros(1), torch.zeros(1)],
        "extra": torch.zeros(2),
    }
    before = [p.detach().clone() for p in target.parameters()]
    with refused(
        shardckpt.StateMismatchError,
        "w: shape (3, 5) here, (3, 4) in the checkpoint",
        "b: dtype float32 here, int64 in the checkpoint (convert_dtype=True converts)",
        "missing from the checkpoint: extra",
        "missing from the checkpoint: model.0.weight",
        "in the checkpoint only: model.bias",
        "n: 2 items here, 1 in the checkpoint",
        "nothing has been changed",
        "strict=False",
        str(tmp_path / "ck"),
        root=tmp_path,
    ):
        shardckpt.load(tmp_path / "ck", state)
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
    assert not any(state[key].any() for key in ("w", "b", "extra"))


def test_what_matches_is_restored_when_asked(saved):
    """strict=False restores the rest and reports the differences; convert_dtype converts."""
    state = {"w": torch.zeros(3, 5), "b": torch.zeros(5), "extra": torch.zeros(2), "step": 0}
    report = shardckpt.load(saved, state, strict=False, convert_dtype=True)
    assert report.missing == ["extra"]
    assert len(report.mismatched) == 1
    assert "w: shape" in report.mismatched[0]
    assert torch.equal(state["b"], OLD["b"].float())
    assert state["step"] == 1
    assert not state["w"].any()


def test_tensor_that_is_not_there(saved):
    """read_tensor names what is like the name that was asked for."""
    with pytest.raises(KeyError, match="has no tensor 'w2'. Did you mean 'w'"):
        shardckpt.read_tensor(saved, "w2")


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"a": {"deep": [1, Unpicklable()]}}, ("'a.deep.1'", "Unpicklable", "it holds a socket")),
        ({"lock": threading.Lock()}, ("'lock'", "lock")),
        ({Odd(1): 1}, ("key of type Odd",)),
        ({"m": torch.empty(2, device="meta")}, ("'m'", "meta")),
    ],
    ids=("object", "lock", "key", "meta"),
)
def test_unserialisable_value(tmp_path, saved, bad, named):
    """A value that cannot be stored is named by its path, and the checkpoint that lies there stays."""
    with refused(shardckpt.UnserialisableError, *named, root=tmp_path):
        shardckpt.save(OLD | bad, saved)
    with refused(TypeError, *named, root=tmp_path):
        shardckpt.save(OLD | bad, tmp_path / "new")
    assert_old(saved)


def test_a_state_that_contains_itself(tmp_path):
    """A cycle is an error with its place, not a stack overflow."""
    state: dict[str, Any] = {"a": {}}
    state["a"]["b"] = state
    with refused(shardckpt.UnserialisableError, "'a.b.a'", root=tmp_path):
        shardckpt.save(state, tmp_path / "ck")


@pytest.mark.parametrize("name", ("\ud800", "a\udfff"))
def test_names_that_are_no_text(tmp_path, name):
    """Half a surrogate pair as a key does not break the JSON around it: the key comes back as it was."""
    shardckpt.save({name: torch.ones(1), "odd": {name: Odd(1)}}, tmp_path / "ck")
    loaded = shardckpt.load(tmp_path / "ck", weights_only=False)
    assert torch.equal(loaded[name], torch.ones(1))
    assert loaded["odd"][name].value == 1


@pytest.mark.parametrize("state", (None, 5, [torch.ones(1)], "text", torch.ones(1)))
def test_what_is_no_state(tmp_path, state):
    """A state is a dict, a module, an optimizer or a stateful object."""
    with refused(shardckpt.UsageError, "a state is", type(state).__name__, root=tmp_path):
        shardckpt.save(state, tmp_path / "ck")


# -- pickled objects ------------------------------------------------------------------------------------------------


def test_pickled_objects_need_leave(tmp_path):
    """Unpickling runs code: it is refused by default with the path of the object, and nothing else is restored."""
    path = tmp_path / "ck"
    shardckpt.save(OLD | {"hyper": {"odd": Odd(5)}}, path)
    for weights_only in (None, True):
        named = ("'hyper.odd'", "weights_only=False", "Nothing was changed")
        load_refused(path, shardckpt.UnsafeLoadError, *named, extra={"hyper": {}}, weights_only=weights_only)
    state = live() | {"hyper": {"odd": None}}
    with refused(shardckpt.UnsafeLoadError, "'hyper.odd'", "Nothing was changed", root=tmp_path):
        shardckpt.load(path, state)
    assert state["w"].eq(7).all()
    assert shardckpt.load(path, weights_only=False)["hyper"]["odd"].value == 5
    shardckpt.load(path, state, weights_only=False)
    assert state["hyper"]["odd"].value == 5
    assert torch.equal(shardckpt.read_tensor(path, "w"), OLD["w"])


@pytest.mark.parametrize("cut", (1, 10_000))
def test_damaged_objects_file(tmp_path, cut):
    """Objects have digests too: damage and loss are found before anything is unpickled."""
    path = tmp_path / "ck"
    shardckpt.save(OLD | {"odd": Odd(5)}, path)
    (objects,) = path.glob("objects-*.pkl")
    _flip(objects, 5) if cut == 1 else os.truncate(objects, 3)
    extra = {"odd": None}
    load_refused(path, shardckpt.CorruptCheckpointError, objects.name, extra=extra, weights_only=False)
    objects.unlink()
    load_refused(path, shardckpt.CorruptCheckpointError, objects.name, "missing", extra=extra, weights_only=False)


def test_objects_whose_code_is_gone(tmp_path):
    """A class that was renamed since is an error that says so, with the path, and nothing has changed."""
    path = tmp_path / "ck"
    code = (
        "import sys, types, shardckpt, torch; m = types.ModuleType('gone'); sys.modules['gone'] = m\n"
        "class C: pass\n"
        "C.__module__ = 'gone'; m.C = C\n"
        f"shardckpt.save({{'w': torch.ones(3, 4), 'b': torch.arange(5), 'step': 1, 'c': C()}}, {str(path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    named = ("'c'", "gone", "Nothing was changed")
    load_refused(path, shardckpt.LoadFailedError, *named, extra={"c": None}, weights_only=False)


# -- the disk -------------------------------------------------------------------------------------------------------


class NearlyFull(WrapperStorage):
    def free_bytes(self) -> int | None:
        return 100


def test_too_little_space_is_found_before_the_first_byte(tmp_path, saved, monkeypatch):
    """The message says how much there is and how much is needed; no directory is made, no link is broken."""
    original = checkpointer.open_storage
    (tmp_path / "last.ckpt").symlink_to(saved)
    monkeypatch.setattr(checkpointer, "open_storage", lambda *a: NearlyFull(original(*a)))
    for name in ("new", saved.name, "last.ckpt"):
        with refused(shardckpt.StorageFullError, "100 bytes free", "needs ", "Nothing was written", root=tmp_path):
            shardckpt.save({"w": torch.ones(1000)}, tmp_path / name)
    assert_old(saved)


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[Path]:
    """A file system of its own at ``place``; skips where this process may not mount one."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


TMPFS = ("-t", "tmpfs", "-o", "size=4m", "tmpfs")


def test_a_small_disk_is_found_before_the_first_byte(tmp_path):
    """On a real small file system: refused at once, an earlier checkpoint still loads, and a small one still fits."""
    with mounted(tmp_path / "disk", *TMPFS) as disk:
        shardckpt.save(OLD, disk / "old")
        with refused(shardckpt.StorageFullError, "bytes free", str(disk), root=disk):
            shardckpt.save({"w": torch.ones(2 << 20)}, disk / "new")
        with refused(shardckpt.StorageFullError, "bytes free", root=disk):
            shardckpt.async_save({"w": torch.ones(2 << 20)}, disk / "old")
        assert_old(disk / "old")
        shardckpt.save({"w": torch.ones(1000)}, disk / "new")


@pytest.mark.parametrize("compression", (None, "zstd"))
def test_a_disk_that_fills_in_mid_write(tmp_path, monkeypatch, compression):
    """Somebody else takes the space after the check: the save fails, cleans up, and the old checkpoint loads."""

    class Optimistic(WrapperStorage):
        def free_bytes(self) -> int | None:
            return None

    original = checkpointer.open_storage
    monkeypatch.setattr(checkpointer, "open_storage", lambda *a: Optimistic(original(*a)))
    monkeypatch.setattr("shardckpt.storage.posix.preallocate", lambda *_: None)
    engine = Checkpointer(compression=compression)
    noise = torch.randint(0, 256, (16 << 20,), dtype=torch.uint8)
    with mounted(tmp_path / "disk", *TMPFS) as disk:
        engine.save(OLD, disk / "old")
        for name in ("new", "old"):
            with refused(shardckpt.SaveFailedError, "No space left", ".safetensors", "intact", root=disk):
                engine.save({"w": noise}, disk / name)
        assert_old(disk / "old")
        engine.save(OLD, disk / "new")
        assert_old(disk / "new")


def test_a_read_only_disk(tmp_path):
    """An unwritable directory is a PermissionError that names it, though root itself asks; loading from it works."""
    with mounted(tmp_path / "disk", *TMPFS) as disk:
        shardckpt.save(OLD, disk / "old")
        (disk / "empty").mkdir()
        (disk / "link").symlink_to("old")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for name in ("new", "old", "empty", "link"):
            with refused(PermissionError, str(disk), "Read-only file system", root=disk):
                shardckpt.save(OLD, disk / name)
        with refused(shardckpt.StorageAccessError, "Read-only", root=disk):
            Checkpointer().remove(disk / "old")
        assert_old(disk / "old")


# -- S3 -------------------------------------------------------------------------------------------------------------


@contextmanager
def answering(status: int, code: str) -> Iterator[str]:
    """An S3 server that gives every request the same error; yields its endpoint."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length)
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No, it said.</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815 - the names are http.server's

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def s3_options(endpoint: str) -> dict[str, Any]:
    pytest.importorskip("s3fs")
    return {
        "key": "WRONGKEY1234",
        "secret": "verysecretword",
        "client_kwargs": {"endpoint_url": endpoint, "region_name": "us-east-1"},
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 2},
    }


@pytest.mark.s3
@pytest.mark.parametrize("code", ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"))
def test_wrong_credentials(code):
    """A PermissionError names the bucket, the server's reason and where to look, and never shows the secret."""
    with answering(403, code) as endpoint:
        for call in (
            lambda options: shardckpt.save(OLD, "s3://bucket/run/ck", storage_options=options),
            lambda options: shardckpt.load("s3://bucket/run/ck", storage_options=options),
            lambda options: shardckpt.load("s3://bucket/run/ck", live(), storage_options=options),
            lambda options: shardckpt.is_checkpoint("s3://bucket/run/ck", options),
        ):
            with pytest.raises(
                shardckpt.StorageAccessError, match="s3://bucket/run/ck.*[Cc]heck the credentials"
            ) as told:
                call(s3_options(endpoint))
            assert isinstance(told.value, PermissionError)
            assert "verysecretword" not in str(told.value)


@pytest.mark.s3
def test_missing_bucket(s3_place):
    """A bucket is never made: saving to one that isn't there says so, and nothing is there afterwards."""
    url = f"s3://{s3_place.bucket}-missing/run/ck"
    with pytest.raises(shardckpt.ObjectNotFoundError, match=f"{s3_place.bucket}-missing"):
        shardckpt.save(OLD, url, storage_options=s3_place.storage_options)
    with pytest.raises(FileNotFoundError, match=f"{s3_place.bucket}-missing"):
        shardckpt.load(url, storage_options=s3_place.storage_options)
    assert f"{s3_place.bucket}-missing" not in [b["Name"] for b in s3_place.client.list_buckets()["Buckets"]]


@pytest.mark.s3
def test_unreachable_endpoint(s3_server):
    """Nobody answers: a StorageError in bounded time, with the place and that it may not be up."""
    from s3_server import free_port

    options = s3_options(f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(shardckpt.StorageError, match="s3://bucket/run/ck.*up and reachable"):
        shardckpt.save(OLD, "s3://bucket/run/ck", storage_options=options)
    assert time.monotonic() - started < 30


# -- the calls ------------------------------------------------------------------------------------------------------


def test_a_second_save_while_one_is_in_flight_waits(tmp_path, monkeypatch):
    """Two saves never run at once: the second waits, and both are committed."""
    original = checkpointer.open_storage
    slow = lambda *a: SlowStorage(original(*a), delay=0.3, methods=["writer.commit"])  # noqa: E731
    monkeypatch.setattr(checkpointer, "open_storage", slow)
    engine = Checkpointer()
    first = engine.async_save(OLD, tmp_path / "a")
    assert not first.done()
    second = engine.async_save(live(), tmp_path / "b")
    assert first.done()
    second.result(30)
    assert_old(tmp_path / "a")
    assert shardckpt.load(tmp_path / "b")["step"] == 7


def test_saving_twice_to_one_path(tmp_path, monkeypatch):
    """A callback that saves twice to one path, even while the first is in flight, leaves the second, and only it."""
    original = checkpointer.open_storage
    slow = lambda *a: SlowStorage(original(*a), delay=0.2, methods=["writer.commit"])  # noqa: E731
    monkeypatch.setattr(checkpointer, "open_storage", slow)
    engine = Checkpointer()
    first = engine.async_save(live(), tmp_path / "ck")
    second = engine.async_save(OLD, tmp_path / "ck")
    assert first.result(30).save_id != second.result(30).save_id
    assert_old(tmp_path / "ck")
    assert len(contents(tmp_path / "ck")) == 3


def test_a_failure_surfaces_once_at_the_next_call(tmp_path, saved, monkeypatch):
    """An asynchronous failure that nobody asked for is raised by the next save, or at close, and only once."""
    original = checkpointer.open_storage

    class Full(WrapperStorage):
        def called(self, method: str, name: str, nbytes: int) -> None:
            if method == "create":
                raise shardckpt.StorageFullError("no space left on device")

    engine = Checkpointer()
    for end in (lambda: engine.save(OLD, tmp_path / "next"), engine.close, engine.wait):
        monkeypatch.setattr(checkpointer, "open_storage", lambda *a: Full(original(*a)))
        pending = engine.async_save(live(), saved)
        monkeypatch.setattr(checkpointer, "open_storage", original)
        while not pending.done():
            time.sleep(0.01)
        with refused(shardckpt.SaveFailedError, str(saved), "no space left", "intact", root=saved):
            end()
        engine.wait()
        with pytest.raises(shardckpt.SaveFailedError):
            pending.result()
        assert_old(saved)


def test_a_closed_checkpointer_is_usable_again(tmp_path):
    """close() gives memory back; a later save allocates anew."""
    engine = Checkpointer()
    for name in ("a", "b"):
        engine.save(OLD, tmp_path / name)
        engine.close()
        engine.close()
        assert_old(tmp_path / name)
    assert engine.load(tmp_path / "a", live()).missing == []


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"compression": "gzip"}, "gzip"),
    ({"compression": ("zstd",)}, "zstd"),
    ({"compression": ("zstd", 23)}, "level from 1 to 22"),
    ({"compression": ("zstd", True)}, "level from 1 to 22"),
    ({"compression": 5}, "compression"),
    ({"compression": ["zstd", "x"]}, "compression"),
    ({"replicated": "model.*"}, "replicated takes a list"),
    ({"include": "model.*"}, "include takes a list"),
    ({"exclude": [1]}, "exclude takes a list"),
    ({"replicated": 5}, "replicated takes a list"),
    ({"replicated": [None]}, "replicated takes a list"),
    ({"staging_limit": 0}, "staging_limit"),
    ({"staging_limit": "1G"}, "staging_limit"),
    ({"timeout": -1}, "timeout"),
    ({"timeout": None}, "timeout"),
    ({"timeout": float("nan")}, "timeout"),
    ({"commit_timeout": "soon"}, "commit_timeout"),
    ({"storage_options": 5}, "storage_options"),
]


@pytest.mark.parametrize(("options", "named"), BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_bad_options(tmp_path, options, named):
    """A wrong option is refused where it is given, by name, not by a training job an hour later."""
    with pytest.raises(shardckpt.UsageError, match=named):
        Checkpointer(**options)
    if options.keys() <= {"compression", "replicated", "include", "exclude", "storage_options"}:
        with refused(shardckpt.UsageError, named, root=tmp_path):
            shardckpt.save(OLD, tmp_path / "ck", **options)


@pytest.mark.parametrize("map_location", (5, [], object()))
def test_bad_map_location(saved, map_location):
    """What torch.load would not take is refused before anything is read."""
    with pytest.raises(shardckpt.UsageError, match="map_location"):
        shardckpt.load(saved, map_location=map_location)
    state = live()
    with pytest.raises(shardckpt.UsageError, match="map_location"):
        shardckpt.load(saved, state, map_location=map_location)
    assert state["step"] == 7


FORKED = """
import os, sys, torch, shardckpt
path = sys.argv[1]
engine = shardckpt.Checkpointer()
engine.save({"w": torch.ones(3)}, path)
shardckpt.save({"w": torch.ones(3)}, path)
child = os.fork()
if child == 0:
    told = []
    calls = [lambda: engine.save({"w": torch.ones(3)}, path), lambda: engine.async_save({"w": torch.ones(3)}, path),
             lambda: engine.load(path), lambda: engine.load(path, {"w": torch.ones(3)}), lambda: engine.remove(path),
             lambda: engine.prepare({"w": torch.ones(3)}), engine.wait, engine.close,
             lambda: shardckpt.save({"w": torch.ones(3)}, path), lambda: shardckpt.load(path),
             lambda: shardckpt.read_tensor(path, "w")]
    for call in calls:
        try:
            call()
            told.append("nothing")
        except shardckpt.UsageError as error:
            told.append("forked child" in str(error) and "spawn" in str(error))
    fresh = shardckpt.Checkpointer()
    fresh.save({"w": torch.zeros(3)}, path)
    print(told, fresh.load(path)["w"].sum().item(), flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
print(status, shardckpt.load(path)["w"].sum().item())
"""


def test_forked_child(tmp_path):
    """A DataLoader worker that inherits a Checkpointer is told so instead of hanging; one of its own works."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path / "ck")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == [f"{[True] * 11} 0.0", "0 0.0"], done.stderr


@pytest.mark.parametrize("call", (lambda: shardckpt.load({"a": 1}, "ck"), lambda: shardckpt.save("ck", {"a": 1})))
def test_swapped_arguments(call):
    """The path comes second in a save and first in a load: whoever mixes them up is told the order."""
    with pytest.raises(shardckpt.UsageError, match=r"save\(state, path\) and load\(path, state\)"):
        call()


def test_processes_that_know_nothing_of_each_other(tmp_path, monkeypatch):
    """Under torchrun without a process group, each process would save over the others' checkpoint in silence."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    state = {"w": torch.ones(2)}
    for call in (lambda: shardckpt.save(state, tmp_path / "ck"), lambda: shardckpt.load(tmp_path / "ck", state)):
        with pytest.raises(shardckpt.UsageError, match="2 processes.*init_process_group"):
            call()
    assert not (tmp_path / "ck").exists()
    shardckpt.Checkpointer(alone=True).save(state, tmp_path / "ck")
    assert shardckpt.load(tmp_path / "ck")["w"].tolist() == [1, 1]
    monkeypatch.setenv("WORLD_SIZE", "1")
    shardckpt.load(tmp_path / "ck", state)
