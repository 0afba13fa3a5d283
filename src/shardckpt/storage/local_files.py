"""One file on a local disk: written in pieces, or read.

Every call about a file is in the list of those that are under way, since a network file system may never answer.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from shardckpt.errors import CorruptCheckpointError, StorageError
from shardckpt.storage import posix
from shardckpt.storage.base import Pieces, octets
from shardckpt.storage.translate import translating
from shardckpt.workers import under_way


@contextmanager
def calling(doing: str, path: str) -> Iterator[None]:
    """Enclose calls about one file: their errors become ours, and whoever waits in vain can say what they are."""
    with under_way.call(doing, path, StorageError), translating(doing, path):
        yield


class LocalWriter:
    """One file being written, under its final name. The :class:`~shardckpt.storage.ObjectWriter` contract applies."""

    def __init__(self, path: str, size_hint: int) -> None:
        self._path = path
        self._pieces = Pieces(path)
        self._committed = False
        with calling("create", path):
            self._buffered = posix.open_new(path)
        self._direct = posix.open_direct(path)
        try:
            with calling(f"reserve {size_hint} bytes for", path):
                posix.preallocate(self._buffered, size_hint)
        except BaseException:
            self.abort()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        data = octets(data)
        with self._pieces.writing(offset, len(data)), calling("write", self._path):
            done = 0
            if self._direct is not None and posix.is_aligned(data):
                done = posix.write_direct(self._direct, data, offset)
            # What direct I/O left over begins on a page of its own: the two ways never touch the same page.
            posix.write_fully(self._buffered, data[done:], offset + done)

    def commit(self) -> None:
        size = self._pieces.finish()
        with calling("commit", self._path):
            os.ftruncate(self._buffered, size)
            with under_way.call("sync", self._path, StorageError):
                posix.sync_file(self._buffered)
            self._close()
            with under_way.call("sync", os.path.dirname(self._path), StorageError):
                posix.sync_directory(os.path.dirname(self._path))
        self._committed = True

    def abort(self) -> None:
        if self._committed:
            return
        self._pieces.close()
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            os.unlink(self._path)

    def _close(self) -> None:
        buffered, self._buffered = self._buffered, -1
        direct, self._direct = self._direct, None
        try:
            if direct is not None:
                os.close(direct)
        finally:
            if buffered >= 0:
                os.close(buffered)


@contextmanager
def opened(path: str) -> Iterator[tuple[int, int]]:
    """Open a file of a checkpoint for reading; yield its descriptor and its size in bytes.

    A checkpoint may come from anywhere, so a symbolic link (which may lead out of it), a pipe (on which one would wait
    for ever) or a device is refused.
    """
    try:
        # Without O_NONBLOCK opening a pipe waits for its other end; on a regular file the flag has no effect.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptCheckpointError(
                f"{path} is a symbolic link, and those are not followed inside a checkpoint: put the file itself there"
            ) from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptCheckpointError(f"{path} is not a regular file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def fill(path: str, descriptor: int, offset: int, into: memoryview) -> None:
    """Fill ``into`` from byte ``offset`` on; every read of a local file ends here, that of its last bytes at least."""
    wanted = len(into)
    while into:
        got = os.preadv(descriptor, [into], offset)
        if not got:
            raise CorruptCheckpointError(
                f"{path} is too short: it ends at byte {offset}, {len(into)} of the {wanted} bytes wanted are missing"
            )
        offset += got
        into = into[got:]
