"""Tensors in a file: room for a state that may be larger than memory, while it goes from one form to another."""

import mmap
import os
import tempfile
from collections.abc import Iterable
from math import prod
from typing import Final

import torch
from torch import Tensor

from shardckpt.storage.translate import translating

_ARENA: Final = 256 << 20
"""Bytes mapped at a time, at least. A process may have 65,530 mappings, and a state more tensors than that."""
_ALIGNMENT: Final = 64
"""Bytes; more than the size of an element of any dtype."""


class Scratch:
    """A file without a name, gone when the tensors in it are, and on a crash too.

    What the kernel keeps of it in memory it writes out when somebody needs the room.
    """

    def __init__(self, folder: str) -> None:
        """Raises StorageError where ``folder`` may not be written."""
        self._folder = folder
        with translating("write", folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the mappings keep it until they go
        self._mapping: mmap.mmap | None = None
        self._at = self._end = self._size = 0

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose elements are zero. Raises StorageFullError where the disk has no room for it."""
        sizes = tuple(shape)
        nbytes = prod(sizes) * dtype.itemsize
        if not nbytes:
            return torch.empty(sizes, dtype=dtype)
        if self._mapping is None or self._at + nbytes > self._end:
            self._extend(nbytes)
        assert self._mapping is not None
        octets = torch.frombuffer(self._mapping, dtype=torch.uint8, offset=self._at, count=nbytes)
        self._at += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return octets.view(dtype).view(sizes)

    def close(self) -> None:
        """No more tensors will be asked for; those that were stay."""
        self._mapping = None
        self._file.close()

    def _extend(self, nbytes: int) -> None:
        room = -(-max(nbytes, _ARENA) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with translating("write", self._folder):
            # Without blocks of its own a full disk would be a SIGBUS when the tensor is filled.
            os.posix_fallocate(self._file.fileno(), self._size, room)
            self._mapping = mmap.mmap(self._file.fileno(), room, offset=self._size)
        self._size += room
        self._at, self._end = 0, room
