"""The two halves of a save's I/O: staging, for which the caller waits, and writing, for which nobody does."""

from collections.abc import Callable
from typing import Final

from shardckpt import filenames
from shardckpt.errors import SaveFailedError
from shardckpt.launch import cores_per_rank
from shardckpt.saving.jobs import Order, SaveJob
from shardckpt.saving.structure import sources
from shardckpt.staging import StagingPool, blocks_for, stage
from shardckpt.state import Flattened
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
    submit: Callable[[SaveJob], None],
) -> SaveJob:
    """Stage this rank's part, and have ``submit`` run the job that writes it; return once the state may change.

    ``memory`` is how many bytes of ``pool`` may be held, None for no limit. Where that, and what the pool has touched
    before, hold the whole part, writing begins when staging is done: beside it, it would take memory bandwidth, cores
    and the interpreter from the copies that the caller waits for (measured, 1 GiB on each of 2 ranks and cores: 0.38 s,
    and 0.15 s without). Elsewhere staging goes on with the blocks that have been written: waiting for them costs less
    than memory that is touched for the first time (the same, first save: 0.6 s, and up to 2.9 s without), and what the
    next save needs is touched in the background.

    Failures become the job's, and so the verdict of all ranks; only what is no Exception is raised.
    """
    save_id, rank = order.pending.save_id, order.operation.rank
    try:
        found = sources(order.structure.plan, flat)
        writer = ShardWriter(
            order.storage, filenames.shard_name(rank, save_id), save_id, rank, found, pool=pool, codec=codec
        )
    except Exception as error:  # noqa: BLE001 - the others are under way: this rank has to join them and say so
        job = SaveJob(order, error)
        submit(job)
        return job
    job = SaveJob(order, writer)
    needed = BLOCK * blocks_for(writer.first_block_offset + sum(source.nbytes for source in found))
    at_most = needed if memory is None else min(needed, memory)
    beside = needed > at_most or needed - needed // _COLD > pool.nbytes
    if beside:
        submit(job)
    try:
        stage(
            found,
            pool,
            limit=memory,
            first_block_offset=writer.first_block_offset,
            emit=writer.emit,
            threads=min(COPIERS, cores_per_rank(order.operation.world_size)),
        )
    except Exception as error:  # noqa: BLE001 - the background tells all ranks, this one too: one verdict
        writer.cancel(error)
    except BaseException as error:
        writer.cancel(SaveFailedError(f"staging was interrupted by {type(error).__name__}"))
        raise
    else:
        writer.finish()
    finally:
        if not beside:
            submit(job)
    if pool.nbytes < at_most:
        pool.warm(at_most)
    order.pending.mark_staged()
    return job
