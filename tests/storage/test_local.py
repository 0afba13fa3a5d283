"""Local directories: the common suite, and what only a local file system can do or break."""

import ctypes
import errno
import fcntl
import os
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

import faults
from shardckpt.errors import (
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageAccessError,
    StorageError,
    StorageFullError,
    UsageError,
)
from shardckpt.storage import BLOCK, LocalStorage, Storage, is_local, join, open_storage, posix, split
from storage.conformance import StorageConformance, noise, pieces, store

NOT_AS_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not stop the superuser")


class TestLocal(StorageConformance):
    refuses_existing = True

    @pytest.fixture(autouse=True)
    def root(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path

    def open(self, place: str = "step=10.ckpt") -> Storage:
        return open_storage(f"{self.tmp_path}/{place}")

    def peek(self, name: str, place: str = "step=10.ckpt") -> bytes | None:
        path = self.tmp_path / place / name
        return path.read_bytes() if path.exists() else None

    def poke(self, name: str, data: bytes, place: str = "step=10.ckpt") -> None:
        (self.tmp_path / place).mkdir(parents=True, exist_ok=True)
        (self.tmp_path / place / name).write_bytes(data)

    def names(self, place: str = "step=10.ckpt") -> set[str]:
        return {path.name for path in (self.tmp_path / place).iterdir()}


class TestBufferedLocal(TestLocal):
    """The same where direct I/O, preallocation and hard links are refused, as on many network file systems."""

    @pytest.fixture(autouse=True)
    def plain_file_system(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "not here")

        monkeypatch.setattr(posix, "open_direct", lambda _: None)
        monkeypatch.setattr(posix, "_set_direct", lambda _, *, on: not on)
        monkeypatch.setattr(posix, "_fallocate", lambda: None)
        monkeypatch.setattr(os, "link", refuse)


def aligned(nbytes: int) -> memoryview:
    """Page-aligned memory, as staging hands it out."""
    import mmap

    return memoryview(mmap.mmap(-1, nbytes))


def drop(path: Path) -> None:
    """Have the kernel forget a file's pages."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def test_what_the_cache_has(tmp_path: Path) -> None:
    """A file is hot only if all of it is; asking and reading directly leave it as it was, for the next load."""
    path, nbytes = tmp_path / "rank", BLOCK + 100
    path.write_bytes(noise(nbytes))
    storage = open_storage(tmp_path)
    assert storage.in_cache("rank", 0, nbytes)
    drop(path)
    if storage.in_cache("rank", 0, nbytes):
        pytest.skip("the file system keeps everything in memory")
    into = aligned(BLOCK)
    storage.read_into("rank", 0, into, cached=False)
    assert into == noise(nbytes)[:BLOCK]
    assert not any(storage.in_cache("rank", offset, 4096) for offset in range(0, BLOCK, 4096))
    storage.read_into("rank", BLOCK // 2, into[: BLOCK // 2])
    assert storage.in_cache("rank", BLOCK // 2, BLOCK // 2)
    assert not storage.in_cache("rank", 0, BLOCK)
    assert not storage.in_cache("rank", nbytes, 1)
    with pytest.raises(ObjectNotFoundError):
        storage.in_cache("missing", 0, 1)


NOBODY = 65534


def give_up(*capabilities: int) -> None:
    """Go on without some of root's rights."""
    library, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same for those above 31
    assert library.capget(header, held) == 0
    for capability in capabilities:
        held[0] &= ~(1 << capability)
        held[1] &= ~(1 << capability)
    assert library.capset(header, held) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="takes other users' places")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize(
    ("user", "owner", "mode", "without", "told"),
    [
        (0, NOBODY, 0o444, (), True),
        (0, NOBODY, 0o444, (posix._CAP_FOWNER,), True),
        (0, NOBODY, 0o644, (posix._CAP_FOWNER, 1, 2), False),  # nor CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        (0, 0, 0o444, (posix._CAP_FOWNER, 1, 2), True),
        (NOBODY, 0, 0o644, (), False),
        (NOBODY, 0, 0o666, (), True),
        (NOBODY, NOBODY, 0o444, (), True),
    ],
)
def test_who_is_not_told_what_the_cache_has(
    tmp_path: Path, user: int, owner: int, mode: int, without: tuple[int, ...], told: bool
) -> None:
    """To whom a file isn't his the kernel says that all of it is there; then it is read as if nothing were."""
    path = tmp_path / "rank"
    path.write_bytes(noise(BLOCK))
    os.chown(path, owner, owner)
    path.chmod(mode)
    file = os.open(path, os.O_RDONLY)

    def seen() -> int:
        child = os.fork()
        if child == 0:
            status = 2
            try:
                posix._acts_as_owner.cache_clear()
                os.setresuid(user, user, user) if user else give_up(*without)
                ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # /proc/self stays ours
                status = posix.is_resident(file, 0, BLOCK)
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    try:
        assert seen() == told
        drop(path)
        if posix.is_resident(file, 0, BLOCK):
            pytest.skip("the file system keeps everything in memory")
        assert seen() == 0
    finally:
        os.close(file)


@pytest.mark.parametrize("refused", [0, 1])
def test_direct_read_refused_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    """A file system that takes the flag and then wants another alignment costs speed only."""
    (tmp_path / "rank").write_bytes(noise(5 * 4096))
    preadv, direct = os.preadv, 0

    def grudging(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal direct
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            direct += 1
            if direct > refused:
                raise OSError(errno.EINVAL, "not so")
            buffers = [buffers[0][:4096]]
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", grudging)
    into = aligned(5 * 4096)
    open_storage(tmp_path).read_into("rank", 0, into, cached=False)
    assert into == noise(5 * 4096)
    assert direct == refused + 1


def test_direct_write(tmp_path: Path) -> None:
    """Aligned memory goes past the page cache, the odd tail through it, and the file is exact."""
    size = 3 * BLOCK + 12_345
    buffer = aligned(4 * BLOCK)
    buffer[:size] = noise(size)
    writer = open_storage(tmp_path).create("rank", size)
    for offset in range(0, size, BLOCK):
        writer.write(offset, buffer[offset : min(offset + BLOCK, size)])
    writer.commit()
    assert (tmp_path / "rank").read_bytes() == buffer[:size]


@pytest.mark.parametrize("answer", ["refused", "page", "odd"])
def test_direct_write_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """A file system that takes O_DIRECT and then refuses or shortens a write still gets every byte."""
    real, calls = os.pwrite, []

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append((offset, len(data)))
        if len(calls) == 1 and answer == "refused":
            raise OSError(errno.EINVAL, "coarser alignment, please")
        if len(calls) == 1:
            data = data[: 4096 if answer == "page" else 5000]
            descriptor = os.open(tmp_path / "rank", os.O_WRONLY)
            try:
                return real(descriptor, data, offset)
            finally:
                os.close(descriptor)
        return real(descriptor, data, offset)

    buffer = aligned(BLOCK)
    buffer[:] = noise(BLOCK)
    writer = open_storage(tmp_path).create("rank", BLOCK)
    monkeypatch.setattr(os, "pwrite", pwrite)
    writer.write(0, buffer)
    writer.commit()
    assert (tmp_path / "rank").read_bytes() == buffer
    assert len(calls) > 1


def test_preallocated(tmp_path: Path) -> None:
    """Space is taken when a file is begun, so that parallel writes need not extend it, and given back at the end."""
    writer = open_storage(tmp_path).create("rank", 4 * BLOCK)
    assert (tmp_path / "rank").stat().st_blocks * 512 >= 4 * BLOCK
    writer.write(0, memoryview(b"short"))
    writer.commit()
    assert (tmp_path / "rank").stat().st_size == 5
    assert (tmp_path / "rank").stat().st_blocks * 512 < BLOCK


def test_disk_full_found_early(tmp_path: Path) -> None:
    """A disk without room is an error before the first byte is written, and no huge empty file stays."""
    storage = open_storage(tmp_path)
    free = storage.free_bytes()
    assert free is not None
    with pytest.raises(StorageFullError, match=r"reserve.*rank.*Free space") as caught:
        storage.create("rank", free + (1 << 40))
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full")
def test_disk_full_while_writing(tmp_path: Path) -> None:
    """A disk that fills up under a write is the error that says so, and the file cannot be committed."""
    writer: Any = open_storage(tmp_path).create("rank", 10)
    os.dup2(full := os.open("/dev/full", os.O_WRONLY), writer._buffered)
    os.close(full)
    with pytest.raises(StorageFullError, match="No space left"):
        writer.write(0, memoryview(b"0123456789"))
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions(tmp_path: Path, umask: int) -> None:
    """Files and directories get what the umask leaves: a team can read them, and nobody whom the umask shuts out."""
    before = os.umask(umask)
    try:
        storage = open_storage(tmp_path / "new" / "step=1.ckpt")
        storage.prepare()
        store(storage, "rank", b"data")
        storage.put("manifest.json", b"{}", replace=True)
        storage.put("lease", b"{}", replace=False)
    finally:
        os.umask(before)
    for name in ("rank", "manifest.json", "lease"):
        assert stat.S_IMODE((tmp_path / "new/step=1.ckpt" / name).stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "new/step=1.ckpt").stat().st_mode) == 0o777 & ~umask


def test_copies_are_links(tmp_path: Path) -> None:
    """An alias on the same disk costs no bytes."""
    first, second = open_storage(tmp_path / "a"), open_storage(tmp_path / "b")
    first.prepare()
    second.prepare()
    store(first, "rank", b"data")
    second.copy_from(first, ["rank"])
    assert (tmp_path / "a/rank").stat().st_ino == (tmp_path / "b/rank").stat().st_ino


def test_link_to_place(tmp_path: Path) -> None:
    """A place that is a symbolic link is read through, removed as a link, and its target is never touched."""
    target = open_storage(tmp_path / "step=1.ckpt")
    target.prepare()
    target.put("manifest.json", b"{}", replace=True)
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    link = open_storage(f"{tmp_path}/last.ckpt/")
    assert link.get("manifest.json") == b"{}"
    assert [entry.name for entry in link.list()] == ["manifest.json"]
    link.remove_place()
    assert (tmp_path / "last.ckpt").is_symlink()
    assert link.unlink_link() is True
    assert link.unlink_link() is False
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert target.get("manifest.json") == b"{}"
    assert target.unlink_link() is False


def test_dangling_link(tmp_path: Path) -> None:
    """A link whose target is gone can still be removed, lists as nothing, and is not written through."""
    (tmp_path / "last.ckpt").symlink_to("gone")
    link = open_storage(tmp_path / "last.ckpt")
    assert link.list() == []
    assert link.free_bytes() is not None
    with pytest.raises(StorageError, match="in the way"):
        link.prepare()
    assert link.unlink_link() is True
    assert list(tmp_path.iterdir()) == []


def test_links_inside(tmp_path: Path) -> None:
    """A checkpoint from elsewhere cannot lead out of its directory by a link, in reading or in writing."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    storage = open_storage(tmp_path / "c")
    storage.prepare()
    (tmp_path / "c/rank").symlink_to(secret)
    for read in (
        lambda: storage.get("rank"),
        lambda: storage.size("rank"),
        lambda: storage.read_into("rank", 0, memoryview(bytearray(3))),
        lambda: open_storage(tmp_path).copy_from(storage, ["rank"]),
    ):
        with pytest.raises(CorruptCheckpointError, match="symbolic link"):
            read()
    assert storage.list() == []
    with pytest.raises(ObjectExistsError):
        storage.create("rank", 1)
    storage.put("rank", b"new", replace=True)
    assert secret.read_bytes() == b"secret"
    assert storage.get("rank") == b"new"


def test_not_a_file(tmp_path: Path) -> None:
    """A pipe in a checkpoint does not stop a load for ever, and a directory is no object."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    storage = open_storage(tmp_path)
    for name in ("pipe", "directory"):
        with pytest.raises(CorruptCheckpointError, match="not a regular file"):
            storage.get(name)
    assert storage.list() == []
    with pytest.raises(StorageError, match="directory"):
        storage.delete(["directory"])


def test_file_in_the_way(tmp_path: Path) -> None:
    """Saving to the path of an old single-file checkpoint says what is in the way, and leaves it."""
    (tmp_path / "old.ckpt").write_bytes(b"torch")
    storage = open_storage(tmp_path / "old.ckpt")
    with pytest.raises(StorageError, match=r"old\.ckpt.*in the way"):
        storage.prepare()
    with pytest.raises(StorageError):
        open_storage(tmp_path / "old.ckpt" / "below").prepare()
    storage.remove_place()
    assert (tmp_path / "old.ckpt").read_bytes() == b"torch"


@NOT_AS_ROOT
def test_no_permission(tmp_path: Path) -> None:
    """A directory that may not be written is found when a save begins."""
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageAccessError, match="permissions"):
            open_storage(tmp_path).prepare()
        with pytest.raises(StorageAccessError):
            open_storage(tmp_path / "new").prepare()
    finally:
        tmp_path.chmod(0o700)


def test_place_missing(tmp_path: Path) -> None:
    """Writing into a place that was removed fails: a late heartbeat must not bring a deleted checkpoint back."""
    storage = open_storage(tmp_path / "gone")
    with pytest.raises(ObjectNotFoundError):
        storage.put("lease", b"", replace=True)
    with pytest.raises(ObjectNotFoundError):
        storage.create("rank", 1)
    assert list(tmp_path.iterdir()) == []


def test_ways_to_say_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way Lightning or a user writes a local path means the same directory, also after a change of directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    storages = [
        open_storage(spelling, {"anon": True})
        for spelling in (
            tmp_path / "c",
            Path("c"),
            "c",
            "./c",
            "c/",
            "c//",
            "~/c",
            f"file://{tmp_path}/c",
            f"local://{tmp_path}/c/",
            f"{tmp_path}/./c",
            f"{tmp_path}/x/../c",
        )
    ]
    (tmp_path / "x").mkdir()
    monkeypatch.chdir("/")
    storages[0].prepare()
    for number, storage in enumerate(storages):
        storage.put(f"{number}", b"", replace=False)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {str(number) for number in range(len(storages))}
    assert {storage.url for storage in storages[:-1]} == {str(tmp_path / "c")}


@pytest.mark.parametrize("path", ["", "s3:/bucket/key", Path("s3://bucket/key"), "file://", "nul\0", "nonsense://x"])
def test_paths_refused(path: str | Path) -> None:
    """A path that means nothing is refused at once; above all a URL that pathlib has mangled into a local directory."""
    with pytest.raises(UsageError):
        open_storage(path)


@pytest.mark.parametrize(
    ("path", "parent", "name"),
    [
        ("/a/b", "/a", "b"),
        ("/a/b/", "/a", "b"),
        ("/a", "/", "a"),
        ("/", "/", ""),
        ("a", ".", "a"),
        ("a/b", "a", "b"),
        ("s3://bucket/a/b", "s3://bucket/a", "b"),
        ("s3://bucket/a/", "s3://bucket", "a"),
        ("s3://bucket", "s3://bucket", ""),
        ("s3://bucket/", "s3://bucket", ""),
        ("memory://a/b", "memory://a", "b"),
        ("memory://a", "memory://", "a"),
        ("file:///a", "file:///", "a"),
        ("file:///a/b", "file:///a", "b"),
        ("simplecache::s3://bucket/a", "simplecache::s3://bucket", "a"),
    ],
)
def test_split_join(path: str, parent: str, name: str) -> None:
    """Parents and siblings of a checkpoint are found for every kind of path, without eating slashes of a scheme."""
    assert split(path) == (parent, name)
    if name and path != "a":
        assert join(parent, name) == path.rstrip("/")


def test_split_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory one stands in has a parent too."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert split(".") == (str(tmp_path.resolve()), "run")
    assert is_local(".")
    assert not is_local("s3://bucket")


def test_of_two_that_replace_one_object_only_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at what is there and the switch nobody else switches: each would think that it had won."""
    storage = LocalStorage(tmp_path)
    storage.put("record", b"old", replace=False)
    came = threading.Event()
    outcomes: dict[str, str] = {}

    def replace(data: bytes) -> None:
        try:
            storage.put("record", data, replace=b"old")
            outcomes[data.decode()] = "replaced"
        except ObjectExistsError:
            outcomes[data.decode()] = "refused"

    other = threading.Thread(target=replace, args=(b"second",))
    lock = fcntl.flock

    def locking(descriptor: int, how: int) -> None:
        if threading.current_thread() is other:
            came.set()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", locking)
    with faults.broken() as disk:

        def look() -> None:
            if threading.current_thread() is other:
                came.set()  # nothing has kept it from going on
                return
            other.start()
            assert came.wait(60)

        disk.add("replace", look, last=None)
        replace(b"first")
        other.join(60)
    assert outcomes == {"first": "replaced", "second": "refused"}
    assert storage.get("record") == b"first"
    assert os.listdir(tmp_path) == ["record"]


def test_an_object_that_cannot_be_locked_is_replaced_nevertheless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems know no locks; there the look just before has to do."""

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    storage = LocalStorage(tmp_path)
    storage.put("record", b"old", replace=False)
    storage.put("record", b"new", replace=b"old")
    assert storage.get("record") == b"new"


def test_killed_put_leaves_old_or_new(tmp_path: Path) -> None:
    """A process killed in the middle of replacing leaves the old object or the new one, whole."""
    program = textwrap.dedent("""
        import sys
        from shardckpt.storage import open_storage
        storage = open_storage(sys.argv[1])
        print("ready", flush=True)
        for number in range(10**9):
            storage.put("manifest.json", bytes([number % 256]) * 50_000, replace=True)
    """)
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            while not (tmp_path / "manifest.json").exists():
                pass
            process.kill()
        data = (tmp_path / "manifest.json").read_bytes()
        assert data == data[:1] * 50_000


def test_import_is_light() -> None:
    """A program that keeps its checkpoints locally does not pay for S3 clients, nor for their threads."""
    program = """
import sys, tempfile, threading
import shardckpt.storage
shardckpt.storage.open_storage(tempfile.gettempdir()).list()
heavy = {"s3fs", "botocore", "aiobotocore", "boto3"} & set(sys.modules)
assert not heavy, heavy
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_repr(tmp_path: Path) -> None:
    """A storage in a traceback says where it is."""
    assert repr(LocalStorage(tmp_path)) == f"LocalStorage({str(tmp_path)!r})"


def test_failed_piece_blocks_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that failed in one thread keeps the file from being committed by another."""
    data = noise(2 * BLOCK)
    writer = open_storage(tmp_path).create("rank", len(data))
    (first, second) = pieces(data)
    writer.write(*first)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken disk")))
        with pytest.raises(StorageError, match="broken disk"):
            writer.write(*second)
    # Neither the size of the file nor a hole would show it: the piece is the last.
    with pytest.raises(StorageError, match="could not be written"):
        writer.commit()
    writer.abort()
    assert list(tmp_path.iterdir()) == []
