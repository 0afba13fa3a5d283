"""How a range of a file is asked for: at once, in steps from a cache, or as a stream over a network."""

from collections.abc import Callable
from functools import partial
from typing import Final

from shardckpt.reader.fetch import PAGE, Range, steps
from shardckpt.reader.shards import Piece, ShardFile
from shardckpt.storage import BLOCK, Read, Storage

CACHED_STEP: Final = 4 << 20
"""Bytes that are read at once through the page cache: still in the processor's cache when they are verified. 2 GiB on 2
ranks: 0.25 s, with a cell at a time 0.32 s, with whole blocks 0.30 s. Not in the cache yet: 1.25 s, and 1.45 s."""
_STREAMED_STEP: Final = 2 << 20
"""Bytes of what comes over a network that are placed and verified at a time."""

Part = Callable[[Read, Range[Piece], int, int, bool], None]
"""Takes a part of a range: how to read it; which cells it has; which bytes of the file, [start, stop), to read for
them; and whether they may be read to anywhere, or have to be read to a block because that is faster."""


def most(storage: Storage, nbytes: int, *, least: int) -> int:
    """Bytes of a range such that all threads have as much to do, of `nbytes` in all."""
    # What is not streamed is read at once into one block.
    limit = BLOCK if storage.read_cache else storage.stretch
    turns = max(1, -(-nbytes // (storage.width * limit)))
    return min(limit, max(least, -(-nbytes // (storage.width * turns) // PAGE) * PAGE))


def in_parts(storage: Storage, file: ShardFile, wanted: Range[Piece], take: Part, *, cached: bool) -> None:
    """Have `take` read a range, part by part; `cached` is whether what is not in a cache is to come into it."""
    if not storage.read_cache:
        # Bytes are verified while the processor still has them from their way into place.
        first = wanted.runs[0].start_byte
        with file.stream(first, wanted.stop) as read:
            for part in steps(wanted, _STREAMED_STEP):
                take(read, part, part.runs[0].start_byte, part.stop, True)
        return
    in_cache = file.in_cache(wanted.start, wanted.stop)
    read = partial(file.read_into, cached=in_cache or cached)
    for part in steps(wanted, CACHED_STEP) if in_cache or cached else (wanted,):
        # What is read past the page cache has to be aligned; the rest may as well be read to where it belongs.
        stop = min(-(-part.stop // PAGE) * PAGE, file.size)
        take(read, part, part.start, stop, in_cache or cached)
