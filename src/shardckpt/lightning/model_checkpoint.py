"""What Lightning's ``ModelCheckpoint`` and ``ckpt_path="last"`` miss about directories, prefixes and half a checkpoint.

Stock Lightning drops the protocol of a remote directory when it looks for "last", finds nothing under what is left, and
starts from scratch with a warning (https://github.com/Lightning-AI/pytorch-lightning/issues/18261). It takes any
``last.ckpt`` for a checkpoint, even if the job died while writing it. And on remote storage its retention deletes the
checkpoint that the run was resumed from (https://github.com/Lightning-AI/pytorch-lightning/issues/21813).

Three functions of Lightning's are wrapped for that. Trainers without the plugin get what they got before.
"""

import logging
import os
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from fsspec.core import url_to_fs

from shardckpt.commit import checkpoint_path, is_checkpoint, latest
from shardckpt.errors import ShardckptError
from shardckpt.filenames import MANIFEST
from shardckpt.lightning import flavours, ordinary
from shardckpt.storage import join, local_path, open_storage, split

log = logging.getLogger(__name__)


def install() -> None:
    """Do it for each flavour that is imported. Calling again is fine, and needed when the other is imported later."""
    for flavour in flavours.loaded():
        model_checkpoint = flavours.attribute(flavour, "callbacks", "ModelCheckpoint")
        flavours.wrap(model_checkpoint, "_find_last_checkpoints", _finding)
        flavours.wrap(model_checkpoint, "_should_remove_checkpoint", _sparing)
        flavours.wrap(flavour.module("trainer.connectors.checkpoint_connector"), "get_filesystem", _dating)


def forget_listing(path: str) -> None:
    """Have fsspec's cached listings show what was just written to a remote path: Lightning looks at once."""
    if local_path(path) is None:
        filesystem, inner = url_to_fs(path)
        filesystem.invalidate_cache(filesystem._parent(inner))


def _has_plugin(trainer: Any) -> bool:
    from shardckpt.lightning.plugin import ShardedCheckpointIO  # which imports this module, to have it installed

    plugin = trainer.strategy.checkpoint_io
    return isinstance(plugin, ShardedCheckpointIO) or isinstance(
        getattr(plugin, "checkpoint_io", None), ShardedCheckpointIO
    )


def _finding(stock: Callable[..., set[str]]) -> Callable[..., set[str]]:
    def _find_last_checkpoints(self: Any, trainer: Any) -> set[str]:
        if not _has_plugin(trainer):
            return stock(self, trainer)
        folder = str(self._ModelCheckpoint__resolve_ckpt_dir(trainer))
        if local_path(folder) is not None:
            return {whole for found in stock(self, trainer) if (whole := _complete(found)) is not None}
        pattern = re.compile(rf"^{re.escape(self.CHECKPOINT_NAME_LAST)}(-(\d+))?")
        names = [PurePosixPath(name) for name in open_storage(folder).children()]
        lasts = [join(folder, str(n)) for n in names if n.suffix == self.FILE_EXTENSION and pattern.match(n.stem)]
        found = {join(whole, MANIFEST) for path in lasts if (whole := _complete(path)) is not None}
        return found or stock(self, trainer)

    return _find_last_checkpoints


def _complete(path: str) -> str | None:
    """``path``, unless it is a sharded checkpoint that was never completed: then the newest complete one beside it."""
    dangling = os.path.islink(path) and not os.path.exists(path)
    if not dangling and (is_checkpoint(path) or not ordinary.is_ours(path, None)):
        return path
    newest = latest(split(path)[0])
    if newest is None:
        log.warning("%s is not complete: its save was cut short, and no complete checkpoint lies beside it", path)
    else:
        log.warning("%s is not complete: its save was cut short. Taking the newest complete one, %s", path, newest)
    return newest


def _sparing(stock: Callable[..., bool]) -> Callable[..., bool]:
    def _should_remove_checkpoint(self: Any, trainer: Any, previous: str, current: str) -> bool:
        resumed_from = trainer.ckpt_path
        if resumed_from is not None and local_path(previous) is None and _has_plugin(trainer):
            spared = checkpoint_path(resumed_from).rstrip("/") == checkpoint_path(previous).rstrip("/")
            return not spared and stock(self, trainer, previous, current)
        return stock(self, trainer, previous, current)

    return _should_remove_checkpoint


def _dating(stock: Callable[..., Any]) -> Callable[..., Any]:
    def get_filesystem(path: Any, **kwargs: Any) -> Any:
        filesystem = stock(path, **kwargs)
        try:
            return _Dates(filesystem) if ordinary.is_ours(str(path), None) else filesystem
        except ShardckptError:  # what is wrong with the path is for Lightning to say, which looks at it next
            return filesystem

    return get_filesystem


class _Dates:
    """What "last" asks a file system, answered by the manifest: a prefix has no date, and half a checkpoint is none."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def exists(self, path: Any) -> bool:
        return is_checkpoint(str(path))

    def modified(self, path: Any) -> Any:
        return self._filesystem.modified(join(checkpoint_path(str(path)), MANIFEST))
