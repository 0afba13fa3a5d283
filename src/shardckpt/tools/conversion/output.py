"""Files of other formats, written from front to back to any storage."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from shardckpt.storage import BLOCK, ObjectWriter, local_path, open_storage, split, temporary_name
from shardckpt.storage.translate import translating

Count = Callable[[int], None]
"""Hears of bytes that have been read or written."""


class Output:
    """A binary file that is written once, front to back. It is there when `writing` ends without an error."""

    def __init__(self, writer: ObjectWriter, count: Count) -> None:
        self._writer = writer
        self._count = count
        self._block = bytearray(BLOCK)
        self._filled = self._at = 0

    def write(self, data: Any) -> int:
        """Append bytes; returns how many."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            size = min(BLOCK - self._filled, len(view) - done)
            self._block[self._filled : self._filled + size] = view[done : done + size]
            self._filled += size
            done += size
            if self._filled == BLOCK:
                self.flush_block()
        return done

    def flush(self) -> None:
        """Nothing: `torch.save` calls it, and what is in the block goes out with the rest of it."""

    def flush_block(self) -> None:
        """Write what is left; only the last block may be short."""
        if self._filled:
            self._writer.write(self._at, memoryview(self._block)[: self._filled])
            self._count(self._filled)
            self._at += self._filled
            self._filled = 0


@contextmanager
def writing(path: str, size: int, count: Count, storage_options: Mapping[str, Any] | None) -> Iterator[Output]:
    """Write a file of about ``size`` bytes at ``path``, durably: whole, or not at all, replacing what was there.

    Raises StorageError and its kinds.
    """
    parent, name = split(path)
    storage = open_storage(parent, storage_options)
    storage.prepare()
    local = local_path(path)
    # An object is there when it is committed; a file has to be put in its place.
    written = name if local is None else temporary_name()
    writer = storage.create(written, size)
    output = Output(writer, count)
    try:
        yield output
        output.flush_block()
        writer.commit()
        if local is not None:
            with translating("write", path):
                os.replace(os.path.join(os.path.dirname(os.path.abspath(local)), written), local)
            storage.sync()
    except BaseException:
        writer.abort()
        if local is not None:
            storage.delete([written])
        raise
