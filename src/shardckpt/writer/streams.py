"""What becomes of staged bytes on their way into a shard: stored as they are, or compressed frame by frame.

A stream takes blocks in the order in which they were staged, and keeps to the grid of the storage: each piece of the
file but the last is `BLOCK` bytes from a multiple of `BLOCK`.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from shardckpt.codecs import (
    DIGEST_BLOCK,
    SAFETENSORS_TAGS,
    ZSTD,
    compress_frames,
    digest,
    digests_text,
)
from shardckpt.safetensors_format import HeaderEntry, Listed, build_header, header_bound, list_entries
from shardckpt.staging import Block, Budget, Source, StagingPool
from shardckpt.storage import BLOCK
from shardckpt.writer.cells import Cells
from shardckpt.writer.output import Output


class StoredEntry(NamedTuple):
    """Where the bytes of one source lie in the file; see `shardckpt.manifest.ShardEntry`."""

    offset: int
    nbytes: int
    digests: str
    codec: str | None
    frames: list[int] | None


class Stored(NamedTuple):
    """A file whose every byte has been written."""

    header: bytes
    size: int
    entries: list[StoredEntry]
    """In the order of the sources."""


class Stream(Protocol):
    """Between the blocks that come from staging and the pieces that go to the storage. For one thread."""

    first_block_offset: int
    """Where data is to start in the first block, in bytes."""
    size_hint: int
    """The size of the file in bytes, or where it depends on the data, its size without compression."""
    front_last: bool
    """Whether the file's first piece is handed over after all others."""

    def add(self, block: Block) -> None:
        """Take the next block. It is the stream's, even if this raises."""

    def catch_up(self) -> bool:
        """Do a part of what was put off while blocks came in, and release one; False where there is nothing to do."""

    def finish(self) -> None:
        """Hand over what is left. All bytes of the sources must have been added."""

    def stored(self) -> Stored:
        """What has become of the sources; comes after `finish`, once the threads of the output are through."""

    def abandon(self) -> None:
        """Release every block that was added and not handed over. No thread of the output runs any more."""


class _Cursor:
    """Finds the sources' boundaries in the staged bytes."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sizes = [source.nbytes for source in sources]
        self._source = -1
        self._left = 0

    def parts(self, data: memoryview) -> Iterator[tuple[int, memoryview, bool]]:
        """The next bytes, cut where one source ends: (number of the source, bytes of it, whether it ends with them)."""
        at, stop = 0, len(data)
        while at < stop:
            while self._left == 0:
                self._source += 1
                self._left = self._sizes[self._source]
            size = min(self._left, stop - at)
            self._left -= size
            yield self._source, data[at : at + size], self._left == 0
            at += size

    def check_end(self) -> None:
        """Nothing of any source is missing: a shard with less would still look sound."""
        missing = self._left + sum(self._sizes[self._source + 1 :])
        assert missing == 0, f"the last {missing} bytes were not staged"


def listed_of(sources: Sequence[Source]) -> Listed:
    """How a shard without compression lists `sources`. Raises UsageError for names that it can't list."""
    listed = []
    for source in sources:
        tag = SAFETENSORS_TAGS[source.dtype]
        shape = (source.nbytes,) if tag is None else source.box.lengths
        listed.append(HeaderEntry(source.key, tag or "U8", shape))
    return list_entries(listed)


class RawStream:
    """Bytes stored as they are. A staged block, with the header before it, is a piece of the file.

    The output's threads digest what they write: beside a training loop that is busy in Python each call that lets go of
    the interpreter takes milliseconds to get it back, and one thread alone would make 300 MB/s of a disk of 2 GB/s.
    """

    def __init__(self, sources: Sequence[Source], listed: Listed, metadata: Mapping[str, str], out: Output) -> None:
        """`listed` is what `listed_of` says of `sources`."""
        self._header = build_header(listed, metadata)
        self._sources = sources
        self._out = out
        self._cells = Cells([source.nbytes for source in sources])
        self.first_block_offset = len(self._header) % BLOCK
        self.size_hint = len(self._header) + self._cells.nbytes
        self.front_last = False
        self._first = len(self._header) - self.first_block_offset
        self._at = self._first

    def add(self, block: Block) -> None:
        is_first = self._at == self._first
        try:
            if is_first:
                self._out.put_header(self._header, block)
            digesting = self._cells.next(block.memory[self.first_block_offset if is_first else 0 : block.filled])
        except BaseException:
            block.release()
            raise
        self._out.put(self._at, block, digesting)
        self._at += BLOCK

    def catch_up(self) -> bool:
        return False

    def finish(self) -> None:
        self._cells.check_end()
        if self._at == self._first:
            self._out.put_header(self._header, None)

    def stored(self) -> Stored:
        entries = []
        at = len(self._header)
        for source, digests in zip(self._sources, self._cells.texts(), strict=True):
            entries.append(StoredEntry(at, source.nbytes, digests, None, None))
            at += source.nbytes
        return Stored(self._header, at, entries)

    def abandon(self) -> None:
        """Nothing to do: a block is handed over as soon as it comes."""


class _Frame(NamedTuple):
    """One compressed cell of a source."""

    source: int
    stored: bytes
    digest: int


class _Encoding:
    """Cells that one job compresses: (number of the source, its bytes)."""

    def __init__(self, cells: list[tuple[int, memoryview]], level: int, out: Output) -> None:
        self._cells = cells
        self._level = level
        self._out = out
        self._done = threading.Event()
        self._frames: list[_Frame] = []

    def run(self) -> None:
        try:
            if self._out.error is None:
                for source, cell in self._cells:
                    for frame in compress_frames((cell,), self._level):
                        self._frames.append(_Frame(source, frame, digest(frame)))
        finally:
            self._cells.clear()
            self._done.set()

    def frames(self) -> list[_Frame]:
        """What became of the cells; waits for it, and raises the error of whichever job failed first."""
        self._done.wait()
        if self._out.error is not None:
            raise self._out.error
        return self._frames


class FrameStream:
    """Each `DIGEST_BLOCK` of a source as a zstd frame of its own, so that a part can be read without the rest.

    The output's threads compress. What they have finished is packed, in order, into blocks of this stream's own. The
    header is written last, since only then the sizes are known; room for it is kept in front.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        metadata: Mapping[str, str],
        out: Output,
        *,
        level: int,
        pool: StagingPool,
        threads: int,
    ) -> None:
        self._sources = sources
        self._metadata = metadata
        self._out = out
        self._level = level
        self._cursor = _Cursor(sources)
        self._straddling = bytearray()
        # Two jobs a thread are enough to keep it busy, one more block covers for the one being packed.
        self._ahead = 1 + -(-2 * threads * DIGEST_BLOCK // BLOCK)
        self._encoding: deque[tuple[Block, list[_Encoding]]] = deque()
        self._frames: list[list[int]] = [[] for _ in sources]
        self._digests: list[list[int]] = [[] for _ in sources]
        self._reserved = header_bound([(source.key, source.box.lengths) for source in sources], metadata)
        self.first_block_offset = 0
        self.size_hint = self._reserved + sum(source.nbytes for source in sources)
        self.front_last = True
        self._at = self._reserved
        # One block being packed, one kept back for the header, and one for each thread to write.
        self._budget = Budget(pool, (threads + 2) * BLOCK)
        self._packing: Block | None = None
        self._front: Block | None = None
        self._header = b""

    def add(self, block: Block) -> None:
        jobs: list[_Encoding] = []
        self._encoding.append((block, jobs))
        batch: list[tuple[int, memoryview]] = []
        nbytes = 0
        for source, cell in self._cells(block.memory[: block.filled]):
            batch.append((source, cell))
            nbytes += len(cell)
            if nbytes >= DIGEST_BLOCK:
                jobs.append(self._encode(batch))
                batch, nbytes = [], 0
        if batch:
            jobs.append(self._encode(batch))
        while len(self._encoding) > self._ahead:
            self.catch_up()

    def catch_up(self) -> bool:
        if not self._encoding:
            return False
        for job in self._encoding[0][1]:
            for source, stored, number in job.frames():
                self._frames[source].append(len(stored))
                self._digests[source].append(number)
                self._pack(memoryview(stored))
        block, _ = self._encoding.popleft()
        block.release()
        return True

    def finish(self) -> None:
        self._cursor.check_end()
        while self.catch_up():
            pass
        if self._packing is not None:
            self._seal()
        sizes = (sum(frames) for frames in self._frames)
        listed = [HeaderEntry(source.key, "U8", (size,)) for source, size in zip(self._sources, sizes, strict=True)]
        self._header = build_header(list_entries(listed), self._metadata, reserve=self._reserved)
        self._out.put_header(self._header, self._front)
        if self._front is not None:
            front, self._front = self._front, None
            self._out.put(len(self._header) - len(self._header) % BLOCK, front)

    def stored(self) -> Stored:
        entries = []
        at = self._reserved
        for frames, digests in zip(self._frames, self._digests, strict=True):
            entries.append(StoredEntry(at, sum(frames), digests_text(digests), ZSTD, frames))
            at += sum(frames)
        return Stored(self._header, at, entries)

    def abandon(self) -> None:
        for block in (*(block for block, _ in self._encoding), self._packing, self._front):
            if block is not None:
                block.release()
        self._encoding.clear()
        self._packing = self._front = None

    def _cells(self, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """The cells that end in these bytes; one that lies in two blocks is put together in memory of its own."""
        for source, part, ends in self._cursor.parts(data):
            if self._straddling:
                room = DIGEST_BLOCK - len(self._straddling)
                self._straddling += part[:room]
                part = part[room:]
                if len(self._straddling) == DIGEST_BLOCK or ends:
                    yield source, memoryview(self._straddling)
                    self._straddling = bytearray()
            while len(part) >= DIGEST_BLOCK or (ends and part):
                yield source, part[:DIGEST_BLOCK]
                part = part[DIGEST_BLOCK:]
            self._straddling += part

    def _encode(self, cells: list[tuple[int, memoryview]]) -> _Encoding:
        job = _Encoding(cells, self._level, self._out)
        self._out.run(job.run)
        return job

    def _pack(self, data: memoryview) -> None:
        """Append `data` to the file."""
        while data:
            if self._packing is None:
                self._packing = self._budget.acquire()
            start = self._at % BLOCK
            size = min(len(data), BLOCK - start)
            self._packing.memory[start : start + size] = data[:size]
            self._packing.filled = start + size
            self._at += size
            if self._packing.filled == BLOCK:
                self._seal()
            data = data[size:]

    def _seal(self) -> None:
        """Write the block that was packed, unless the header has yet to come into it."""
        assert self._packing is not None, "only a block with data in it is sealed"
        block, self._packing = self._packing, None
        offset = (self._at - 1) // BLOCK * BLOCK
        if offset < self._reserved:
            self._front = block
        else:
            self._out.put(offset, block)
