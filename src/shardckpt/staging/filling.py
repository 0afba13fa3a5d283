"""The blocks of a stream as they fill, whatever memory the bytes come from."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Final

import torch

from shardckpt.box import boxes_of_range, slices
from shardckpt.errors import UsageError
from shardckpt.staging.memory import Block, Budget, copy_memory
from shardckpt.storage import BLOCK
from shardckpt.workers import Workers

SMALL: Final = 256 << 10
"""Bytes below which contiguous tensors of a device are copied together: calls would cost more than the copies."""

PARALLEL: Final = 1 << 20
"""Bytes from which a copy between memories of the host is given to a thread, where there are several."""

_FLOAT4: Final[torch.dtype | None] = getattr(torch, "float4_e2m1fn_x2", None)


def copyable(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements in a dtype of the same size that torch can copy between memory layouts.

    Tried with torch 2.13: ``copy_`` isn't implemented for float4, and is for every other dtype that we store.
    """
    return tensor.view(torch.uint8) if tensor.dtype is _FLOAT4 else tensor


class Filler:
    """The block being filled, and those that wait for their copies.

    Copies from CUDA devices are queued, not waited for, so a full block is emitted one block later: when the copies of
    the next are queued behind its own and the device has something to do meanwhile. In the same way threads have the
    copies of `ahead` blocks before them.
    """

    def __init__(
        self,
        budget: Budget,
        first_block_offset: int,
        emit: Callable[[Block], None],
        streams: Sequence[Any],
        workers: Workers | None = None,
        *,
        ahead: int = 0,
        ready: dict[int, Block] | None = None,
    ) -> None:
        """`ready` has blocks in which something is in place, by their numbers."""
        self._budget = budget
        self._emit = emit
        self._streams = streams
        self._workers = workers
        self._ahead = ahead if workers is not None else 1 if streams else 0
        self._ready = {} if ready is None else ready
        self._block: Block | None = None
        self._number = 0
        """Of the block being filled."""
        self._copies: list[threading.Event] = []
        self._at = first_block_offset
        self._pending: deque[tuple[Block, list[Callable[[], object]]]] = deque()
        self._small: list[torch.Tensor] = []
        self._small_nbytes = 0

    def add(self, tensor: torch.Tensor, nbytes: int) -> None:
        """Append all elements of `tensor`, which are `nbytes` bytes, to the stream."""
        if tensor.nbytes != nbytes:
            raise UsageError(f"a tensor of {tensor.nbytes} bytes was announced with {nbytes}")
        if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            self._add_contiguous(tensor, nbytes)
        elif (self._at + self._small_nbytes) % tensor.element_size():
            self._add_contiguous(tensor.contiguous().resolve_conj().resolve_neg(), nbytes)
        else:
            self._add_elements(tensor)

    def skip(self, nbytes: int) -> None:
        """Leave `nbytes` of the stream as they are: they are in a block that is ready, or somebody adds them later."""
        self._gather()
        while nbytes:
            if self._block is None:
                self._block = self._ready.pop(self._number, None)
            size = min(nbytes, BLOCK - self._at)
            nbytes -= size
            self._advance(size)

    def finish(self) -> None:
        """Emit what is left, complete or not."""
        self._gather()
        if self._block is not None:
            self._complete()
        self._emit_pending(0)

    def abandon(self) -> None:
        """Release what has not been emitted, once no device and no thread writes to it any more."""
        for stream in self._streams:
            stream.synchronize()
        for copied in (*chain.from_iterable(waits for _, waits in self._pending), *self._waits()):
            copied()
        for block, _ in self._pending:
            block.release()
        self._pending.clear()
        if self._block is not None:
            self._block.release()
            self._block = None

    def _add_contiguous(self, tensor: torch.Tensor, nbytes: int) -> None:
        if tensor.is_cpu:
            self._add_memory(tensor, nbytes)
        else:
            self._add_device_memory(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8), nbytes)

    def _add_memory(self, tensor: torch.Tensor, nbytes: int) -> None:
        address = tensor.data_ptr()
        if not address:
            raise UsageError("a tensor without memory of its own can't be staged")
        self._gather()
        while nbytes:
            block = self._current()
            size = min(nbytes, BLOCK - self._at)
            self._copy(block.address + self._at, address, size, tensor)
            address += size
            nbytes -= size
            self._advance(size)

    def _copy(self, to: int, source: int, nbytes: int, owner: torch.Tensor) -> None:
        if self._workers is None or nbytes < PARALLEL:
            copy_memory(to, source, nbytes)
            return
        copied = threading.Event()

        # The job keeps the owner of the memory: it may be a copy of which nobody else knows.
        def job(_: torch.Tensor = owner) -> None:
            try:
                copy_memory(to, source, nbytes)
            finally:
                copied.set()

        self._copies.append(copied)
        self._workers.submit(job)

    def _add_device_memory(self, octets: torch.Tensor, nbytes: int) -> None:
        if nbytes < SMALL and self._at + self._small_nbytes + nbytes <= BLOCK:
            if self._small and octets.device != self._small[0].device:
                self._gather()
            self._small.append(octets)
            self._small_nbytes += nbytes
            return
        self._gather()
        done = 0
        while done < nbytes:
            block, at = self._current(), self._at
            size = min(nbytes - done, BLOCK - at)
            block.tensor[at : at + size].copy_(octets[done : done + size], non_blocking=octets.is_cuda)
            done += size
            self._advance(size)

    def _add_elements(self, tensor: torch.Tensor) -> None:
        """Append a tensor whose memory isn't in the order or of the form that is stored: convert while copying."""
        self._gather()
        tensor = copyable(tensor)
        # What is to be conjugated or negated torch copies first, and does that then in the host's memory, at once.
        is_queued = tensor.is_cuda and not tensor.is_conj() and not tensor.is_neg()
        itemsize, count, done = tensor.element_size(), tensor.numel(), 0
        while done < count:
            block, at = self._current(), self._at
            size = min(count - done, (BLOCK - at) // itemsize)
            into = block.tensor[at : at + size * itemsize].view(tensor.dtype)
            start = 0
            for box in boxes_of_range(tensor.shape, done, done + size):
                part = into[start : start + box.volume].view(box.lengths)
                part.copy_(tensor[slices(box)], non_blocking=is_queued)
                start += box.volume
            done += size
            self._advance(size * itemsize)

    def _gather(self) -> None:
        """Copy the small tensors of a device that have been put off; they fit into the block."""
        if self._small:
            gathered = torch.cat(self._small)
            size, self._small_nbytes = self._small_nbytes, 0
            into = self._current().tensor[self._at : self._at + size]
            into.copy_(gathered, non_blocking=gathered.is_cuda)
            self._small.clear()
            self._advance(size)

    def _current(self) -> Block:
        """The block being filled."""
        if self._block is None:
            block = self._ready.pop(self._number, None) or self._budget.try_acquire()
            if block is None:
                # What is pending must go out first: nobody releases a block that was never emitted.
                self._emit_pending(0)
                block = self._budget.acquire()
            block.number = self._number
            self._block = block
        return self._block

    def _advance(self, nbytes: int) -> None:
        self._at += nbytes
        if self._at == BLOCK:
            self._complete()

    def _complete(self) -> None:
        block, self._block = self._block, None
        filled, self._at = self._at, 0
        self._number += 1
        if block is None:  # skipped
            return
        block.filled = filled
        self._pending.append((block, self._waits()))
        self._emit_pending(self._ahead)

    def _waits(self) -> list[Callable[[], object]]:
        """What is to be waited for until all copies into the block are done."""
        copies, self._copies = self._copies, []
        return [*(stream.record_event().synchronize for stream in self._streams), *(copied.wait for copied in copies)]

    def _emit_pending(self, keep: int) -> None:
        while len(self._pending) > keep:
            _, waits = self._pending[0]
            for wait in waits:
                wait()
            block, _ = self._pending.popleft()
            self._emit(block)
