"""Checkpoints that are not ours: a ``.ckpt`` file of stock Lightning, a directory of its FSDP strategies.

A user who adds the plugin to a project has such checkpoints already. They are loaded and removed as Lightning does it,
and one that lies where a sharded checkpoint is to be written steps aside until that is complete.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Final

import fsspec
import torch
from fsspec.core import url_to_fs

from shardckpt import dcp_directory
from shardckpt.background import PendingSave
from shardckpt.commit import checkpoint_path, is_checkpoint
from shardckpt.filenames import is_checkpoint_file
from shardckpt.lightning import flavours, foreign
from shardckpt.storage import local_path, open_storage

log = logging.getLogger(__name__)

ASIDE: Final = ".replaced"
"""What is appended to the name of an ordinary checkpoint while a sharded one is written in its place."""


def is_link(path: str) -> bool:
    """Whether ``path`` is a symbolic link."""
    local = _local(path)
    return local is not None and os.path.islink(local)


def is_ours(path: str, storage_options: Mapping[str, Any] | None) -> bool:
    """Whether a sharded checkpoint lies at ``path``, or what a save of one that did not finish left there."""
    if is_checkpoint(path, storage_options):
        return True
    local = _local(path)
    if local is not None and not os.path.isdir(local):
        return False
    return any(is_checkpoint_file(stat.name) for stat in open_storage(checkpoint_path(path), storage_options).list())


def is_ordinary(path: str, storage_options: Mapping[str, Any] | None) -> bool:
    """Whether an ordinary checkpoint lies at ``path``, and no sharded one."""
    local = _local(path)
    if local is not None:
        return os.path.isfile(local) or (dcp_directory.is_directory(local) and not is_checkpoint(path, storage_options))
    if path.startswith("http"):
        return True
    if is_checkpoint(path, storage_options):
        return False
    filesystem, inner = url_to_fs(path, **(storage_options or {}))
    return bool(filesystem.isfile(inner))


def standing(path: str, storage_options: Mapping[str, Any] | None) -> str:
    """``path``, or the ordinary checkpoint that stepped aside for one there that was never completed."""
    local = _local(path)
    if local is None or _is_checkpoint(local) or not _is_checkpoint(local + ASIDE):
        return path
    if is_checkpoint(path, storage_options):
        return path
    log.warning("%s is not complete: its save was cut short. Taking what it was to replace, %s", path, local + ASIDE)
    return local + ASIDE


def is_directory(path: str) -> bool:
    """Whether a directory lies at ``path`` that Lightning's FSDP or ModelParallel strategy wrote."""
    local = _local(path)
    return local is not None and dcp_directory.is_directory(local)


def stepped_aside(folder: str) -> list[str]:
    """The paths in a local folder whose ordinary checkpoints stepped aside, by a job that has not put things right."""
    local = _local(folder)
    if local is None or not os.path.isdir(local):
        return []
    return [os.path.join(local, name.removesuffix(ASIDE)) for name in os.listdir(local) if name.endswith(ASIDE)]


def load(
    path: str,
    map_location: Any,
    weights_only: bool | None,
    storage_options: Mapping[str, Any] | None = None,
    *,
    mapped: bool = False,
) -> Any:
    """What Lightning's own ``TorchCheckpointIO`` loads from a file; raises what it raises. A directory: `foreign`.

    ``mapped``: a local file's tensors are in its pages, on the CPU, and not in memory of their own.
    """
    local = _local(path)
    if is_directory(path):
        return foreign.load(local or path, map_location, weights_only)
    if mapped and local is not None:
        return foreign.File(local, weights_only).contents
    if storage_options and _local(path) is None:
        # Lightning's opens every file system without options. Given no location, it maps tensors to the CPU too.
        with fsspec.open(path, "rb", **storage_options) as file:
            return torch.load(
                file, map_location="cpu" if map_location is None else map_location, weights_only=weights_only
            )
    torch_io = flavours.main().fabric_module("plugins.io.torch_io").TorchCheckpointIO()
    options = {} if map_location is None else {"map_location": map_location}
    return torch_io.load_checkpoint(path, weights_only=weights_only, **options)


def remove(path: str, storage_options: Mapping[str, Any] | None = None) -> None:
    """Remove an ordinary file or directory; one that is missing is fine. A symbolic link goes, never its target."""
    if is_link(path):
        os.unlink(_local(path) or path)
        return
    filesystem, inner = url_to_fs(path, **(storage_options or {}))
    if filesystem.exists(inner):
        filesystem.rm(inner, recursive=True)
        log.debug("removed %s", path)


class Way:
    """What makes way for one save. ``pending`` is that save, where it goes on after its call, and None where not."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.pending: PendingSave | None = None

    def make(self, path: str) -> None:
        """Rename an ordinary checkpoint at ``path``, if there is one, so that ours has a directory of its own there."""
        local = _local(path)
        if local is None or os.path.islink(local):
            return
        if not _is_checkpoint(local) or is_checkpoint(path):
            if _is_checkpoint(local + ASIDE):  # left by a job that died: to be deleted as if it had just been renamed
                self.paths.append(local)
        else:
            _delete(local + ASIDE)  # an older one, in whose place this one was written since
            os.replace(local, local + ASIDE)
            self.paths.append(local)
            log.info("%s is an ordinary checkpoint: kept as %s%s until the checkpoint is complete", path, local, ASIDE)


class Displaced:
    """Ordinary checkpoints where sharded ones are written: each is kept until what replaces it is complete.

    For local ones only. In an object store a file and a prefix of one name do not get in each other's way.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[str, PendingSave]] = []

    @contextlib.contextmanager
    def making_way(self) -> Iterator[Way]:
        """Encloses one save, which one that a signal handler makes may interrupt: each sees to what made way for it."""
        way = Way()
        try:
            yield way
        finally:
            if way.pending is None:
                _conclude(way.paths)
            else:
                self._waiting += [(path, way.pending) for path in way.paths]
            self.settle()

    def settle(self) -> None:
        """Delete those whose replacement is complete, and put those back whose replacement failed."""
        over = [path for path, save in self._waiting if save.done()]
        self._waiting = [(path, save) for path, save in self._waiting if not save.done()]
        _conclude(over)


def _conclude(paths: list[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # two saves in a row to one path, and the first saw to it
            if is_checkpoint(path):
                _delete(path + ASIDE)
            elif not os.path.lexists(path):
                os.replace(path + ASIDE, path)


def _delete(local: str) -> None:
    if os.path.isdir(local) and not os.path.islink(local):
        shutil.rmtree(local)
    elif os.path.lexists(local):
        os.unlink(local)


def _is_checkpoint(local: str) -> bool:
    return os.path.isfile(local) or dcp_directory.is_directory(local)


def _local(path: str) -> str | None:
    local = local_path(path)
    return None if local is None else os.path.expanduser(local)
