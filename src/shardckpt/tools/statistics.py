"""Norms of tensors, and what in them is no number: streamed, in bounded memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardckpt.errors import UsageError
from shardckpt.options import Path
from shardckpt.staging import StagingPool
from shardckpt.state.selection import Selection
from shardckpt.tools.numbers import doubles, stretches
from shardckpt.tools.opened import Progress, open_checkpoint, unheard
from shardckpt.tools.streaming import batches, read

_SAFE = 1e100
"""Numbers whose squares, a mebi of them, a double can add up without overflowing; its inverse without vanishing."""


@dataclass
class TensorStats:
    """What the numbers of one tensor are like. `norm`, `mean` and `max_abs` are those of its finite elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    norm: float = 0.0
    """The Euclidean norm."""
    mean: float | None = None
    """None where it is complex, or nothing is finite."""
    max_abs: float | None = None
    """None where nothing is finite."""
    nan: int = 0
    """Elements that are not a number; of complex ones, in either part."""
    inf: int = 0
    """Elements that are infinite, and not NaN."""


def stats(
    path: Path,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress = unheard,
) -> list[TensorStats]:
    """Read and verify the tensors of a checkpoint, and say what their numbers are like; in the order of the state.

    ``include`` and ``exclude`` are patterns of names as for a save. ``progress`` hears of bytes done and of all bytes.
    A tensor that has several names goes by any of them. Raises what opening and reading a checkpoint do, and UsageError
    where ``include`` matches nothing.
    """
    opened = open_checkpoint(path, storage_options)
    selection = Selection(include, exclude)
    names: dict[str, list[str]] = {name: [name] for name in opened.manifest.tensors}
    for alias, name in opened.manifest.aliases.items():
        names[name].append(alias)
    chosen = {name: opened.manifest.tensors[name] for name, called in names.items() if any(map(selection, called))}
    if include and not chosen:
        raise UsageError(f"include={list(include)} matches no tensor in {opened.path}.")
    found = {name: _Sums(TensorStats(name, t.dtype, t.shape, math.prod(t.shape))) for name, t in chosen.items()}
    total, done = sum(sum(tensor.nbytes) for tensor in chosen.values()), 0
    pool = StagingPool()
    try:
        for batch in batches(opened.manifest, chosen):
            for wanted, tensor in zip(batch, read(opened, batch, pool), strict=True):
                found[wanted.fqn].add(tensor)
                done += tensor.nbytes
            progress(min(done, total), total)
    finally:
        pool.close()
    return [sums.result() for sums in found.values()]


class _Sums:
    """The figures of one tensor, while its parts come in."""

    def __init__(self, stats: TensorStats) -> None:
        self._stats = stats
        self._sum = 0.0
        self._numbers = 0

    def add(self, tensor: Tensor) -> None:
        for (part,) in stretches(tensor):
            self._add(doubles(part), is_complex=part.is_complex())

    def _add(self, numbers: Tensor, *, is_complex: bool) -> None:
        stats = self._stats
        if not is_complex:
            numbers = numbers.reshape(-1, 1)
        nan = numbers.isnan().any(1)
        finite = numbers.isfinite().all(1)
        stats.nan += int(nan.sum())
        stats.inf += int((~finite & ~nan).sum())
        numbers = numbers[finite]
        if not len(numbers):
            return
        self._numbers += len(numbers)
        if not is_complex:
            self._sum += float(numbers.sum())
        sizes = torch.hypot(numbers[:, 0], numbers[:, 1]) if is_complex else numbers[:, 0].abs()
        largest = float(sizes.max())
        stats.max_abs = max(stats.max_abs or 0.0, largest)
        scale = largest if largest and not 1 / _SAFE < largest < _SAFE else 1.0
        stats.norm = math.hypot(stats.norm, scale * float(torch.linalg.vector_norm(sizes / scale)))
        if is_complex:
            self._sum = math.nan

    def result(self) -> TensorStats:
        if self._numbers and not math.isnan(self._sum):
            self._stats.mean = self._sum / self._numbers
        return self._stats
