"""Copying tensors into staging blocks: the only part of a save that training waits for.

The bytes of all sources, back to back, are one stream, and a block is a window on it. Blocks are emitted as they fill,
so that writing overlaps staging; for an asynchronous save the caller goes on when the last one is filled.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from shardckpt.box import Box
from shardckpt.staging.filling import PARALLEL, Filler
from shardckpt.staging.memory import Block, Budget, StagingPool
from shardckpt.storage import BLOCK
from shardckpt.workers import Workers


class Source(NamedTuple):
    """One entry of this rank's shard and where its elements are now."""

    key: str
    """Its name in the shard's safetensors header."""
    fqn: str
    dtype: str
    box: Box
    """In coordinates of the whole tensor."""
    tensor: torch.Tensor
    """Exactly the elements of the box: shape ``box.lengths``, any strides, any device."""
    nbytes: int


class Early:
    """Blocks of a stream in which some sources are in place before the others; `place_early` makes it."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.blocks: dict[int, Block] = {}
        """By their numbers in the stream."""
        self.placed: set[int] = set()
        """The sources that are, by their numbers."""

    def release(self) -> None:
        """Let go of the blocks that `stage` has not come to."""
        while self.blocks:
            self.blocks.popitem()[1].release()


def blocks_of(sources: Sequence[Source], chosen: set[int], first_block_offset: int) -> int:
    """How many blocks `place_early` takes."""
    touched: set[int] = set()
    at = first_block_offset
    for number, source in enumerate(sources):
        if number in chosen and source.nbytes:
            touched.update(range(at // BLOCK, -(-(at + source.nbytes) // BLOCK)))
        at += source.nbytes
    return len(touched)


def place_early(
    sources: Sequence[Source],
    chosen: set[int],
    pool: StagingPool,
    *,
    limit: int | None,
    first_block_offset: int,
    threads: int = 1,
) -> Early:
    """Copy the `chosen` of `sources`, by their numbers, to where `stage` would: it is to be told, and does the rest.

    They are in the host's memory, and their blocks fit into `limit`, which is that of both; see `stage`.
    """
    early = Early(Budget(pool, limit))

    def keep(block: Block) -> None:
        early.blocks[block.number] = block

    wanted = [sources[number] for number in chosen]
    try:
        with torch.no_grad(), _workers(wanted, threads) as workers:
            filler = Filler(early.budget, first_block_offset, keep, [], workers, ahead=2 * threads)
            try:
                for number, source in enumerate(sources):
                    if number in chosen and source.nbytes:
                        filler.add(source.tensor, source.nbytes)
                    else:
                        filler.skip(source.nbytes)
                filler.finish()
            except BaseException:
                filler.abandon()
                raise
    except BaseException:
        early.release()
        raise
    early.placed = chosen
    return early


def stage(
    sources: Sequence[Source],
    pool: StagingPool,
    *,
    limit: int | None,
    first_block_offset: int,
    emit: Callable[[Block], None],
    threads: int = 1,
    early: Early | None = None,
) -> None:
    """Copy `sources`, in order and without gaps, into blocks of `pool`, and emit each block once it is full.

    At most `limit` bytes of blocks are out at a time (but always one block); beyond that, wait until whoever got them
    from `emit` releases some. The first block's data starts at byte `first_block_offset`, and `Block.filled` says where
    a block's data ends; only the last may end before the block does. Sources without elements leave no trace.

    Large tensors in the host's memory are copied by `threads` threads: one alone reaches half of what two cores copy.
    What is in place `early` is not copied again, and its budget counts in place of `limit`.

    On return every byte has been copied and the tensors may change. `emit` owns a block from its call on. An error of
    `emit` or of a copy is raised; the blocks not emitted by then have been released.
    """
    devices = {source.tensor.device for source in sources if source.tensor.is_cuda}
    if devices:
        pool.pin()
    with torch.no_grad(), ExitStack() as stack:
        streams = [side_stream(device) for device in devices]
        for stream in streams:
            stack.enter_context(torch.cuda.stream(stream))
        workers = stack.enter_context(_workers(sources, threads))
        early = Early(Budget(pool, limit)) if early is None else early
        filler = Filler(early.budget, first_block_offset, emit, streams, workers, ahead=2 * threads, ready=early.blocks)
        try:
            for number, source in enumerate(sources):
                if number in early.placed:
                    filler.skip(source.nbytes)
                elif source.nbytes:
                    filler.add(source.tensor, source.nbytes)
            filler.finish()
        except BaseException:
            filler.abandon()
            early.release()
            raise


@contextmanager
def _workers(sources: Sequence[Source], threads: int) -> Iterator[Workers | None]:
    """Threads that copy, where that is worth while."""
    if threads > 1 and any(source.tensor.is_cpu and source.nbytes > PARALLEL for source in sources):
        with Workers(threads, "stage") as workers:
            yield workers
    else:
        yield None


def side_stream(device: torch.device) -> Any:
    """A stream of our own, ordered after all that this thread has queued on `device`. Not yet run: it needs a GPU."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
