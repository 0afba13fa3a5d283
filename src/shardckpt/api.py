"""The functions for a loop of one's own, over a Checkpointer that the whole process shares."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shardckpt.background import PendingSave
from shardckpt.checkpointer import Checkpointer
from shardckpt.indexing import Index
from shardckpt.loading import OpenCheckpoint
from shardckpt.options import Compression, Overlap, Path, SaveOptions
from shardckpt.relocation import MapLocation
from shardckpt.reports import SaveReport
from shardckpt.state import KeyMap, Prefix


@functools.cache
def _engine() -> Checkpointer:
    """The Checkpointer of the process: one, so that calls with other options still wait for each other."""
    return Checkpointer()


def save(
    state: Any,
    path: Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
    compression: Compression = None,
    replicated: bool | Sequence[str] = False,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> SaveReport:
    """Save ``state`` to ``path``; every rank calls, and it returns once the checkpoint is committed.

    ``state`` is a nested dict of tensors, modules, optimizers, objects with ``state_dict``/``load_state_dict`` and
    plain values, or one of these by itself; `PerRank` marks what differs by rank. For the options see `Checkpointer`,
    for the errors `Checkpointer.async_save`.
    """
    return _engine().save(
        state,
        path,
        storage_options=storage_options,
        save_options=SaveOptions.of(compression, replicated, include, exclude, None),
    )


def async_save(
    state: Any,
    path: Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
    compression: Compression = None,
    replicated: bool | Sequence[str] = False,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    overlap: Overlap = None,
) -> PendingSave:
    """Save ``state`` as it is now in the background; returns once it may change. See `save`.

    With ``overlap="step"`` it returns earlier, and the next step of an optimizer waits; see `Checkpointer`.
    """
    return _engine().async_save(
        state,
        path,
        storage_options=storage_options,
        save_options=SaveOptions.of(compression, replicated, include, exclude, overlap),
    )


def load(
    path: Path,
    state: Any = None,
    *,
    prefix: Prefix = (),
    key_map: KeyMap | None = None,
    map_location: MapLocation = None,
    strict: bool = True,
    weights_only: bool | None = None,
    convert_dtype: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Restore ``state`` in place and return a LoadReport, every rank calling; without ``state``, return the saved one.

    See `Checkpointer.load`.
    """
    return _engine().load(
        path,
        state,
        prefix=prefix,
        key_map=key_map,
        map_location=map_location,
        strict=strict,
        weights_only=weights_only,
        convert_dtype=convert_dtype,
        storage_options=storage_options,
    )


def read_tensor(
    path: Path,
    name: str,
    index: Index = ...,
    *,
    map_location: MapLocation = None,
    storage_options: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """One tensor of a checkpoint by its fully qualified name, whole or the part ``[index]``, on this process alone.

    ``index`` is an int, a slice, an Ellipsis or a tuple of these; only what holds that part is read. Raises
    TensorNotFoundError, which names similar ones, where the checkpoint has none of that name; TensorIndexError, an
    IndexError, where the tensor has no such part.
    """

    def act(opened: OpenCheckpoint) -> torch.Tensor:
        return opened.read_tensor(name, index, map_location=map_location)

    return _engine().reading(path, act, storage_options=storage_options)
