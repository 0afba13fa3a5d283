"""Checkpoints in a local directory: parallel direct writes, fsync before publish.

Data files are written under their final names, which are unique to a save, so no rename is needed; small files are
written aside and renamed or linked into place. Files get the permissions that the umask leaves.
"""

import builtins
import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from secrets import token_hex

from shardckpt.errors import CorruptCheckpointError, ObjectExistsError, StorageError
from shardckpt.storage import posix
from shardckpt.storage.base import (
    BLOCK,
    GET_LIMIT,
    ObjectWriter,
    Read,
    Stat,
    Storage,
    check_held,
    check_name,
    copy_plain,
    octets,
)
from shardckpt.storage.local_files import LocalWriter, calling, fill, opened
from shardckpt.storage.translate import translating
from shardckpt.workers import THREADS

TEMP_PREFIX = ".tmp-"
"""Names of files that a crash in the middle of :meth:`LocalStorage.put` may leave behind begin with this."""
_TEMPORARY = re.compile(re.escape(TEMP_PREFIX) + "[0-9a-f]{16}")

# Where hard links are refused a copy will do: another device, a file system or a policy without them, too many links.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


def temporary_name() -> str:
    """A name for a file that is there for a moment."""
    return TEMP_PREFIX + token_hex(8)


def is_temporary(name: str) -> bool:
    """Whether a name is one that `temporary_name` gave; users have files of their own that begin like it."""
    return _TEMPORARY.fullmatch(name) is not None


class LocalStorage:
    """A directory. The :class:`~shardckpt.storage.Storage` contract applies."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        # pathlib collapses "." and doubled slashes but keeps "..", which no text can resolve beyond a symbolic link.
        with translating("resolve", os.fspath(directory)):
            self._directory = str(_expand_user(os.fspath(directory)).absolute())
        self.url = self._directory
        self.read_cache = posix.host()
        self.has_places = True
        self.width = THREADS
        self.stretch = BLOCK

    @property
    def directory(self) -> str:
        """The absolute path."""
        return self._directory

    def create(self, name: str, size_hint: int, *, front_last: bool = False) -> ObjectWriter:  # noqa: ARG002 - any order will do
        return LocalWriter(self.path_of(name), size_hint)

    def put(self, name: str, data: bytes, *, replace: bool | bytes, durable: bool = True) -> None:
        path = self.path_of(name)
        with calling("write", path), self._written_aside(data, durable=durable) as (aside, descriptor):
            if isinstance(replace, bytes):
                # Last of all, and with nobody else between the look and the switch.
                with posix.locked(path):
                    check_held(self, name, replace)
                    os.replace(aside, path)
            elif replace:
                os.replace(aside, path)
            else:
                _link_new(aside, descriptor, path)
            if durable:
                posix.sync_directory(self._directory)

    def get(self, name: str, *, limit: int = GET_LIMIT) -> bytes:
        path = self.path_of(name)
        with calling("read", path), opened(path) as (descriptor, size):
            if size > limit:
                raise CorruptCheckpointError(f"{path} is {size} bytes long, more than the {limit} that are sensible")
            data = bytearray(size)
            fill(path, descriptor, 0, memoryview(data))
            return bytes(data)

    def read_into(self, name: str, offset: int, into: memoryview, *, cached: bool = True) -> None:
        path = self.path_of(name)
        into = octets(into)
        with calling("read", path), opened(path) as (descriptor, _):
            done = 0 if cached else posix.read_direct(descriptor, into, offset)
            fill(path, descriptor, offset + done, into[done:])

    def stream(self, name: str, start: int, stop: int) -> AbstractContextManager[Read]:  # noqa: ARG002 - reads are no requests
        return nullcontext(partial(self.read_into, name, cached=False))

    def in_cache(self, name: str, offset: int, nbytes: int) -> bool:
        path = self.path_of(name)
        with calling("look at", path), opened(path) as (descriptor, size):
            nbytes = min(nbytes, size - offset)
            return nbytes > 0 and posix.is_resident(descriptor, offset, nbytes)

    def size(self, name: str) -> int:
        path = self.path_of(name)
        with calling("look at", path), opened(path) as (_, size):
            return size

    def list(self) -> builtins.list[Stat]:
        """Return the regular files, by name. Links to files are left out, since they would not be read either."""
        found = []
        with calling("list", self.url):
            for entry in self._entries():
                # A file that another process removes between the listing and the look is simply not there.
                with suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        found.append(Stat(entry.name, status.st_size, status.st_mtime))
        return sorted(found)

    def children(self) -> builtins.list[str]:
        """Return the names of the directories and of the links to directories, sorted."""
        with calling("list", self.url):
            return sorted(entry.name for entry in self._entries() if posix.is_directory(entry))

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            path = self.path_of(name)
            with calling("delete", path), suppress(FileNotFoundError):
                os.unlink(path)

    def copy_from(self, other: Storage, names: Sequence[str]) -> None:
        for name in names:
            target = self.path_of(name)
            if not (isinstance(other, LocalStorage) and _try_link(other.path_of(name), target)):
                copy_plain(other, self, name)
        self.sync()

    def prepare(self) -> None:
        with calling("make the directory", self.url):
            _make_directories(self._directory)
        # Asking for permission bits would not do: root ignores them, network file systems have rules of their own.
        with calling("write a file into", self.url), self._written_aside(b"", durable=False):
            pass

    def remove_place(self) -> None:
        with calling("remove the directory", self.url):
            try:
                os.rmdir(self._directory)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EBUSY):
                    raise
                return
            posix.sync_directory(os.path.dirname(self._directory))

    def unlink_link(self) -> bool:
        with calling("remove the link", self.url):
            if not os.path.islink(self._directory):
                return False
            with suppress(FileNotFoundError):
                os.unlink(self._directory)
            posix.sync_directory(os.path.dirname(self._directory))
            return True

    def free_bytes(self) -> int | None:
        """Return what an unprivileged user may write to the file system of the nearest directory that exists."""
        place = Path(self._directory)
        for directory in (place, *place.parents):
            try:
                status = os.statvfs(directory)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError:
                return None
            return status.f_bavail * status.f_frsize
        return None

    def sync(self) -> None:
        with calling("sync the directory", self.url):
            posix.sync_directory(self._directory)
            # Not only where this process made a directory: another may have made it just now, and not synced it yet.
            directory = os.path.realpath(self._directory)
            while not os.path.ismount(directory):
                directory = os.path.dirname(directory)
                if os.access(directory, os.W_OK):  # or nobody who saves here can have made anything in it
                    posix.sync_directory(directory)

    def __repr__(self) -> str:
        return f"LocalStorage({self.url!r})"

    def path_of(self, name: str) -> str:
        """The path of an object."""
        return os.path.join(self._directory, check_name(name))

    def _entries(self) -> Sequence["os.DirEntry[str]"]:
        try:
            with os.scandir(self._directory) as entries:
                return [*entries]
        except FileNotFoundError:
            return []

    @contextmanager
    def _written_aside(self, data: bytes, *, durable: bool) -> Iterator[tuple[str, int]]:
        """Write ``data`` to a file of another name in the directory; remove that name at the end."""
        aside = os.path.join(self._directory, temporary_name())
        descriptor = posix.open_new(aside)
        try:
            posix.write_fully(descriptor, memoryview(data), 0)
            if durable:
                posix.sync_file(descriptor)
            yield aside, descriptor
        finally:
            os.close(descriptor)
            with suppress(FileNotFoundError):
                os.unlink(aside)


def _link_new(aside: str, descriptor: int, path: str) -> None:
    """Give the file ``aside`` the name ``path``, unless that exists."""
    try:
        os.link(aside, path)
    except OSError as error:
        # An NFS server that had to be asked twice answers EEXIST to the second: two names say that the first worked.
        if os.fstat(descriptor).st_nlink == 2:
            return
        if error.errno not in _NO_LINK:
            raise
        # Whoever makes the empty file owns the name, and may then replace it.
        os.close(posix.open_new(path))
        os.replace(aside, path)


def _try_link(source: str, target: str) -> bool:
    """Hard-link a regular file; False where that is impossible and a copy has to be made."""
    with calling("copy", source), opened(source):
        try:
            os.link(source, target, follow_symlinks=False)
        except FileExistsError as error:
            raise ObjectExistsError(f"cannot copy {source} to {target}: it exists already") from error
        except OSError as error:
            if error.errno in _NO_LINK:
                return False
            raise
        return True


def _make_directories(directory: str) -> None:
    """Make a directory and its parents; they last once there was a `LocalStorage.sync`."""
    if os.path.isdir(directory):
        return
    parent = os.path.dirname(directory)
    if parent != directory:
        _make_directories(parent)
    try:
        os.mkdir(directory)
    except FileExistsError:
        if not os.path.isdir(directory):
            raise StorageError(
                f"cannot make the directory {directory}: a file or a broken link of that name is in the way. Remove it "
                "or choose another path"
            ) from None


def _expand_user(path: str) -> Path:
    return Path(os.path.expanduser(path)) if path.startswith("~") else Path(path)
