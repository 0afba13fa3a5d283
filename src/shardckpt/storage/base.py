"""What a place to keep checkpoints must offer: the contract between shardckpt and its storage backends.

A :class:`Storage` is one flat place: a local directory, or a key prefix of an object store. Objects in it have plain
names. Every error that leaves a storage is one of :mod:`shardckpt.errors`; the error of the backend is its cause.
"""

import builtins
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol, runtime_checkable

from shardckpt.errors import ObjectExistsError, ObjectNotFoundError, StorageError, UsageError

BLOCK = 8 << 20
"""Bytes of one piece of an object that is being written; see :meth:`ObjectWriter.write`."""

GET_LIMIT = 1 << 30
"""Bytes that :meth:`Storage.get` is willing to allocate unless the caller says otherwise."""

Read = Callable[[int, memoryview], None]
"""Fills memory with an object's bytes from an offset on; see :meth:`Storage.stream`."""


class Stat(NamedTuple):
    """One object as a listing shows it."""

    name: str
    """Plain name, without directory or prefix."""
    size: int
    """Bytes."""
    modified: float | None
    """Unix time in seconds of the last write, by the clock of the storage; None where it does not tell."""


@runtime_checkable
class ObjectWriter(Protocol):
    """One object being written. It is not part of the storage before :meth:`commit` has returned."""

    def write(self, offset: int, data: memoryview) -> None:
        """Store ``data`` at byte ``offset`` of the object. May be called from several threads at once.

        Pieces come in any order and do not overlap. Each starts at a multiple of :data:`BLOCK` and is ``BLOCK`` bytes
        long, except the object's last, which may be shorter (but not empty). ``data`` is one-dimensional and
        contiguous; when the call returns its memory may be used for something else.

        Raises:
            StorageError: (or a subclass) the storage refused. The object cannot be committed any more.
        """

    def commit(self) -> None:
        """Make the object durable: when this returns it exists with exactly the bytes written, and survives a crash.

        Raises:
            StorageError: (or a subclass) it could not be made durable, a piece failed, or there are holes between the
                pieces (that the last one came, only the caller can know). Call :meth:`abort` then.
        """

    def abort(self) -> None:
        """Stop, wait for calls of :meth:`write` in other threads, and remove what was written. Never raises.

        Does nothing after a :meth:`commit` that returned: the object is the storage's then, see :meth:`Storage.delete`.
        """


@runtime_checkable
class Storage(Protocol):
    """One directory or key prefix. All methods may be called from several threads at once.

    ``name`` is always one plain path component (:func:`check_name`).
    """

    url: str
    """The place, for messages: absolute, without credentials."""
    read_cache: str
    """Names the memory that keeps what any process has read through it: a host's page cache. Empty where there is none,
    and every read goes to the place itself."""
    has_places: bool
    """Whether a place must be made before anything can be put in it: a directory must, a prefix of keys need not."""
    width: int
    """How many pieces of an object are worth being written or read at the same time, each by a thread of its own."""
    stretch: int
    """Bytes that are worth being asked for at a time: :data:`BLOCK`, or more where a request waits for its answer."""

    def create(self, name: str, size_hint: int, *, front_last: bool = False) -> ObjectWriter:
        """Begin a new object of about ``size_hint`` bytes (0: unknown); local storage allocates them on the disk now.

        ``name`` must be new: local storage refuses an existing file, an object store replaces it at ``commit``.
        ``front_last`` says that the first piece will come after all others. A storage that has to send pieces in order
        keeps in memory those that come before their turn, and may do better when it knows.

        Raises:
            StorageFullError: there is no room for ``size_hint`` bytes.
            ObjectExistsError: local storage holds a file of that name.
            StorageAccessError: the place may not be written.
        """

    def put(self, name: str, data: bytes, *, replace: bool | bytes, durable: bool = True) -> None:
        """Store a small object atomically and durably: readers see the old one or the new one, nothing between.

        With ``replace=False`` exactly one of several concurrent callers succeeds. Given bytes, the object is replaced
        only if it holds those; on an object store that knows conditions exactly one of several callers succeeds then
        too, elsewhere it is looked at just before. With ``durable=False`` a crash of the machine may lose the object,
        which saves the time to make sure that it does not.

        Raises:
            ObjectExistsError: what is there is not what ``replace`` asks for; nothing was changed.
        """

    def get(self, name: str, *, limit: int = GET_LIMIT) -> bytes:
        """Return a whole small object.

        Raises:
            ObjectNotFoundError: it does not exist.
            CorruptCheckpointError: it is larger than ``limit`` bytes, or not a regular file.
        """

    def read_into(self, name: str, offset: int, into: memoryview, *, cached: bool = True) -> None:
        """Fill ``into`` (one-dimensional, contiguous, writable) with the object's bytes from ``offset`` on.

        ``cached`` is whether to go through `read_cache`: for what is in it, or what others that have the same will want
        of it soon. Without, local storage reads past the cache where that can be done, which is faster for data that is
        not in it and leaves none there.

        Raises:
            ObjectNotFoundError: the object does not exist.
            CorruptCheckpointError: the object ends before ``into`` is full. ``into`` may be partly overwritten.
        """

    def stream(self, name: str, start: int, stop: int) -> AbstractContextManager[Read]:
        """Read bytes [start, stop) of an object from front to back, by one request where requests are what it takes.

        What is yielded fills memory (as for :meth:`read_into`) with the bytes from an offset on, as they come. It is
        for one thread, and for offsets that ascend: to go back costs another request. It raises what `read_into` does.
        """

    def in_cache(self, name: str, offset: int, nbytes: int) -> bool:
        """Tell whether `read_cache` has these bytes, as far as samples show; False where nobody knows.

        Reads nothing, and changes nothing in the cache.

        Raises:
            ObjectNotFoundError: the object does not exist; not every storage looks.
        """

    def size(self, name: str) -> int:
        """Return the size of an object in bytes, or raise ObjectNotFoundError."""

    def list(self) -> builtins.list[Stat]:
        """Return the objects directly in this place, by name; ``[]`` if the place does not exist."""

    def children(self) -> builtins.list[str]:
        """Return the names of the directories or common prefixes directly below this place, sorted."""

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects; those that are missing are fine. Locally it survives a crash only after :meth:`sync`."""

    def copy_from(self, other: "Storage", names: Sequence[str]) -> None:
        """Make objects of ``other`` appear here under the same names, durably and as cheaply as possible.

        Hard links within one local file system, a server-side copy within one object store, else a plain copy. Both
        names may share one file afterwards: such an object must never be written in place.

        Raises:
            ObjectNotFoundError: ``other`` lacks one of them.
            ObjectExistsError: local storage has one of them already.
        """

    def prepare(self) -> None:
        """Make the place ready for writing, or say why that is impossible.

        A directory is made, its parents too, to last after :meth:`sync`; a file is written in it and removed. Of an
        object store the bucket and the credentials are checked (buckets are never made).
        """

    def remove_place(self) -> None:
        """Remove the place itself if it is empty; otherwise, or if it is missing or a symbolic link, do nothing."""

    def unlink_link(self) -> bool:
        """If the place is a symbolic link, remove the link, never what it points to, and return True."""

    def free_bytes(self) -> int | None:
        """Return how many bytes may be written before the disk is full; None where nobody knows."""

    def sync(self) -> None:
        """Make additions and deletions in this place durable, and the place, whoever made the directories to it.

        Does nothing where all of that is at once.
        """


@runtime_checkable
class Uploads(Protocol):
    """A storage where an object that is being written is an upload of its own: unseen, and paid for until it ends."""

    def uploads(self) -> list[Stat]:
        """Return the unfinished uploads in this place, whoever began them, by name; their sizes are 0."""

    def cancel_uploads(self, names: Sequence[str]) -> None:
        """Cancel the unfinished uploads of objects; those that have ended meanwhile are fine."""


def check_name(name: str) -> str:
    """Return ``name`` if it is one plain path component, else raise :class:`~shardckpt.errors.UsageError`.

    The second wall: whoever takes names from a checkpoint refuses hostile ones before they come here.
    """
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise UsageError(f"{name!r} is not a plain object name: it must be one path component")
    return name


def octets(data: memoryview) -> memoryview:
    """Return ``data`` as a flat view of bytes, without a copy; a view that is not contiguous is a TypeError."""
    return data if data.format == "B" and data.ndim == 1 and data.contiguous else data.cast("B")


class Pieces:
    """Keeps account of the pieces of one object, for its writer.

    It holds the contract of :meth:`ObjectWriter.write`, and lets ``commit`` and ``abort`` wait for writes that are
    under way in other threads: closing a descriptor beneath one could hit a file opened meanwhile.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._state = threading.Condition()
        self._under_way = 0
        self._open = True
        self._spoilt = False
        self._written = 0
        self._end = 0

    @contextmanager
    def writing(self, offset: int, nbytes: int) -> Iterator[None]:
        """Enclose the writing of one piece; if anything is raised inside, the object is spoilt."""
        if offset < 0 or offset % BLOCK or not 0 < nbytes <= BLOCK:
            raise UsageError(
                f"{self._url}: a piece of {nbytes} bytes at {offset} does not fit the grid of {BLOCK}-byte blocks"
            )
        with self._state:
            if not self._open:
                raise StorageError(f"cannot write to {self._url}: it has been committed or aborted already")
            self._under_way += 1
        whole = False
        try:
            yield
            whole = True
        finally:
            with self._state:
                self._under_way -= 1
                self._spoilt |= not whole
                self._written += nbytes
                self._end = max(self._end, offset + nbytes)
                self._state.notify_all()

    def finish(self) -> int:
        """Let no further piece in, wait for those under way, and return the size of the object in bytes.

        Raises:
            StorageError: a piece failed, one before the last never came, or pieces overlapped.
        """
        if not self.close():
            raise StorageError(f"cannot commit {self._url}: it has been committed or aborted already")
        if self._spoilt:
            raise StorageError(f"cannot commit {self._url}: a piece of it could not be written")
        if self._written != self._end:
            raise StorageError(
                f"cannot commit {self._url}: it ends at byte {self._end} but {self._written} bytes were written, so a "
                "piece is missing or came twice"
            )
        return self._end

    def close(self) -> bool:
        """Let no further piece in and wait for those under way; True for the call that closed it."""
        with self._state:
            first, self._open = self._open, False
            while self._under_way:
                self._state.wait()
        return first


def check_held(storage: Storage, name: str, data: bytes) -> None:
    """Raise ObjectExistsError unless the object ``name`` holds exactly ``data``."""
    try:
        held = storage.get(name) == data
    except ObjectNotFoundError:
        held = False
    if not held:
        raise ObjectExistsError(f"cannot replace {join(storage.url, name)}: it is not what it was")


def copy_plain(source: Storage, target: Storage, name: str) -> None:
    """Copy one object through this process, a block at a time."""
    size = source.size(name)
    writer = target.create(name, size)
    try:
        buffer = memoryview(bytearray(min(BLOCK, size)))
        for offset in range(0, size, BLOCK):
            piece = buffer[: min(BLOCK, size - offset)]
            source.read_into(name, offset, piece)
            writer.write(offset, piece)
        writer.commit()
    except BaseException:
        writer.abort()
        raise


def join(path: str | os.PathLike[str], name: str) -> str:
    """Return the path or URL of ``name`` in the place ``path``."""
    text = os.fspath(path)
    return text + name if text.endswith("/") else f"{text}/{name}"


def split(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Split a path or URL into that of its parent and its own name: the reverse of :func:`join`.

    Trailing slashes are ignored. A bare relative name has the parent ``"."``; the root of a file system, and a bucket
    (``s3://bucket``), have no parent and give themselves and ``""``.
    """
    text = os.fspath(path)
    scheme, mark, rest = text.rpartition("://")
    rest = rest.rstrip("/")
    parent, slash, name = rest.rpartition("/")
    if mark and scheme not in ("file", "local", "memory"):
        return (f"{scheme}{mark}{parent}", name) if slash else (f"{scheme}{mark}{rest}", "")
    if not mark and name in (".", ".."):
        return os.path.split(os.path.realpath(rest))
    if not slash:
        return (f"{scheme}{mark}", rest) if mark else (".", rest) if rest else ("/", "")
    return f"{scheme}{mark}{parent or '/'}", name
