"""System calls for durable and fast local files, each with what differs between platforms and file systems.

The functions raise plain :class:`OSError`; :mod:`shardckpt.storage.local` says what was being done to which file.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

PAGE = 4096
"""Bytes to which address, offset and length of direct I/O are aligned."""

_SAMPLES = 8
"""Pages by which a stretch of a file is judged to be in the page cache."""
_MAP_FAILED = ctypes.c_void_p(-1).value
_CAP_FOWNER = 3
_ALL_USERS = ["0", "0", str(2**32 - 1)]
"""The map of user ids outside of any user namespace."""

# What a file system answers when it cannot reserve space or bypass the page cache, rather than failing at it.
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.ENODEV}


@cache
def host() -> str:
    """Names the running kernel, and with it the page cache; containers of one host have the same."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:  # not Linux
        return platform.node()


def open_new(path: str) -> int:
    """Create a file for writing, with the permissions that the umask leaves; FileExistsError if the name is taken."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold a file against other processes of this host that lock it too, where it is there and can be locked.

    What counts is the file that bears the name when it is locked, and not which one does afterwards.
    """
    descriptor: int | None = None
    try:
        with suppress(OSError):
            # For writing: a network file system gives no other an exclusive lock.
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def open_direct(path: str) -> int | None:
    """Open an existing file for writing past the page cache, or return None where that is not to be had."""
    direct: int | None = getattr(os, "O_DIRECT", None)
    if direct is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | direct | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        # Direct I/O is only faster: whatever stands against it, the buffered descriptor remains.
        return None


def is_aligned(data: memoryview) -> bool:
    """Tell whether direct I/O may begin at the address of ``data``, and has at least one page to write."""
    if data.readonly or len(data) < PAGE:
        # ctypes gives the address of writable memory only; staging memory is that.
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) % PAGE == 0


def write_direct(descriptor: int, data: memoryview, offset: int) -> int:
    """Write the whole pages of ``data`` past the cache and return how many bytes went; the rest is for the caller.

    Less than the whole pages go where the file system turns out to want a coarser alignment.
    """
    end = len(data) // PAGE * PAGE
    done = 0
    while done < end:
        try:
            done += os.pwrite(descriptor, data[done:end], offset + done)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            break
        if done % PAGE:
            # The next direct write would be misaligned; finish with whole pages through the cache.
            return done // PAGE * PAGE
    return done


def read_direct(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill whole pages of ``into`` past the page cache and return how many bytes came; the rest is for the caller.

    Less than the whole pages come where the file ends before, and none where memory or ``offset`` is not aligned or the
    file system will not do it. The descriptor reads through the cache again afterwards.
    """
    end = len(into) // PAGE * PAGE
    done = 0
    if offset % PAGE or not is_aligned(into) or not _set_direct(descriptor, on=True):
        return 0
    try:
        # A read that ends within a page is the file's last, and the next would be misaligned.
        while done < end and done % PAGE == 0:
            got = os.preadv(descriptor, [into[done:end]], offset + done)
            if not got:
                break
            done += got
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        _set_direct(descriptor, on=False)
    return done


def _set_direct(descriptor: int, *, on: bool) -> bool:
    """Have an open file bypass the page cache, or not; False where it can't."""
    direct: int | None = getattr(os, "O_DIRECT", None)
    if direct is None:
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct if on else flags & ~direct)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def is_resident(descriptor: int, offset: int, nbytes: int) -> bool:
    """Tell whether the page cache has bytes of a file, judged by a few of its pages; False where it will not be told.

    Not by reading with ``RWF_NOWAIT``: where the data is not there, that has the kernel fetch it (tried: 2 MiB for a
    request of one).
    """
    calls = _residency()
    if calls is None or not _is_told(descriptor):
        return False
    start = offset // PAGE * PAGE
    nbytes += offset - start
    address = calls.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    if address in (None, _MAP_FAILED):
        return False
    try:
        pages = -(-nbytes // PAGE)
        found = ctypes.c_ubyte()
        for sample in range(_SAMPLES):
            page = sample * (pages - 1) // (_SAMPLES - 1)
            if calls.mincore(address + page * PAGE, PAGE, ctypes.byref(found)) or not found.value & 1:
                return False
        return True
    finally:
        calls.munmap(address, nbytes)


def _is_told(descriptor: int) -> bool:
    """Whether the kernel tells this process what the page cache has of a file; of others it says that all is there.

    Since Linux 5.2 it tells the owner, who may act as one, and who may write to the file. In a container with users of
    its own, all others' files seem to be one user's, as whom nobody in there may act.
    """
    uid = os.fstat(descriptor).st_uid
    owner = uid != _nobody() and (uid == os.geteuid() or _acts_as_owner())
    return owner or os.access(f"/proc/self/fd/{descriptor}", os.W_OK, effective_ids=True)


@cache
def _nobody() -> int | None:
    """The user that files seem to belong to whose owner has no name here; None where every user has one."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as names:
            if names.read().split() == _ALL_USERS:
                return None
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):  # not Linux, or a kernel without user namespaces
        return None


@cache
def _acts_as_owner() -> bool:
    """Whether this process counts as the owner of any file: root mostly does, but not in every container."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            effective = next((line.split()[1] for line in file if line.startswith("CapEff:")), "0")
        return bool(int(effective, 16) >> _CAP_FOWNER & 1)
    except (OSError, ValueError, IndexError):  # a sandbox may show what it likes
        return False


@cache
def _residency() -> Any:
    """The C library with the calls that `is_resident` makes, or None where they would not mean the same."""
    if sys.platform != "linux" or mmap.PAGESIZE != PAGE:
        return None
    library = ctypes.CDLL(None)
    library.mmap.restype = ctypes.c_void_p
    whole, integer = ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes = (ctypes.c_void_p, whole, integer, integer, integer, ctypes.c_long)
    library.munmap.argtypes = (ctypes.c_void_p, whole)
    library.mincore.argtypes = (ctypes.c_void_p, whole, ctypes.c_void_p)
    return library


def write_fully(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``: one call may write less than it was given."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data = data[written:]
        offset += written


def preallocate(descriptor: int, nbytes: int) -> None:
    """Reserve space, so that a full disk is found before the data is written, and parallel writes do not extend it.

    Where the file system cannot, nothing happens. ``os.posix_fallocate`` is not used, since glibc makes up for such
    file systems by writing to every block: minutes, for a large file over a network.
    """
    fallocate = _fallocate()
    if fallocate is None or nbytes <= 0:
        return
    while fallocate(descriptor, 0, 0, nbytes) != 0:
        number = ctypes.get_errno()
        if number in _UNSUPPORTED:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


@cache
def _fallocate() -> Any:
    """The fallocate(2) of Linux with 64-bit offsets, or None elsewhere."""
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        function.restype = ctypes.c_int
    return function


def sync_file(descriptor: int) -> None:
    """Force a file to the medium."""
    full: int | None = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        # macOS: fsync stops at the drive's own cache.
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.fsync(descriptor)


def sync_directory(directory: str) -> None:
    """Force the names in a directory to the medium, where its file system has a notion of that."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        # A directory may be open for writing and not for reading; then there is no descriptor to sync.
        os.sync()
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some FUSE and network file systems sync names on their own and refuse to be asked.
        if error.errno not in _UNSUPPORTED and error.errno != errno.EBADF:
            raise
    finally:
        os.close(descriptor)


def is_directory(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is a directory, or a link that leads to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False
