"""Checkpoints on any file system that fsspec knows; :mod:`shardckpt.storage.s3` does better for S3.

Atomicity, durability and create-only writes are as good as the file system's own ``pipe_file`` and ``open``: object
stores (GCS, Azure) show an object only when it is complete; SFTP and its like do not.
"""

import builtins
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from shardckpt.errors import CorruptCheckpointError, ObjectExistsError, ObjectNotFoundError, UsageError
from shardckpt.storage.base import (
    GET_LIMIT,
    ObjectWriter,
    Pieces,
    Read,
    Stat,
    Storage,
    check_held,
    check_name,
    copy_plain,
    octets,
)
from shardckpt.storage.concealment import cleanse, secrets_of, without_credentials
from shardckpt.storage.retry import retrying
from shardckpt.storage.traffic import WIDTH, fill, incoming
from shardckpt.storage.translate import translating
from shardckpt.workers import for_each

STRETCH: Final = 16 << 20
"""Bytes asked for in one request at most: the file system returns memory of its own, which is copied into place."""

# Where the file systems of fsspec keep the time of the last write; some have only that of the creation.
_MODIFIED_KEYS = ("LastModified", "mtime", "modified", "updated", "last_modified", "created")


def filesystem_of(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the file system that understands ``url``, and the path in it. Nothing is connected to yet.

    Raises:
        UsageError: there is none, its package is not installed, or it does not take the ``options``.
    """
    from fsspec.core import url_to_fs

    shown = without_credentials(url)
    try:
        filesystem, path = url_to_fs(url, **options)
    except ImportError as error:
        remedy = 'pip install "shardckpt[s3]"' if url.startswith(("s3://", "s3a://")) else str(error)
        raise UsageError(f"cannot open {shown}: the package that handles such URLs is missing: {remedy}") from error
    except (TypeError, ValueError, KeyError) as error:
        cleanse(error, secrets_of(options))
        raise UsageError(f"cannot open {shown}: {error}. Check the URL and storage_options") from error
    return filesystem, path


class RemoteStorage:
    """A directory of an fsspec file system. The :class:`~shardckpt.storage.Storage` contract applies.

    Args:
        filesystem: the ``fsspec.AbstractFileSystem``; it is shared with whoever else asked fsspec for it.
        path: the place within ``filesystem``, as ``fsspec.core.url_to_fs`` gives it.
        url: the place for messages, without credentials.
        secrets: what to keep out of messages.
    """

    def __init__(self, filesystem: Any, path: str, url: str, secrets: tuple[str, ...]) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url
        self.read_cache = ""
        self.has_places = True
        self.width = WIDTH
        self.stretch = STRETCH
        self.filesystem = filesystem
        self._root = path.rstrip("/")
        self._secrets = secrets

    def create(self, name: str, size_hint: int, *, front_last: bool = False) -> ObjectWriter:  # noqa: ARG002 - fsspec reserves nothing
        return RemoteWriter(self, name)

    def put(self, name: str, data: bytes, *, replace: bool | bytes, durable: bool = True) -> None:  # noqa: ARG002 - a put is durable
        path = self.path_of(name)
        if isinstance(replace, bytes):
            check_held(self, name, replace)
        with self.translating("write", name):
            if replace is not False:
                self.filesystem.pipe_file(path, data)
            else:
                # Asked as well as told, for file systems that ignore the mode; on those two writers can both succeed.
                self.forget(path)
                if self.filesystem.exists(path):
                    raise ObjectExistsError(f"cannot write {self.url_of(name)}: it exists already")
                try:
                    self.filesystem.pipe_file(path, data, mode="create")
                except TypeError:
                    # It does not know the word; that nothing is there has been asked.
                    self.filesystem.pipe_file(path, data)
        self.forget(path)

    def get(self, name: str, *, limit: int = GET_LIMIT) -> bytes:
        size = self.size(name)
        if size > limit:
            raise self.too_large(name, size, limit)
        with self.translating("read", name):
            return bytes(retrying(lambda: self.filesystem.cat_file(self.path_of(name))))

    def read_into(self, name: str, offset: int, into: memoryview, *, cached: bool = True) -> None:  # noqa: ARG002 - there is no cache
        fill(offset, into, self.stretch, partial(self.stream, name))

    def stream(self, name: str, start: int, stop: int) -> AbstractContextManager[Read]:  # noqa: ARG002 - the first call says
        end = -1

        def more(at: int) -> bytes:
            nonlocal end
            # Fewer bytes than were asked for mean that there are no more.
            data = self._read_range(name, at, stop - at) if at != end else b""
            end = at + len(data)
            return data

        return incoming(self.url_of(name), more)

    def in_cache(self, name: str, offset: int, nbytes: int) -> bool:  # noqa: ARG002 - there is none
        check_name(name)
        return False

    def size(self, name: str) -> int:
        path = self.path_of(name)
        with self.translating("look at", name):
            self.forget(path)
            info = retrying(lambda: self.filesystem.info(path))
            if info["type"] != "file":
                raise ObjectNotFoundError(f"cannot look at {self.url_of(name)}: it is a directory, not an object")
            return int(info["size"])

    def list(self) -> builtins.list[Stat]:
        return sorted(
            Stat(_basename(info["name"]), int(info["size"]), _modified(info))
            for info in self._entries()
            if info["type"] == "file"
        )

    def children(self) -> builtins.list[str]:
        return sorted(_basename(info["name"]) for info in self._entries() if info["type"] == "directory")

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            path = self.path_of(name)
            # Not ``rm``: that takes its argument for a pattern.
            with self.translating("delete", name), suppress(FileNotFoundError):
                self.filesystem.rm_file(path)
            self.forget(path)

    def copy_from(self, other: Storage, names: Sequence[str]) -> None:
        def copy(name: str) -> None:
            if isinstance(other, RemoteStorage) and other.filesystem == self.filesystem:
                with self.translating("copy", name):
                    self.filesystem.cp_file(other.path_of(name), self.path_of(name))
                self.forget(self.path_of(name))
            else:
                copy_plain(other, self, name)

        for_each(names, copy, threads=self.width, name="copy")

    def prepare(self) -> None:
        with self.translating("make the directory"):
            self.filesystem.makedirs(self._root, exist_ok=True)
        self.forget(self._root)

    def remove_place(self) -> None:
        with self.translating("remove the directory"):
            self.forget(self._root)
            if self.filesystem.isdir(self._root) and not self.filesystem.ls(self._root, detail=False):
                self.filesystem.rmdir(self._root)
        self.forget(self._root)

    def unlink_link(self) -> bool:
        """Return False: fsspec shows no links."""
        return False

    def free_bytes(self) -> int | None:
        """Return None: fsspec has no such question."""
        return None

    def sync(self) -> None:
        """Do nothing: there is nothing that could be asked."""

    def path_of(self, name: str) -> str:
        """The path of an object within the file system."""
        return f"{self._root}/{check_name(name)}"

    def url_of(self, name: str) -> str:
        """The URL of an object, for messages."""
        return f"{self.url}/{name}"

    def translating(self, doing: str, name: str = "") -> AbstractContextManager[None]:
        """Enclose calls to the file system: what it raises comes out as one of our errors."""
        return translating(doing, self.url_of(name) if name else self.url, self._secrets)

    def forget(self, path: str) -> None:
        """Make file systems of this kind forget their listings of ``path``."""
        forget(type(self.filesystem), path, self.filesystem)

    def too_large(self, name: str, size: int, limit: int) -> CorruptCheckpointError:
        """The error for a small object that is not small."""
        return CorruptCheckpointError(
            f"{self.url_of(name)} is {size} bytes long, more than the {limit} that are sensible"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def open_for_writing(self, name: str) -> Any:
        """Open an object as a binary file that is written from its beginning to its end."""
        return self.filesystem.open(self.path_of(name), "wb")

    def _read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        """Return up to ``nbytes`` from ``offset`` on; fewer where the object ends before."""
        path = self.path_of(name)
        with self.translating("read", name):
            return bytes(retrying(lambda: self.filesystem.cat_file(path, start=offset, end=offset + nbytes)))

    def _entries(self) -> builtins.list[dict[str, Any]]:
        with self.translating("list"):
            self.forget(self._root)
            try:
                found: builtins.list[dict[str, Any]] = retrying(
                    lambda: self.filesystem.ls(self._root or "/", detail=True)
                )
            except (FileNotFoundError, NotADirectoryError):
                return []
        # ``ls`` of a file gives the file, and some object stores list a directory among its own entries.
        own = self._root.strip("/")
        return [info for info in found if info["name"].strip("/") != own]


class RemoteWriter:
    """One object, written in the order of its offsets. The :class:`~shardckpt.storage.ObjectWriter` contract applies.

    A file is all that fsspec has for writing what is too large for memory; it sends one part after another. Where there
    is a way to do better the storage is another one: see ``objects`` and ``s3``.

    Pieces that come before their turn are held in memory; those that are due are written by whoever brings them,
    while the others wait: so the amount held is what the callers are ahead of the order, no more.
    """

    def __init__(self, storage: RemoteStorage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._pieces = Pieces(storage.url_of(name))
        self._turn = threading.Lock()
        self._early: dict[int, bytes] = {}
        self._position = 0
        self._committed = False
        with storage.translating("create", name):
            self._file = storage.open_for_writing(name)

    def write(self, offset: int, data: memoryview) -> None:
        data = octets(data)
        with self._pieces.writing(offset, len(data)), self._storage.translating("write", self._name), self._turn:
            if offset != self._position:
                self._early[offset] = bytes(data)
                return
            self._append(data)
            while (held := self._early.pop(self._position, None)) is not None:
                self._append(memoryview(held))

    def commit(self) -> None:
        self._pieces.finish()
        with self._storage.translating("commit", self._name):
            self._file.close()
        self._storage.forget(self._storage.path_of(self._name))
        self._committed = True

    def abort(self) -> None:
        if self._committed:
            return
        self._pieces.close()
        self._early.clear()
        # Closing a file of fsspec completes it, however little was written: only then is there something to delete.
        with suppress(Exception):
            self._file.close()
        with suppress(Exception):
            self._storage.delete([self._name])

    def _append(self, data: memoryview) -> None:
        self._file.write(data)
        self._position += len(data)


def forget(kind: type[Any], path: str, *others: Any) -> None:
    """Make all file systems of one kind forget their listings of ``path`` and its parents, and ``others`` too.

    All of them: fsspec has an instance for each set of options, and a training loop may look at a checkpoint through
    another one than it was saved with.
    """
    found = [*others, *getattr(kind, "_cache", {}).values()]
    for filesystem in {id(filesystem): filesystem for filesystem in found}.values():
        filesystem.invalidate_cache(path)
        filesystem.invalidate_cache(path.rpartition("/")[0])


def _basename(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _modified(info: dict[str, Any]) -> float | None:
    value = next((info[key] for key in _MODIFIED_KEYS if info.get(key) is not None), None)
    if isinstance(value, str):
        with suppress(ValueError):
            value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return float(value) if isinstance(value, int | float) else None
