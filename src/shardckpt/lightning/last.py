"""``ckpt_path="last"``: the newest checkpoint that is complete, also in an object store.

Stock Lightning drops the protocol of a remote directory, finds nothing under what is left, and starts from scratch
with a warning (https://github.com/Lightning-AI/pytorch-lightning/issues/18261). It also takes any ``last.ckpt`` for a
checkpoint, even if the job died while writing it.
"""

import logging
import os
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from fsspec.core import url_to_fs

from shardckpt.commit import checkpoint_path, is_checkpoint, latest
from shardckpt.filenames import MANIFEST
from shardckpt.lightning import flavours, ordinary
from shardckpt.storage import join, local_path, open_storage, split

log = logging.getLogger(__name__)


def install() -> None:
    """Do it for each flavour that is imported. Calling again is fine, and needed when the other is imported later."""
    for flavour in flavours.loaded():
        model_checkpoint = flavours.attribute(flavour, "callbacks", "ModelCheckpoint")
        if not hasattr(model_checkpoint._find_last_checkpoints, "_shardckpt_wraps"):
            model_checkpoint._find_last_checkpoints = _finding(model_checkpoint._find_last_checkpoints)
        connector: Any = flavour.module("trainer.connectors.checkpoint_connector")
        if not hasattr(connector.get_filesystem, "_shardckpt_wraps"):
            connector.get_filesystem = _dated(connector.get_filesystem)


def forget_listing(path: str) -> None:
    """Have fsspec's cached listings show what was just written to a remote path: Lightning looks at once."""
    if local_path(path) is None:
        filesystem, inner = url_to_fs(path)
        filesystem.invalidate_cache(filesystem._parent(inner))


def _finding(stock: Callable[..., set[str]]) -> Callable[..., set[str]]:
    def _find_last_checkpoints(self: Any, trainer: Any) -> set[str]:
        folder = str(self._ModelCheckpoint__resolve_ckpt_dir(trainer))
        if local_path(folder) is not None:
            return {whole for found in stock(self, trainer) if (whole := _complete(found)) is not None}
        pattern = re.compile(rf"^{re.escape(self.CHECKPOINT_NAME_LAST)}(-(\d+))?")
        names = [PurePosixPath(name) for name in open_storage(folder).children()]
        lasts = [
            join(folder, str(name)) for name in names if name.suffix == self.FILE_EXTENSION and pattern.match(name.stem)
        ]
        return {join(whole, MANIFEST) for path in lasts if (whole := _complete(path)) is not None} or stock(
            self, trainer
        )

    _find_last_checkpoints._shardckpt_wraps = stock  # type: ignore[attr-defined]  # so that it is wrapped once
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


def _dated(stock: Callable[..., Any]) -> Callable[..., Any]:
    def get_filesystem(path: Any, **kwargs: Any) -> Any:
        filesystem = stock(path, **kwargs)
        return _Dates(filesystem) if ordinary.is_ours(str(path), None) else filesystem

    get_filesystem._shardckpt_wraps = stock  # type: ignore[attr-defined]  # so that it is wrapped once
    return get_filesystem


class _Dates:
    """What "last" asks a file system, answered by the manifest: a prefix has no date, and half a checkpoint is none."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def exists(self, path: Any) -> bool:
        return is_checkpoint(str(path))

    def modified(self, path: Any) -> Any:
        return self._filesystem.modified(join(checkpoint_path(str(path)), MANIFEST))
