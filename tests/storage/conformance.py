"""What every storage must do. A backend's tests inherit :class:`StorageConformance` and say how to look around it."""

import mmap
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shardckpt.errors import (
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    UsageError,
)
from shardckpt.storage import BLOCK, TEMP_PREFIX, ObjectWriter, Stat, Storage
from storage.wrappers import CountingStorage, FaultyStorage, SlowStorage, WrapperStorage

ODD_NAMES = [
    "manifest.json",
    "epoch=0-step=10.ckpt",
    "with space",
    "häßlich-日本",
    "hash#mark",
    "question?mark",
    "star*[ab]",
    "percent%20",
    "plus+and&",
    "-dash",
    ".hidden",
    "quote'\"",
]


def noise(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def pieces(data: bytes) -> list[tuple[int, memoryview]]:
    """The data in writable blocks, as a writer is given them."""
    view = memoryview(bytearray(data))
    return [(start, view[start : start + BLOCK]) for start in range(0, len(data), BLOCK)]


def store(storage: Storage, name: str, data: bytes) -> None:
    writer = storage.create(name, len(data))
    for offset, piece in pieces(data):
        writer.write(offset, piece)
    writer.commit()


def winners_of(count: int, put: Callable[[int], None]) -> list[int]:
    """Which of so many simultaneous callers of ``put`` are not told that somebody else was first."""
    gate = threading.Barrier(count)

    def contend(number: int) -> int | None:
        gate.wait()
        try:
            put(number)
        except ObjectExistsError:
            return None
        return number

    with ThreadPoolExecutor(count) as pool:
        return [number for number in pool.map(contend, range(count)) if number is not None]


class StorageConformance:
    """Inherit, and define the five methods and fixtures that raise here."""

    refuses_existing = False
    """Whether ``create`` and ``copy_from`` refuse a name that is taken."""

    def open(self, place: str = "step=10.ckpt") -> Storage:
        """The storage under test at a place below a fresh root."""
        raise NotImplementedError

    def peek(self, name: str, place: str = "step=10.ckpt") -> bytes | None:
        """The bytes of an object, read past the code under test; None if there is none."""
        raise NotImplementedError

    def poke(self, name: str, data: bytes, place: str = "step=10.ckpt") -> None:
        """Make an object, past the code under test."""
        raise NotImplementedError

    def names(self, place: str = "step=10.ckpt") -> set[str]:
        """The names of all objects at a place, past the code under test."""
        raise NotImplementedError

    @pytest.fixture
    def storage(self) -> Storage:
        storage = self.open()
        storage.prepare()
        return storage

    def test_protocol(self, storage: Storage) -> None:
        """A backend or wrapper that lacks a method fails here and not in the middle of somebody's save."""
        assert isinstance(storage, Storage)
        wrappers = WrapperStorage, CountingStorage, SlowStorage
        assert all(isinstance(wrapper(storage), Storage) for wrapper in wrappers)
        assert isinstance(FaultyStorage(storage, "put", OSError()), Storage)
        writer = storage.create("object", 0)
        assert isinstance(writer, ObjectWriter)
        writer.abort()

    def test_opening_touches_nothing(self) -> None:
        """Looking for a checkpoint that is not there must not make its directory."""
        storage = self.open("never")
        assert storage.list() == []
        assert storage.children() == []
        assert "never" not in self.open("").children()

    @pytest.mark.parametrize("size", [0, 1, 5000])
    def test_put_get(self, storage: Storage, size: int) -> None:
        """What is put is there, byte for byte and under its name, empty objects included."""
        storage.put("manifest.json", noise(size), replace=True)
        assert self.peek("manifest.json") == noise(size)
        assert storage.get("manifest.json") == noise(size)
        assert storage.size("manifest.json") == size
        assert self.names() == {"manifest.json"}

    def test_get_sees_what_others_wrote(self, storage: Storage) -> None:
        """Another process's write is seen at once: no cache of listings, sizes or contents is in the way."""
        assert storage.list() == []
        for size in (10, 20):
            self.poke("object", noise(size))
            assert [stat.size for stat in storage.list()] == [size]
            assert storage.size("object") == size
            assert storage.get("object") == noise(size)

    def test_put_replaces(self, storage: Storage) -> None:
        """The switch to a new manifest is one put over the old one, of whatever length."""
        for size in (3000, 10, 20_000):
            storage.put("manifest.json", noise(size, size), replace=True)
            assert self.peek("manifest.json") == noise(size, size)
        assert self.names() == {"manifest.json"}

    def test_put_create_only(self, storage: Storage) -> None:
        """A create-only put never touches what is there: that is how two saves find out about each other."""
        storage.put("lease", b"first", replace=False)
        with pytest.raises(ObjectExistsError, match="lease"):
            storage.put("lease", b"second", replace=False)
        assert self.peek("lease") == b"first"
        assert self.names() == {"lease"}

    def test_put_create_only_race(self, storage: Storage) -> None:
        """Of many simultaneous create-only puts exactly one wins, and its bytes are the ones stored."""
        winners = winners_of(8, lambda number: storage.put("lease", b"%d" % number, replace=False))
        assert len(winners) == 1
        assert self.peek("lease") == b"%d" % winners[0]

    def test_put_over_what_was_seen(self, storage: Storage) -> None:
        """A manifest is replaced only while it is the one that was there when the save began."""
        with pytest.raises(ObjectExistsError, match=r"manifest\.json"):
            storage.put("manifest.json", b"new", replace=b"")
        assert self.names() == set()
        self.poke("manifest.json", b"old")
        for wrong in (b"", b"other"):
            with pytest.raises(ObjectExistsError, match=r"manifest\.json"):
                storage.put("manifest.json", b"new", replace=wrong)
        assert self.peek("manifest.json") == b"old"
        storage.put("manifest.json", b"new", replace=b"old")
        assert self.peek("manifest.json") == b"new"
        assert self.names() == {"manifest.json"}

    def test_front_last(self, storage: Storage) -> None:
        """The first piece of a compressed shard comes after all others, since only then the header is known."""
        data = noise(3 * BLOCK + 7)
        first, *others = pieces(data)
        writer = storage.create("rank", len(data), front_last=True)
        for piece in (*others, first):
            writer.write(*piece)
        writer.commit()
        assert self.peek("rank") == data

    def test_get_limit(self, storage: Storage) -> None:
        """A hostile checkpoint cannot make a load allocate without bound."""
        self.poke("manifest.json", noise(1000))
        assert storage.get("manifest.json", limit=1000) == noise(1000)
        with pytest.raises(CorruptCheckpointError, match="1000 bytes"):
            storage.get("manifest.json", limit=999)

    def test_missing(self, storage: Storage) -> None:
        """Every way to read a missing object says so in our words, names it, and is a FileNotFoundError."""
        for read in (
            lambda: storage.get("missing"),
            lambda: storage.size("missing"),
            lambda: storage.read_into("missing", 0, memoryview(bytearray(10))),
        ):
            with pytest.raises(ObjectNotFoundError, match="missing") as caught:
                read()
            assert isinstance(caught.value, FileNotFoundError)

    @pytest.mark.parametrize(
        ("size", "hint"),
        [(size, size) for size in (0, 1, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 4097)]
        + [(1, 0), (1, 3 * BLOCK), (BLOCK + 1, 0), (BLOCK + 1, 10), (BLOCK + 1, 3 * BLOCK), (0, 10)],
    )
    def test_object_sizes(self, storage: Storage, size: int, hint: int) -> None:
        """An object has exactly its bytes whatever was announced: no padding, no preallocated tail."""
        data = noise(size)
        writer = storage.create("rank", hint)
        for offset, piece in pieces(data):
            writer.write(offset, piece)
        writer.commit()
        assert self.peek("rank") == data
        assert self.names() == {"rank"}

    def test_random_order(self, storage: Storage) -> None:
        """Pieces come in whatever order encoding finishes them."""
        data = noise(4 * BLOCK + 1234)
        for seed in range(2):
            writer = storage.create(f"rank-{seed}", len(data))
            for offset, piece in random.Random(seed).sample(pieces(data), 5):
                writer.write(offset, piece)
            writer.commit()
            assert self.peek(f"rank-{seed}") == data

    def test_threads(self, storage: Storage) -> None:
        """Several threads write one object, and a buffer may be used again once its write has returned."""
        data = noise(5 * BLOCK + 99)
        writer = storage.create("rank", len(data))
        work = pieces(data)
        random.Random(1).shuffle(work)
        buffers = threading.local()

        def write(item: tuple[int, memoryview]) -> None:
            if not hasattr(buffers, "own"):
                buffers.own = memoryview(bytearray(BLOCK))
            offset, piece = item
            buffers.own[: len(piece)] = piece
            writer.write(offset, buffers.own[: len(piece)])
            buffers.own[:] = bytes(BLOCK)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(write, work))
        writer.commit()
        assert self.peek("rank") == data

    def test_read_only_and_typed_buffers(self, storage: Storage) -> None:
        """A writer takes memory that it may not write to, and memory that does not call itself bytes."""
        data = noise(8192)
        views: list[Any] = [memoryview(data), memoryview(bytearray(data)).cast("d")]
        for number, view in enumerate(views):
            writer = storage.create(f"rank-{number}", 8192)
            writer.write(0, view)
            writer.commit()
            assert self.peek(f"rank-{number}") == data

    def test_abort(self, storage: Storage) -> None:
        """A failed save leaves nothing behind, however far it came, and its name may be used again."""
        data = noise(2 * BLOCK + 5)
        for count in range(4):
            writer = storage.create("rank", len(data))
            for offset, piece in pieces(data)[:count]:
                writer.write(offset, piece)
            writer.abort()
            writer.abort()
            assert self.names() == set()
            with pytest.raises(StorageError, match="aborted"):
                writer.write(0, memoryview(b"late"))
            with pytest.raises(StorageError, match="aborted"):
                writer.commit()
        store(storage, "rank", data)
        assert self.peek("rank") == data

    def test_abort_after_commit(self, storage: Storage) -> None:
        """A clean-up that aborts every writer does not take away what is committed."""
        writer = storage.create("rank", 5)
        writer.write(0, memoryview(b"hello"))
        writer.commit()
        writer.abort()
        assert self.peek("rank") == b"hello"

    def test_holes(self, storage: Storage) -> None:
        """An object with a missing piece is never committed: it would be found only by its digests, after the run."""
        data = noise(3 * BLOCK)
        writer = storage.create("rank", len(data))
        for offset, piece in (pieces(data)[0], pieces(data)[2]):
            writer.write(offset, piece)
        with pytest.raises(StorageError, match="missing"):
            writer.commit()
        writer.abort()
        assert self.names() == set()

    @pytest.mark.parametrize(("offset", "size"), [(1, 10), (-BLOCK, 10), (4096, 10), (0, BLOCK + 1), (0, 0)])
    def test_off_the_grid(self, storage: Storage, offset: int, size: int) -> None:
        """A piece that the backends could not place is refused by all of them, not by S3 alone."""
        writer = storage.create("rank", 0)
        with pytest.raises(UsageError, match="grid"):
            writer.write(offset, memoryview(bytearray(size)))
        writer.abort()

    @pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 10_000), (1, 4096), (4095, 3), (9999, 1), (5000, 0)])
    def test_ranges(self, storage: Storage, offset: int, size: int) -> None:
        """A range is filled exactly, wherever it lies."""
        data = noise(10_000)
        self.poke("rank", data)
        into = bytearray(size + 2)
        storage.read_into("rank", offset, memoryview(into)[1:-1])
        assert into == b"\0" + data[offset : offset + size] + b"\0"

    def test_large_range(self, storage: Storage) -> None:
        """A range longer than any request is put together, from several threads at once."""
        data = noise(2 * BLOCK + 2 * BLOCK + 77)
        self.poke("rank", data)

        def read(offset: int) -> bool:
            into = memoryview(bytearray(len(data) - offset))
            storage.read_into("rank", offset, into)
            return into == data[offset:]

        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(read, (0, 1, BLOCK)))

    def test_typed_destination(self, storage: Storage) -> None:
        """A range is read straight into memory of another element type, as a tensor's is."""
        self.poke("rank", noise(80))
        into: Any = memoryview(bytearray(80)).cast("d")
        storage.read_into("rank", 0, into)
        assert into.tobytes() == noise(80)

    @pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 3 * 4096 + 5, BLOCK + 4099])
    def test_past_the_cache(self, storage: Storage, nbytes: int) -> None:
        """Read past the cache or through it, just written or long ago, wherever it ends: the bytes are the same."""
        data = noise(nbytes)
        if data:
            store(storage, "rank", data)
        else:
            self.poke("rank", data)
        memory = memoryview(mmap.mmap(-1, nbytes + 2 * 4096))
        for _ in range(2):
            assert storage.in_cache("rank", 0, max(1, nbytes)) in (True, False)
            for offset, size in ((0, nbytes), (4096, nbytes - 4096), (0, nbytes // 4096 * 4096), (1, nbytes - 1)):
                for start in (0, 1):
                    into = memory[start : start + max(0, size)]
                    into[:] = bytes(len(into))
                    storage.read_into("rank", offset, into, cached=False)
                    assert into == data[offset : offset + size if size > 0 else offset]
        for offset, size in ((0, nbytes + 1), (0, nbytes + 4096), (nbytes // 4096 * 4096 + 4096, 4096)):
            with pytest.raises(CorruptCheckpointError, match=r"rank.*too short"):
                storage.read_into("rank", offset, memory[:size], cached=False)

    @pytest.mark.parametrize(("offset", "size"), [(0, 101), (99, 2), (100, 1), (1_000_000, 5)])
    def test_short(self, storage: Storage, offset: int, size: int) -> None:
        """A truncated file is an error that names it, never a tensor whose end is whatever was in memory."""
        self.poke("rank", noise(100))
        with pytest.raises(CorruptCheckpointError, match=r"rank.*too short"):
            storage.read_into("rank", offset, memoryview(bytearray(size)))

    def test_short_empty(self, storage: Storage) -> None:
        """An empty object is short too, though a store may refuse every range of it."""
        self.poke("rank", b"")
        with pytest.raises(CorruptCheckpointError, match="too short"):
            storage.read_into("rank", 0, memoryview(bytearray(1)))

    def test_list_children(self, storage: Storage) -> None:
        """A listing shows the objects and the directories directly below, each in its own way, and nothing deeper."""
        self.poke("b", b"22")
        self.poke("a", b"1")
        self.poke("deep", b"4444", place="step=10.ckpt/sub")
        self.poke("deeper", b"4444", place="step=10.ckpt/sub/sub")
        self.poke("x", b"", place="step=10.ckpt-not")
        listed = storage.list()
        assert [(stat.name, stat.size) for stat in listed] == [("a", 1), ("b", 2)]
        assert all(isinstance(stat, Stat) for stat in listed)
        times = [stat.modified for stat in listed if stat.modified is not None]
        assert len(times) == 2
        assert max(times) - min(times) < 60
        assert storage.children() == ["sub"]
        assert {"step=10.ckpt", "step=10.ckpt-not"} <= set(self.open("").children())

    def test_delete(self, storage: Storage) -> None:
        """A removal that was interrupted is simply done again."""
        for name in ("a", "b", "c"):
            self.poke(name, b"x")
        for _ in range(2):
            storage.delete(["a", "never there", "c"])
            storage.sync()
            assert self.names() == {"b"}
        storage.delete([])
        assert [stat.name for stat in storage.list()] == ["b"]
        self.open("no such place").delete(["x"])

    def test_odd_names(self, storage: Storage) -> None:
        """No name that Lightning or a user may choose is taken for a pattern, a query or a fragment."""
        for number, name in enumerate(ODD_NAMES):
            storage.put(name, b"%d" % number, replace=False)
        assert self.names() == set(ODD_NAMES)
        assert {stat.name for stat in storage.list()} == set(ODD_NAMES)
        for number, name in enumerate(ODD_NAMES):
            assert self.peek(name) == storage.get(name) == b"%d" % number
            into = bytearray(1)
            storage.read_into(name, 0, memoryview(into))
            assert storage.size(name) == len(b"%d" % number)
        other = self.open("copies")
        other.prepare()
        other.copy_from(storage, ODD_NAMES)
        assert self.names("copies") == set(ODD_NAMES)
        storage.delete(["star*[ab]", "question?mark"])
        assert self.names() == set(ODD_NAMES) - {"star*[ab]", "question?mark"}

    @pytest.mark.parametrize("place", ["epoch=0-step=10.ckpt", "a b", "ü", "x#y", "x?y", "deep/er/est", "100%", "[ab]"])
    def test_odd_places(self, place: str) -> None:
        """The same goes for the directory a checkpoint lies in, with or without a slash at its end."""
        storage = self.open(place + "/")
        storage.prepare()
        store(storage, "rank", b"data")
        storage.put("manifest.json", b"{}", replace=False)
        assert self.names(place) == {"rank", "manifest.json"}
        assert [stat.name for stat in self.open(place).list()] == ["manifest.json", "rank"]
        assert storage.url.endswith(place)

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "../up", "nul\0"])
    def test_hostile_names(self, storage: Storage, name: str) -> None:
        """Nothing can be read, written or removed outside the place, whoever forgot to check the name."""
        for attempt in (
            lambda: storage.get(name),
            lambda: storage.size(name),
            lambda: storage.read_into(name, 0, memoryview(bytearray(1))),
            lambda: storage.put(name, b"", replace=True),
            lambda: storage.create(name, 0),
            lambda: storage.delete([name]),
            lambda: storage.copy_from(storage, [name]),
        ):
            with pytest.raises(UsageError, match="name"):
                attempt()

    def test_copy_from(self, storage: Storage) -> None:
        """An alias holds the same bytes and outlives the original."""
        store(storage, "rank", noise(BLOCK + 5))
        storage.put("objects", b"", replace=True)
        other = self.open("last.ckpt")
        other.prepare()
        other.copy_from(storage, ["rank", "objects"])
        storage.delete(["rank", "objects"])
        assert self.names("last.ckpt") == {"rank", "objects"}
        assert self.peek("rank", "last.ckpt") == noise(BLOCK + 5)
        assert self.peek("objects", "last.ckpt") == b""

    def test_copy_from_elsewhere(self, storage: Storage) -> None:
        """A copy from a storage of another kind goes through this process."""
        store(storage, "rank", noise(BLOCK + 5))
        other = self.open("last.ckpt")
        other.prepare()
        foreign = CountingStorage(storage)
        other.copy_from(foreign, ["rank"])
        assert self.peek("rank", "last.ckpt") == noise(BLOCK + 5)
        assert foreign.bytes_read["rank"] == BLOCK + 5

    def test_copy_from_missing(self, storage: Storage) -> None:
        """An alias of a checkpoint that is being removed fails, and leaves no empty object in its place."""
        other = self.open("last.ckpt")
        other.prepare()
        with pytest.raises(ObjectNotFoundError):
            other.copy_from(storage, ["rank"])
        with pytest.raises(ObjectNotFoundError):
            other.copy_from(CountingStorage(storage), ["rank"])
        assert self.names("last.ckpt") == set()

    def test_create_existing(self, storage: Storage) -> None:
        """Where the storage can tell, a data file never replaces one of another save."""
        if not self.refuses_existing:
            pytest.skip("an object store replaces at commit")
        self.poke("rank", b"other")
        with pytest.raises(ObjectExistsError, match="rank"):
            storage.create("rank", 10)
        other = self.open("last.ckpt")
        other.prepare()
        store(other, "rank", b"mine")
        with pytest.raises(ObjectExistsError, match="rank"):
            other.copy_from(storage, ["rank"])
        assert self.peek("rank") == b"other"
        assert self.peek("rank", "last.ckpt") == b"mine"

    def test_prepare_again(self, storage: Storage) -> None:
        """Every rank prepares the same place, at any time, and leaves nothing in it."""
        storage.put("manifest.json", b"{}", replace=True)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: self.open("x/y/z").prepare(), range(4)))
        storage.prepare()
        assert self.names() == {"manifest.json"}
        assert self.names("x/y/z") == set()

    def test_remove_place(self, storage: Storage) -> None:
        """A removed checkpoint leaves no empty directory, and a place with something in it stays."""
        storage.put("manifest.json", b"{}", replace=True)
        storage.remove_place()
        assert self.names() == {"manifest.json"}
        storage.delete(["manifest.json"])
        storage.remove_place()
        assert "step=10.ckpt" not in self.open("").children()
        storage.remove_place()
        assert storage.unlink_link() is False

    def test_free_bytes(self, storage: Storage) -> None:
        """Free space is a number of bytes or honestly unknown, also of a place that is not there yet."""
        for place in (storage, self.open("not/there/yet")):
            free = place.free_bytes()
            assert free is None or free > 0

    def test_no_temporary_names(self, storage: Storage) -> None:
        """What a listing shows is what was stored: nothing of a put in progress stays."""
        storage.put("a", b"1", replace=False)
        storage.put("a", b"2", replace=True)
        with pytest.raises(ObjectExistsError):
            storage.put("a", b"3", replace=False)
        assert not any(name.startswith(TEMP_PREFIX) for name in self.names())
