"""The two halves of a save's I/O: staging, for which the caller waits, and writing, for which nobody does."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final

from shardckpt import filenames
from shardckpt.errors import SaveFailedError
from shardckpt.garbage import held_off
from shardckpt.launch import cores_per_rank
from shardckpt.saving.jobs import Order, SaveJob
from shardckpt.saving.overlap import Overlap, begin_overlap
from shardckpt.staging import Block, Source, StagingPool, blocks_for, stage
from shardckpt.state import Flattened, Stepped
from shardckpt.storage import BLOCK
from shardckpt.writer import ShardWriter

COPIERS: Final = 4
"""Threads that copy for one rank at most; more than a few don't make memory faster."""
_COLD: Final = 8
"""A pool that lacks more than one part in so many has yet to be warmed."""


def write(
    order: Order,
    flat: Flattened,
    codec: tuple[str, int] | None,
    *,
    pool: StagingPool,
    memory: int | None,
    stepped: Stepped | None,
    submit: Callable[[SaveJob], None],
) -> SaveJob:
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
    except BaseException as error:
        # The others are under way: this rank has to join them and say so.
        job = SaveJob(order, _told(error))
        submit(job)
        order.pending.mark_staged()
        if not isinstance(error, Exception):
            raise
        return job
    job = SaveJob(order, writer)
    needed = BLOCK * blocks_for(writer.first_block_offset + sum(source.nbytes for source in found))
    at_most = needed if memory is None else min(needed, memory)
    beside = needed > at_most or needed - needed // _COLD > pool.nbytes
    threads = min(COPIERS, cores_per_rank(order.operation.world_size))

    def copy(found: Sequence[Source], limit: int | None, emit: Callable[[Block], None]) -> None:
        stage(found, pool, limit=limit, first_block_offset=writer.first_block_offset, emit=emit, threads=threads)

    def copy_beside(overlap: Overlap) -> None:
        with _telling(writer):
            with ExitStack() as stack:
                # What was copied at the call counts too: what is held back must find room beside it.
                fits = overlap.limit is None or overlap.limit >= needed
                emit = stack.enter_context(_held_back(writer.emit)) if fits and not beside else writer.emit
                copy(overlap.sources, overlap.limit, emit)
                overlap.check()
            writer.finish()
        warm()

    def warm() -> None:
        if pool.nbytes < at_most:
            pool.warm(at_most)

    overlap = None
    if beside:
        submit(job)
    try:
        with _telling(writer):
            if stepped is not None:
                overlap = begin_overlap(found, stepped, pool, memory, threads)
            if overlap is None:
                copy(found, memory, writer.emit)
                writer.finish()
            else:
                overlap.start(partial(copy_beside, overlap), order.pending)
    finally:
        if not beside:
            submit(job)
        if overlap is None:
            order.pending.mark_staged()
    if overlap is None:
        warm()
    return job


@contextmanager
def _telling(writer: ShardWriter) -> Iterator[None]:
    """Errors in here are the background's to tell, to this rank too: all ranks get one verdict."""
    try:
        yield
    except BaseException as error:
        writer.cancel(_told(error))
        if not isinstance(error, Exception):
            raise


def _told(error: BaseException) -> Exception:
    """What other ranks hear of an error: an interruption is one for this process alone."""
    return error if isinstance(error, Exception) else SaveFailedError(f"it was interrupted by {type(error).__name__}")


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
