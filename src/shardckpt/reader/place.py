"""Copying stored elements into the tensors that want them."""

import ctypes
from typing import NamedTuple

import torch

from shardckpt.box import Box, boxes_of_range, contiguous_span, intersect, relative_to, slices
from shardckpt.staging import copy_memory, copyable


class Target(NamedTuple):
    """A local tensor to fill."""

    fqn: str
    """The tensor's name in the checkpoint."""
    box: Box
    """Which of its elements, in coordinates of the whole tensor."""
    tensor: torch.Tensor
    """Where they go: shape ``box.lengths``, any strides, any device. No two targets share memory."""


class Placement:
    """One copy from a stored box to a target, done in as many parts as the stored bytes arrive in."""

    __slots__ = ("_address", "_itemsize", "_stored", "_target_box", "_tensor", "overlap", "start", "stop")

    def __init__(self, stored: Box, overlap: Box, target: Target, dtype: torch.dtype) -> None:
        """`overlap` is what to copy, in coordinates of the whole tensor, and `dtype` the stored one."""
        self.overlap = overlap
        self._stored = stored
        self._target_box = target.box
        self._tensor = tensor = target.tensor
        self._itemsize = dtype.itemsize
        volume = overlap.volume
        self.start, self.stop = (0, volume) if stored == overlap else contiguous_span(stored, overlap)
        """The shortest range of the stored box's elements, row-major, that has all of `overlap`."""
        # Where runs of stored elements arrive as runs of bytes, the address of the first; elsewhere torch has to help.
        self._address = 0
        if self.stop - self.start == volume and tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous():
            first, stop = (0, volume) if target.box == overlap else contiguous_span(target.box, overlap)
            if stop - first == volume and not tensor.is_conj() and not tensor.is_neg():
                self._address = tensor.data_ptr() + first * self._itemsize

    def window(self, start: int, stop: int) -> memoryview | None:
        """The target's memory for the stored elements `start` to `stop`, if all belong there as they are stored."""
        if not self._address or start < self.start or stop > self.stop:
            return None
        address = self._address + (start - self.start) * self._itemsize
        return memoryview((ctypes.c_uint8 * ((stop - start) * self._itemsize)).from_address(address)).cast("B")

    def copy_bytes(self, address: int, at: int, count: int) -> bool:
        """Do what `copy` does of the `count` elements at `address`, if that is a copy of bytes; whether it is."""
        if not self._address:
            return False
        start, stop = max(self.start, at), min(self.stop, at + count)
        if start < stop:
            source = address + (start - at) * self._itemsize
            to = self._address + (start - self.start) * self._itemsize
            copy_memory(to, source, (stop - start) * self._itemsize)
        return True

    def copy(self, raw: torch.Tensor, dtype: torch.dtype, at: int) -> None:
        """Copy what this placement wants of stored elements: the box's from number `at` on, row-major.

        `raw` has their bytes and `dtype` is theirs; the target's decides what arrives.
        """
        if self.copy_bytes(raw.data_ptr(), at, raw.numel() // self._itemsize):
            return
        start, stop = max(self.start, at), min(self.stop, at + raw.numel() // self._itemsize)
        if start >= stop:
            return
        skip = (start - at) * self._itemsize
        wanted = raw[skip : skip + (stop - start) * self._itemsize]
        if wanted.data_ptr() % self._itemsize:
            # We write every entry aligned; whoever else wrote this one did not.
            wanted = wanted.clone()
        self._copy_elements(copyable(wanted.view(dtype)), start, stop)

    def _copy_elements(self, elements: torch.Tensor, start: int, stop: int) -> None:
        """Copy between layouts, dtypes or devices: `elements` are the stored box's from `start` to `stop`."""
        tensor = copyable(self._tensor.detach())
        inner = relative_to(self._stored, self.overlap)
        shift = relative_to(self._target_box, self._stored).offsets
        first = 0
        for box in boxes_of_range(self._stored.lengths, start, stop):
            shared = intersect(box, inner)
            if shared is not None:
                source = elements[first : first + box.volume].view(box.lengths)[slices(relative_to(box, shared))]
                place = Box(tuple(map(sum, zip(shared.offsets, shift, strict=True))), shared.lengths)
                tensor[slices(place)].copy_(source)
            first += box.volume
