"""The limit of the disk itself: the same bytes, in parallel, past the page cache, with nothing else done to them."""

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

BLOCK = 16 << 20
"""Bytes of one request."""
DIGESTED = 1 << 20
"""Bytes that one digest covers."""
HANDLED = 256 << 20
"""Bytes that blocks are copied from or to, in turn: far more than the processor's caches hold."""
HUGE_PAGE = 2 << 20


class RawDisk:
    """Writes and reads files of one rank with ``O_DIRECT`` from memory that is aligned and warm.

    With ``handled``, each block is copied from or to other memory and digested as well, in pieces that the processor's
    cache holds: what a library cannot leave out that verifies tensors it does not own, by a loop that does only that.
    """

    def __init__(self, threads: int, *, handled: bool = False) -> None:
        self._buffers = [huge_buffer(BLOCK) for _ in range(threads)]
        self._other = huge_buffer(HANDLED) if handled else None

    def write(self, path: Path, nbytes: int) -> None:
        """A file of ``nbytes``, rounded up to whole pages, durable on return."""
        nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_DIRECT)
        try:
            os.posix_fallocate(file, 0, nbytes)

            def block(view: memoryview, offset: int) -> None:
                for start, piece in self._pieces(view):
                    ctypes.memmove(_address(piece), self._beside(offset + start), len(piece))
                    xxhash.xxh3_64_intdigest(piece)
                done = os.pwrite(file, view, offset)
                assert done == len(view), "the disk took less than it was given"

            self._in_parallel(nbytes, block)
            os.fsync(file)
        finally:
            os.close(file)

    def read(self, path: Path) -> None:
        """The whole file, into buffers that are used again and again."""
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:

            def block(view: memoryview, offset: int) -> None:
                done = os.preadv(file, [view], offset)
                assert done == len(view), "the disk gave less than was asked for"
                for start, piece in self._pieces(view):
                    xxhash.xxh3_64_intdigest(piece)
                    ctypes.memmove(self._beside(offset + start), _address(piece), len(piece))

            self._in_parallel(os.fstat(file).st_size, block)
        finally:
            os.close(file)

    def _pieces(self, view: memoryview) -> Iterator[tuple[int, memoryview]]:
        """What is handled at a time, and where it starts; nothing, unless it is to be."""
        if self._other is not None:
            for start in range(0, len(view), DIGESTED):
                yield start, view[start : start + DIGESTED]

    def _beside(self, offset: int) -> int:
        """The address of the other memory."""
        assert self._other is not None, "there is some where blocks are handled"
        return _address(self._other) + offset % HANDLED

    def _in_parallel(self, nbytes: int, block: Callable[[memoryview, int], None]) -> None:
        failures: list[BaseException] = []
        count = len(self._buffers)

        def work(number: int) -> None:
            view = self._buffers[number]
            try:
                for offset in range(number * BLOCK, nbytes, count * BLOCK):
                    block(view[: min(BLOCK, nbytes - offset)], offset)
            except BaseException as error:  # noqa: BLE001  # carried to the caller's thread
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def huge_buffer(nbytes: int) -> memoryview:
    """Memory on huge pages, each touched: the disk reads into ordinary pages at a third of the speed."""
    mapping = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % HUGE_PAGE
    view = memoryview(mapping)[start : start + nbytes]
    view[:] = os.urandom(nbytes)
    return view


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget the pages of every file below ``folder``, so that the next read is the disk's."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)  # dirty pages are not dropped
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def part_in_cache(folder: Path) -> float:
    """Which part of the bytes of all files below ``folder`` the page cache has, 0 to 1."""
    pages = found = 0
    for path in folder.rglob("*"):
        if path.is_file() and (size := path.stat().st_size):
            with path.open("rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapping:
                count = -(-size // mmap.PAGESIZE)
                present = (ctypes.c_ubyte * count)()
                first = ctypes.c_char.from_buffer(mapping)
                failed = ctypes.CDLL(None).mincore(
                    ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), present
                )
                del first  # a mapping that something points into cannot be closed
            assert not failed, f"the kernel does not say what it has of {path}"
            pages, found = pages + count, found + sum(state & 1 for state in present)
    return found / max(1, pages)


def read_into_cache(folder: Path) -> None:
    """Read every file below ``folder`` once, so that all of it is in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(BLOCK):
                    pass
