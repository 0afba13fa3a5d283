"""fsspec's in-memory file system: the common suite over the generic path."""

import uuid
from typing import Any

import fsspec
import pytest

from shardckpt.errors import CorruptCheckpointError, StorageError, UsageError
from shardckpt.storage import BLOCK, Storage, open_storage
from storage.conformance import StorageConformance, noise, pieces


class TestMemory(StorageConformance):
    @pytest.fixture(autouse=True)
    def root(self) -> None:
        self.place = f"/{uuid.uuid4().hex}"

    def look(self) -> Any:
        return fsspec.filesystem("memory")

    def open(self, place: str = "step=10.ckpt") -> Storage:
        return open_storage(f"memory:/{self.place}/{place}")

    def peek(self, name: str, place: str = "step=10.ckpt") -> bytes | None:
        path = f"{self.place}/{place}/{name}"
        return bytes(self.look().cat_file(path)) if self.look().exists(path) else None

    def poke(self, name: str, data: bytes, place: str = "step=10.ckpt") -> None:
        self.look().makedirs(f"{self.place}/{place}", exist_ok=True)
        self.look().pipe_file(f"{self.place}/{place}/{name}", data)

    def names(self, place: str = "step=10.ckpt") -> set[str]:
        look = self.look()
        if not look.exists(f"{self.place}/{place}"):
            return set()
        return {path.rsplit("/", 1)[1] for path in look.ls(f"{self.place}/{place}", detail=False)}


def test_root() -> None:
    """The root of a file system is a place like any other."""
    name = uuid.uuid4().hex
    storage = open_storage("memory://")
    storage.put(name, b"x", replace=False)
    try:
        assert storage.get(name) == b"x"
        assert name in {stat.name for stat in storage.list()}
    finally:
        storage.delete([name])
    assert name not in {stat.name for stat in storage.list()}


def test_chained_url() -> None:
    """A chain of file systems, as fsspec writes it, is opened as the chain that it is."""
    place = uuid.uuid4().hex
    fsspec.filesystem("memory").pipe_file(f"/{place}/rank", noise(10_000))
    storage = open_storage(f"simplecache::memory://{place}")
    into = bytearray(100)
    storage.read_into("rank", 5000, memoryview(into))
    assert into == noise(10_000)[5000:5100]
    assert storage.get("rank") == noise(10_000)


def test_held_only_while_early() -> None:
    """Pieces that come in order are not kept in memory, and early ones only until their turn."""
    writer = open_storage(f"memory://{uuid.uuid4().hex}").create("rank", 0)
    held: Any = writer
    first, second, third = pieces(noise(3 * BLOCK))
    writer.write(*first)
    assert not held._early
    writer.write(*third)
    assert len(held._early) == 1
    writer.write(*second)
    assert not held._early
    writer.abort()


def test_foreign_errors_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a backend raises comes out as one of our errors, with the object named and the original as cause."""
    storage = open_storage("memory://place")
    cause = RuntimeError("backend gone mad")

    def fail(*_: object, **__: object) -> None:
        raise cause

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", fail)
    with pytest.raises(StorageError, match=r"cannot write memory://place/lease: backend gone mad") as caught:
        storage.put("lease", b"", replace=True)
    assert caught.value.__cause__ is cause


def test_short_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that returns fewer bytes than were asked for is noticed, whatever the size it reports."""
    storage = open_storage(f"memory://{uuid.uuid4().hex}")
    storage.put("rank", noise(100), replace=True)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", lambda *_, **__: b"short")
    with pytest.raises(CorruptCheckpointError, match="only 5 are there"):
        storage.read_into("rank", 0, memoryview(bytearray(100)))


def test_unknown_protocol() -> None:
    """A protocol nobody knows is an error about the call, at once."""
    with pytest.raises(UsageError, match="nosuchprotocol"):
        open_storage("nosuchprotocol://x")


def test_missing_package() -> None:
    """A protocol whose package is not installed says what to install."""
    with pytest.raises(UsageError, match="smbprotocol"):
        open_storage("smb://host/x")
