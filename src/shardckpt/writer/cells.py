"""The digests of a shard whose bytes come in blocks, worked out by several threads at once."""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import xxhash

from shardckpt.codecs import DIGEST_BLOCK, digest, digests_text


class _Open:
    """A cell of which one block has the beginning, and the next one the rest."""

    def __init__(self) -> None:
        self.hash = xxhash.xxh3_64()
        self.begun = threading.Event()


class Cells:
    """What one digest covers, `DIGEST_BLOCK` bytes of a source or what is left at its end: a cell.

    The bytes of all sources, back to back, are a stream, which `next` is told of in consecutive parts. Each must be
    longer than a cell, but for the last.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes` are the bytes of each source."""
        self._ends: list[int] = []
        self._counts = [-(-size // DIGEST_BLOCK) for size in sizes]
        self.nbytes = 0
        """Of all sources."""
        for size in sizes:
            self._ends += range(self.nbytes + DIGEST_BLOCK, self.nbytes + size, DIGEST_BLOCK)
            self.nbytes += size
            if size:
                self._ends.append(self.nbytes)
        self._numbers = [0] * len(self._ends)
        self._at = 0
        self._first = 0
        self._open: _Open | None = None

    def next(self, data: memoryview) -> Callable[[], None]:
        """A job, for any thread, that digests the cells in the next part of the stream, which is `data`.

        Jobs must be begun in the order of their parts: one may wait for the one before it.
        """
        start, first, begun = self._at, self._first, self._open
        stop = self._at = start + len(data)
        end = self._first = bisect_right(self._ends, stop, lo=first)
        rest = self._ends[end - 1] if end else 0
        self._open = last = _Open() if stop > max(rest, start) else None

        def job() -> None:
            # The next part's job may wait for this.
            if last is not None:
                try:
                    last.hash.update(data[max(rest, start) - start :])
                finally:
                    last.begun.set()
            at = start
            for number in range(first, end):
                cell = data[at - start : self._ends[number] - start]
                if number == first and begun is not None:
                    begun.begun.wait()
                    begun.hash.update(cell)
                    self._numbers[number] = begun.hash.intdigest()
                else:
                    self._numbers[number] = digest(cell)
                at = self._ends[number]

        return job

    def check_end(self) -> None:
        """All sources have come: a shard with less would still look sound."""
        assert self._at == self.nbytes, f"{self._at} of {self.nbytes} bytes were staged"

    def texts(self) -> Iterator[str]:
        """The digests of each source as manifests have them, once all jobs are done."""
        text, at = digests_text(self._numbers), 0
        for count in self._counts:
            yield text[at : at + 16 * count]
            at += 16 * count
