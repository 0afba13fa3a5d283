"""The two halves of a save's I/O: staging, for which the caller waits, and writing, for which nobody does."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final

from shardckpt import filenames
from shardckpt.background import PendingSave
from shardckpt.garbage import held_off
from shardckpt.launch import cores_per_rank
from shardckpt.saving.jobs import Order, SaveJob
from shardckpt.saving.overlap import Overlap, begin_overlap
from shardckpt.saving.verdict import told
from shardckpt.staging import Block, Early, Source, StagingPool, blocks_for, stage
from shardckpt.state import Flattened, Stepped
from shardckpt.storage import BLOCK
from shardckpt.writer import ShardWriter

COPIERS: Final = 4
"""Threads that copy for one rank at most; more than a few don't make memory faster."""
_COLD: Final = 8
"""A pool that lacks more than one part in so many, and more than one block, has yet to be warmed."""


def write(
    order: Order,
    flat: Flattened,
    codec: tuple[str, int] | None,
    *,
    pool: StagingPool,
    memory: int | None,
    stepped: Stepped | None,
    submit: Callable[[SaveJob], None],
) -> None:
    """Stage this rank's part, and have ``submit`` run the job that writes it; return once the state may change.

    ``memory`` is how many bytes of ``pool`` may be held, None for no limit. Where that, and what the pool has touched
    before, hold the whole part, writing begins when staging is done: beside it, it would take memory bandwidth, cores
    and the interpreter from the copies that the caller waits for (measured, 1 GiB on each of 2 ranks and cores: 0.38 s,
    and 0.15 s without). Elsewhere staging goes on with the blocks that have been written: waiting for them costs less
    than memory that is touched for the first time (the same, first save: 0.6 s, and up to 2.9 s without), and what the
    next save needs is touched in the background.

    What is ``stepped`` is staged beside training, unless that is None or gains too little: then the call returns before
    the state may change in any other way than by a step.

    Failures become the job's, and so the verdict of all ranks; only what is no Exception is raised.
    """
    save_id, rank = order.pending.save_id, order.operation.rank
    try:
        with held_off():
            entries = order.structure.entries
            found = entries.sources(flat)
            writer = ShardWriter(
                order.storage,
                filenames.shard_name(rank, save_id),
                save_id,
                rank,
                found,
                pool=pool,
                codec=codec,
                listed=entries.listed(found) if codec is None else None,
            )
        job = SaveJob(order, writer)
        staging = _Staging(writer, found, pool, memory, order.operation.world_size)
    except BaseException as error:
        # The others are under way: this rank has to join them and say so.
        job = SaveJob(order, told(error))
        submit(job)
        order.pending.mark_staged()
        if not isinstance(error, Exception):
            raise
        return
    overlap = None
    try:
        with _telling(writer):
            if staging.needs_blocks_back:
                submit(job)
            overlap = staging.begin(stepped, order.pending)
    finally:
        if not staging.needs_blocks_back:
            submit(job)
        if overlap is None:
            order.pending.mark_staged()
    if overlap is None:
        staging.warm()


def bytes_to_hold(nbytes: int, memory: int | None) -> int:
    """Bytes of whole blocks that staging ``nbytes`` takes, where ``memory`` bytes may be held; None for any number."""
    needed = blocks_for(nbytes)
    return BLOCK * (needed if memory is None else min(needed, max(1, memory // BLOCK)))


class _Staging:
    """One rank's part on its way from its tensors into the writer."""

    def __init__(
        self, writer: ShardWriter, sources: Sequence[Source], pool: StagingPool, memory: int | None, world_size: int
    ) -> None:
        self._writer = writer
        self._sources = sources
        self._pool = pool
        self._memory = memory
        self._threads = min(COPIERS, cores_per_rank(world_size))
        nbytes = writer.first_block_offset + sum(source.nbytes for source in sources)
        needed = bytes_to_hold(nbytes, None)
        self._held = bytes_to_hold(nbytes, memory)
        lacking = needed - pool.nbytes
        self.needs_blocks_back = self._held < needed or lacking > max(needed // _COLD, BLOCK)
        """Whether writing has to go on beside staging, so that blocks come back; see `write`."""

    def begin(self, stepped: Stepped | None, pending: PendingSave) -> Overlap | None:
        """Stage all now, or what cannot wait; the result is what stages the rest, in a thread, and None for nothing."""
        overlap = None
        if stepped is not None:
            overlap = begin_overlap(
                self._sources,
                stepped,
                self._pool,
                self._memory,
                first_block_offset=self._writer.first_block_offset,
                threads=self._threads,
            )
        if overlap is None:
            self._copy(self._sources, self._writer.emit)
            self._writer.finish()
        else:
            overlap.start(partial(self._finish, overlap), pending)
        return overlap

    def warm(self) -> None:
        """Touch in the background what the next save will need."""
        if self._pool.nbytes < self._held:
            self._pool.warm(self._held)

    def _finish(self, overlap: Overlap) -> None:
        with _telling(self._writer):
            with ExitStack() as stack:
                emit: Callable[[Block], None] = self._writer.emit
                if not self.needs_blocks_back:
                    emit = stack.enter_context(_held_back(emit))
                self._copy(overlap.sources, emit, overlap.early)
                overlap.check()
            self._writer.finish()
        self.warm()

    def _copy(self, sources: Sequence[Source], emit: Callable[[Block], None], early: Early | None = None) -> None:
        stage(
            sources,
            self._pool,
            limit=self._memory,
            first_block_offset=self._writer.first_block_offset,
            emit=emit,
            threads=self._threads,
            early=early,
        )


@contextmanager
def _telling(writer: ShardWriter) -> Iterator[None]:
    """Errors in here are the background's to tell, to this rank too: all ranks get one verdict."""
    try:
        yield
    except BaseException as error:
        writer.cancel(told(error))
        if not isinstance(error, Exception):
            raise


@contextmanager
def _held_back(emit: Callable[[Block], None]) -> Iterator[Callable[[Block], None]]:
    """An ``emit`` that hands its blocks on at the end, unless there is an error."""
    blocks: deque[Block] = deque()
    try:
        yield blocks.append
        while blocks:
            emit(blocks.popleft())
    finally:
        for block in blocks:
            block.release()
