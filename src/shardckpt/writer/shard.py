"""Writing one rank's shard: from the blocks that staging fills to a durable file and the rank's word on it."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue

from shardckpt.codecs import digest, digests_text
from shardckpt.garbage import held_off
from shardckpt.manifest import RankManifest, ShardEntry
from shardckpt.safetensors_format import Listed
from shardckpt.staging import Block, Budget, Source, StagingPool
from shardckpt.storage import Storage
from shardckpt.workers import THREADS
from shardckpt.writer.output import Output
from shardckpt.writer.streams import FrameStream, RawStream, Stored, Stream, listed_of


class ShardWriter:
    """One shard of one save, filled from one thread and written in another.

    The thread that stages calls `emit` for each block and then `finish`, or `cancel`; it must call one of the two. The
    other calls `run`. An error on either side ends the other: `run` raises what `cancel` was told, and once writing has
    failed `emit` raises the error of that, so that staging needs no more memory than it can get.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        save_id: str,
        rank: int,
        sources: Sequence[Source],
        *,
        pool: StagingPool,
        codec: tuple[str, int] | None,
        listed: Listed | None = None,
        threads: int | None = None,
    ) -> None:
        """Prepare to write `sources`, in that order, as the file `name`; nothing is written yet.

        `listed` spares the work of `listed_of`, where the caller has what it says of `sources`.
        `codec` is None, or ``("zstd", level)``. Raises UsageError where the header would be too large for safetensors.
        """
        self._name = name
        self._save_id = save_id
        self._rank = rank
        self._sources = sources
        metadata = {"format": "pt", "shardckpt": f"save {save_id}, rank {rank}"}
        # Compressing keeps the processors busy, and needs memory for each thread; writing mostly waits.
        threads = threads or (THREADS if codec else storage.width)
        self._out = Output(storage, name, threads=threads)
        self._stream: Stream
        if codec is None:
            listed = listed_of(sources) if listed is None else listed
            self._stream = RawStream(sources, listed, metadata, self._out)
        else:
            self._stream = FrameStream(sources, metadata, self._out, level=codec[1], pool=pool, threads=threads)
        self.first_block_offset = self._stream.first_block_offset
        """Where the data is to start in the first block, in bytes."""
        self._blocks: SimpleQueue[Block | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._lender: Budget | None = None

    def emit(self, block: Block) -> None:
        """Take the next block of the stream. Once writing has failed, release it and raise that error."""
        with self._lock:
            error = self._error
            if error is None:
                self._lender = block.budget
                self._blocks.put(block)
        if error is not None:
            block.release()
            raise error

    def finish(self) -> None:
        """Say that there are no more blocks."""
        self._blocks.put(None)

    def cancel(self, error: BaseException) -> None:
        """Say that there will be no more blocks because of `error`, which `run` is to raise."""
        self._fail(error)
        self._blocks.put(None)

    def give_up(self, error: BaseException) -> None:
        """End what waits for a `run` that is not to come, or hangs in the storage and may never return.

        Staging ends with ``error``. Blocks that nobody writes are released; those that a call may still read stay out,
        and come back if it returns.
        """
        self._fail(error)
        self._drain()
        self._blocks.put(None)
        self._out.give_up(error)
        if self._lender is not None:
            self._lender.give_up(error)

    def run(self) -> RankManifest:
        """Write all blocks as they come, and return once the file is durable.

        What is returned lacks ``state`` and ``objects``, which the caller knows.

        On any error the file is removed, blocks that were emitted are released, and the error is raised.
        """
        try:
            with self._out.writing(self._stream.size_hint, front_last=self._stream.front_last):
                for block in self._emitted():
                    self._stream.add(block)
                self._stream.finish()
            with held_off():
                stored = self._stream.stored()
            self._out.commit()
        except BaseException as error:
            self._fail(error)
            self._stream.abandon()
            self._out.abort()
            self._drain()
            raise
        return self._describe(stored)

    def _emitted(self) -> Iterator[Block]:
        """Blocks as they come, doing what has been put off in the meantime."""
        while True:
            try:
                block = self._blocks.get_nowait()
            except Empty:
                if self._stream.catch_up():
                    continue
                block = self._blocks.get()
            error = self._error or self._out.error
            if error is not None:
                if block is not None:
                    block.release()
                raise error
            if block is None:
                return
            yield block

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error

    def _drain(self) -> None:
        """Release the blocks that nobody will write. After `_fail` no more come."""
        with suppress(Empty):
            while True:
                block = self._blocks.get_nowait()
                if block is not None:
                    block.release()

    @held_off()
    def _describe(self, stored: Stored) -> RankManifest:
        entries = {}
        for source, entry in zip(self._sources, stored.entries, strict=True):
            entries[source.key] = ShardEntry(
                fqn=source.fqn,
                dtype=source.dtype,
                starts=source.box.offsets,
                lengths=source.box.lengths,
                offset=entry.offset,
                nbytes=entry.nbytes,
                digests=entry.digests,
                codec=entry.codec,
                frames=entry.frames,
            )
        return RankManifest(
            save_id=self._save_id,
            rank=self._rank,
            file=self._name,
            size=stored.size,
            header_nbytes=len(stored.header),
            header_digest=digests_text([digest(stored.header)]),
            entries=entries,
        )
