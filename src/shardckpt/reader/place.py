"""Copying stored elements into the tensors that want them."""

from typing import NamedTuple

import torch

from shardckpt.box import Box, boxes_of_range, contiguous_span, intersect, relative_to, slices
from shardckpt.staging import copyable


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

    __slots__ = ("_flat", "_start", "_stop", "_stored", "_target_box", "_tensor", "overlap")

    def __init__(self, stored: Box, overlap: Box, target: Target) -> None:
        self._stored = stored
        self._target_box = target.box
        self._tensor = copyable(target.tensor.detach())
        self.overlap = overlap
        """What to copy, in coordinates of the whole tensor."""
        self._flat: torch.Tensor | None = None
        """The target's elements in row-major order, where what is stored in a row also arrives in a row."""
        if stored == overlap == target.box:
            self._start, self._stop = 0, overlap.volume
            if self._tensor.is_contiguous():
                self._flat = self._tensor.view(-1)
            return
        self._start, self._stop = contiguous_span(stored, overlap)
        volume = overlap.volume
        if self._stop - self._start == volume and self._tensor.is_contiguous():
            start, stop = contiguous_span(target.box, overlap)
            if stop - start == volume:
                self._flat = self._tensor.view(-1)[start:stop]

    def copy(self, elements: torch.Tensor, at: int) -> None:
        """Copy what this placement wants of `elements`, which are the stored box's from number `at` on, row-major.

        `elements` is one-dimensional and has the stored dtype (`copyable`); the target's dtype decides what arrives.
        """
        count = elements.numel()
        if self._flat is not None and at == self._start and at + count == self._stop:
            self._flat.copy_(elements)
            return
        start, stop = max(self._start, at), min(self._stop, at + count)
        if start >= stop:
            return
        if self._flat is not None:
            self._flat[start - self._start : stop - self._start].copy_(elements[start - at : stop - at])
            return
        inner = relative_to(self._stored, self.overlap)
        shift = relative_to(self._target_box, self._stored).offsets
        first = start - at
        for box in boxes_of_range(self._stored.lengths, start, stop):
            wanted = intersect(box, inner)
            if wanted is not None:
                source = elements[first : first + box.volume].view(box.lengths)[slices(relative_to(box, wanted))]
                place = Box(tuple(map(sum, zip(wanted.offsets, shift, strict=True))), wanted.lengths)
                self._tensor[slices(place)].copy_(source)
            first += box.volume
