"""What part of a stored tensor an index wants: pure arithmetic, no torch."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

from shardckpt.box import Box
from shardckpt.errors import TensorIndexError, UsageError

Index = Any
"""An int, a slice, an Ellipsis, or a tuple of these."""


class Selected(NamedTuple):
    """``full[index]`` equals ``full[slices(box)][within]``."""

    box: Box
    """The smallest box that has every wanted element."""
    within: tuple[int | slice, ...]
    """What remains to be done to it: an int for a dimension that goes, a slice for one that is kept."""


def select(index: Index, shape: Sequence[int], name: str) -> Selected:
    """What ``index`` wants of a tensor of ``shape``, with the meaning it has for a tensor; ``name`` is for errors.

    Raises TensorIndexError, an IndexError, for too many indices and ints out of range; UsageError for indices that are
    neither ints nor slices, and for slices that do not step forward.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    ellipses = [position for position, item in enumerate(items) if item is ...]
    if len(ellipses) > 1:
        raise UsageError(f"{name}: more than one Ellipsis in the index {index!r}")
    count = len(items) - len(ellipses)
    if count > len(shape):
        raise TensorIndexError(f"{name}: {count} indices for a tensor of {len(shape)} dimension(s)")
    at = ellipses[0] if ellipses else len(items)
    items[at : at + 1] = [slice(None)] * (len(shape) - count)
    parts = [_select_in(item, size, dim, name) for dim, (item, size) in enumerate(zip(items, shape, strict=True))]
    return Selected(Box(tuple(p[0] for p in parts), tuple(p[1] for p in parts)), tuple(p[2] for p in parts))


def _select_in(item: Any, size: int, dim: int, name: str) -> tuple[int, int, int | slice]:
    """First element, number of elements and the rest of the index, of one dimension."""
    if isinstance(item, slice):
        try:
            start, stop, step = item.indices(size)
        except (TypeError, ValueError) as error:  # bounds that are no ints, a step of zero
            raise UsageError(f"{name}: {item!r} is no slice of dimension {dim}: {error}") from error
        if step < 0:
            raise UsageError(f"{name}: {item!r} steps backward, which tensors cannot; flip what you get instead")
        last = start + (len(range(start, stop, step)) - 1) * step
        return (start, last + 1 - start, slice(None, None, step)) if start < stop else (0, 0, slice(None))
    if isinstance(item, bool) or not isinstance(item, Integral):
        kind = "None" if item is None else f"a {type(item).__name__}"
        raise UsageError(f"{name}: an index is an int, a slice, an Ellipsis or a tuple of these, not {kind}")
    number = int(item)
    if not -size <= number < size:
        raise TensorIndexError(f"{name}: index {number} is out of range for dimension {dim} of size {size}")
    return number % size, 1, 0
