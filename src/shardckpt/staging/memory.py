"""Host memory for staging and for reading: aligned blocks on huge pages, allocated once and reused for ever.

Touching a page for the first time costs more than filling it (tried: 1 GiB of fresh memory took 1.4 s to touch on a
VM, copying into it afterwards 0.06 s), and direct I/O needs alignment. So a `StagingPool` maps big arenas, cuts them
into blocks that start on a huge page, touches each before it is first handed out, and never gives memory back until
it is closed. A `Budget` is what one save or one load may hold of it at a time.
"""

import ctypes
import mmap
import os
import threading
import weakref
from contextlib import suppress
from typing import Any, Final, cast

import torch

from shardckpt.errors import UsageError
from shardckpt.storage import BLOCK

HUGE_PAGE: Final = 2 << 20
"""Bytes of a huge page on x86-64 and on arm64 with 4 KiB base pages."""
ARENA_BLOCKS: Final = 16
"""Blocks mapped at a time. A process may have 65,530 mappings; one for each block would come near that at 256 GiB."""

_HUGE_PAGES: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)
_NOT_IN_CHILDREN: Final[int | None] = getattr(mmap, "MADV_DONTFORK", None)
_CUDA_HOST_REGISTER_PORTABLE: Final = 1
_CLOSED: Final = "The Checkpointer that opened this has been closed since; open the checkpoint again."

_mappings: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()
_inherited: list[mmap.mmap] = []


def _keep_inherited_mappings() -> None:
    """In a forked child the arenas don't exist, but freeing their objects would still unmap those addresses."""
    _inherited.extend(_mappings)


os.register_at_fork(after_in_child=_keep_inherited_mappings)

_HELD: Final = 32 << 10
"""Bytes below which a copy keeps the GIL."""
_memmove_held = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(cast(Any, ctypes.memmove), ctypes.c_void_p).value or 0
)


def copy_memory(to: int, source: int, nbytes: int) -> None:
    """Copy bytes between addresses, by this thread alone.

    Not ``Tensor.copy_``: that shares the work with OpenMP threads and waits for the last of them, which takes long
    where the cores are busy with training or writing (tried, 1 GiB on 2 such cores: 0.94 s, against 0.20 s here).
    """
    # Waiting until a busy thread gives the GIL back is worth it only for more than a few microseconds.
    if nbytes < _HELD:
        _memmove_held(to, source, nbytes)
    else:
        ctypes.memmove(to, source, nbytes)


def blocks_for(nbytes: int) -> int:
    """How many blocks hold so many bytes."""
    return -(-nbytes // BLOCK)


class Block:
    """`BLOCK` bytes of pool memory that start on a huge page."""

    __slots__ = ("address", "budget", "filled", "memory", "number", "pinned", "tensor")

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        """The bytes, writable."""
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        """The same bytes as a uint8 tensor of shape (BLOCK,)."""
        self.address = self.tensor.data_ptr()
        self.filled = 0
        """Where the valid bytes end; the user of the block sets it."""
        self.number = 0
        """Which of its user's blocks it is; the user sets it."""
        self.pinned = False
        self.budget: Budget | None = None

    def release(self) -> None:
        """Give the block back to the budget it came from. Its memory may have a new owner before this returns."""
        budget, self.budget = self.budget, None
        assert budget is not None, "a block is released once"
        budget.release(self)


class StagingPool:
    """Blocks for whoever stages or reads, from any thread. Never waits: waiting for memory is `Budget`'s job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Block] = []
        self._untouched: list[Block] = []
        self._touched = 0
        self._pinning = self._refused = False
        self._pinned: list[int] = []
        self._pid = os.getpid()
        self._unpin = weakref.finalize(self, _unregister, self._pinned, self._pid)
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the pool occupies, in use or free."""
        return self._touched * BLOCK

    def take(self) -> Block:
        """A block that nobody else holds, with whatever bytes its last user left in it.

        Raises UsageError in a forked child, where the memory isn't, and after `close`.
        """
        self._check_usable()
        with self._lock:
            block = self._free.pop() if self._free else None
        if block is None:
            block = self._touch_another()
        if block is None:  # closed meanwhile
            raise UsageError(_CLOSED)
        try:
            self._pin(block)
        except BaseException:
            self.give(block)
            raise
        return block

    def give(self, block: Block) -> None:
        """Take back a block from `take`."""
        with self._lock:
            if not self._closed:
                self._free.append(block)

    def reserve(self, nbytes: int) -> None:
        """Grow to at least `nbytes` and touch every page, so that no save pays for it: a GiB may take a second.

        It ends early when the pool is closed, or the main thread has ended and others only wait for this one.
        """
        while self.reserve_another(nbytes):
            pass

    def reserve_another(self, nbytes: int) -> bool:
        """One block more towards `nbytes`; whether there is more to do."""
        block = self._touch_another(blocks_for(nbytes)) if threading.main_thread().is_alive() else None
        if block is None:
            return False
        try:
            self._pin(block)
        finally:
            self.give(block)
        return True

    def warm(self, nbytes: int) -> None:
        """`reserve` in the background. Where memory or a thread can't be had, whoever comes to need it is told.

        It ends early, too, once nobody else has the pool.
        """
        found = weakref.ref(self)

        def run() -> None:
            with suppress(OSError):
                while (pool := found()) is not None and pool.reserve_another(nbytes):
                    del pool

        # No daemon: torch, in which it is nearly always, aborts the process that ends under it.
        with suppress(RuntimeError):
            threading.Thread(target=run, name="shardckpt-warm").start()

    def pin(self) -> None:
        """From now on hand out only blocks that CUDA devices copy to and from without a detour, where there is CUDA.

        Registering memory with the driver takes as long as touching it, so do this before `reserve` and `warm`.
        """
        self._pinning = torch.cuda.is_available() and not self._refused

    def close(self) -> None:
        """Let go of the memory. Blocks still out stay valid until their holders drop them. May be called twice.

        A forked child has none of it, and in it a thread that is not there may hold the lock.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            self._free.clear()
            self._untouched.clear()
            self._touched = 0
        self._unpin()

    def _check_usable(self) -> None:
        if self._closed:
            raise UsageError(_CLOSED)
        if os.getpid() != self._pid:
            raise UsageError(
                f"Process {os.getpid()} was forked from process {self._pid} and uses its Checkpointer, whose memory it "
                "doesn't have. Make a Checkpointer in the child."
            )

    def _touch_another(self, most: int | None = None) -> Block | None:
        """A block of memory that the pool didn't occupy before, with its pages present.

        None where the pool occupies `most` blocks, or is closed.
        """
        with self._lock:
            if self._closed or (most is not None and self._touched >= most):
                return None
            if not self._untouched:
                self._untouched = _map_arena()
            block = self._untouched.pop()
            self._touched += 1
        # One byte a page is enough for the kernel to supply it; unlike madvise, a torch operation releases the GIL.
        block.tensor[:: mmap.PAGESIZE].zero_()
        return block

    def _pin(self, block: Block) -> None:
        if not self._pinning or block.pinned:
            return
        if int(_cudart().cudaHostRegister(block.address, BLOCK, _CUDA_HOST_REGISTER_PORTABLE)):
            # No right to lock so much memory, say. It costs only speed: copies then go through the driver's own.
            self._refused, self._pinning = True, False
            _clear_cuda_error()
            return
        block.pinned = True
        with self._lock:
            if not self._closed:
                self._pinned.append(block.address)
                return
        _unregister([block.address], self._pid)


def _unregister(addresses: list[int], pid: int) -> None:
    """Undo what `StagingPool._pin` told the CUDA driver, before the memory goes; in a child there is no such driver."""
    while addresses and os.getpid() == pid:
        _cudart().cudaHostUnregister(addresses.pop())


def _clear_cuda_error() -> None:
    """Forget what the CUDA runtime remembers of the call that failed: torch takes it for the fault of its next kernel.

    It exposes no cudaGetLastError, so that kernel is one of ours.
    """
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _cudart() -> Any:
    """CUDA's runtime library, as far as torch exposes it; torch doesn't annotate it."""
    return torch.cuda.cudart()


def _map_arena() -> list[Block]:
    """`ARENA_BLOCKS` new blocks, none of whose pages exist yet."""
    nbytes = ARENA_BLOCKS * BLOCK
    # Private: shared anonymous memory is a tmpfs file, which has huge pages only where an administrator allowed them.
    mapping = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (_HUGE_PAGES, _NOT_IN_CHILDREN):
        if advice is not None:
            # A kernel built without the feature says EINVAL; it's advice, so go on without.
            with suppress(OSError):
                mapping.madvise(advice)
    _mappings.add(mapping)
    whole = memoryview(mapping)
    start = -torch.frombuffer(whole, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    # Popped from the end, so that blocks are handed out in the order of their addresses.
    return [Block(whole[at : at + BLOCK]) for at in range(start + nbytes - BLOCK, start - 1, -BLOCK)]


class Budget:
    """The share of a pool that one save or load may hold at a time.

    `limit` is in bytes, None for no limit. One block is always allowed, however small the limit, so that progress never
    depends on it; whoever waits is woken by the `release` of a block from the same budget.
    """

    def __init__(self, pool: StagingPool, limit: int | None) -> None:
        self._pool = pool
        self._blocks = None if limit is None else max(1, limit // BLOCK)
        self._held = 0
        self._given_up: BaseException | None = None
        self._changed = threading.Condition()

    def acquire(self) -> Block:
        """A block, after waiting for one to come back where the limit is reached."""
        with self._changed:
            while self._blocks is not None and self._held >= self._blocks:
                if self._given_up is not None:
                    raise self._given_up
                self._changed.wait()
            self._held += 1
        return self._take()

    def try_acquire(self) -> Block | None:
        """A block, or None where the limit is reached."""
        with self._changed:
            if self._blocks is not None and self._held >= self._blocks:
                return None
            self._held += 1
        return self._take()

    def give_up(self, error: BaseException) -> None:
        """Raise ``error`` for whoever waits for a block: those that are out may never come back."""
        with self._changed:
            self._given_up = error
            self._changed.notify_all()

    def release(self, block: Block) -> None:
        """Take a block back; see `Block.release`."""
        self._pool.give(block)
        self._let_another()

    def _take(self) -> Block:
        try:
            block = self._pool.take()
        except BaseException:
            self._let_another()
            raise
        block.budget = self
        block.filled = 0
        return block

    def _let_another(self) -> None:
        with self._changed:
            self._held -= 1
            self._changed.notify()
