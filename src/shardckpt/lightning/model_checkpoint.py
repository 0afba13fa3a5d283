"""What Lightning's ``ModelCheckpoint`` and ``ckpt_path="last"`` miss about directories, prefixes and half a checkpoint.

Stock Lightning drops the protocol of a remote directory when it looks for "last", finds nothing under what is left, and
starts from scratch with a warning (https://github.com/Lightning-AI/pytorch-lightning/issues/18261). It takes any
``last.ckpt`` for a checkpoint, even if the job died while writing it. And on remote storage its retention deletes the
checkpoint that the run was resumed from (https://github.com/Lightning-AI/pytorch-lightning/issues/21813).

Some functions of Lightning's are wrapped for that. Trainers without the plugin get what they got before.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs

from shardckpt.commit import checkpoint_path, is_checkpoint
from shardckpt.errors import ShardckptError
from shardckpt.filenames import MANIFEST
from shardckpt.lightning import flavours, ordinary
from shardckpt.lightning.living import living
from shardckpt.lightning.places import Places
from shardckpt.storage import join, local_path, open_storage, split

if TYPE_CHECKING:
    from shardckpt.lightning.plugin import ShardedCheckpointIO

log = logging.getLogger(__name__)

Options = Mapping[str, Any]
"""Storage options: the plugin's own, and those of the call that saved."""


def install() -> None:
    """Do it for each flavour that is imported. Calling again is fine, and needed when the other is imported later."""
    for flavour in flavours.loaded():
        model_checkpoint = flavours.attribute(flavour, "callbacks", "ModelCheckpoint")
        flavours.wrap(model_checkpoint, "_find_last_checkpoints", _finding)
        flavours.wrap(model_checkpoint, "_should_remove_checkpoint", _sparing)
        flavours.wrap(model_checkpoint, "_save_topk_checkpoint", _first)
        flavours.wrap(model_checkpoint, "_save_last_checkpoint", _second)
        connector = flavours.attribute(flavour, "trainer.connectors.checkpoint_connector", "_CheckpointConnector")
        flavours.wrap_property(connector, "_hpc_resume_path", _requeued)
        flavours.wrap(flavour.module("trainer.connectors.checkpoint_connector"), "get_filesystem", _dating)


def forget_listing(path: str, storage_options: Options | None = None) -> None:
    """Have fsspec's cached listings show what was just written to a remote path: Lightning looks at once."""
    if local_path(path) is None:
        filesystem, inner = url_to_fs(path, **(storage_options or {}))
        filesystem.invalidate_cache(filesystem._parent(inner))


def _plugin_of(trainer: Any) -> "ShardedCheckpointIO | None":
    from shardckpt.lightning.plugin import ShardedCheckpointIO  # which imports this module, to have it installed

    plugin = trainer.strategy.checkpoint_io
    candidates = (plugin, getattr(plugin, "checkpoint_io", None))
    return next((found for found in candidates if isinstance(found, ShardedCheckpointIO)), None)


def _first(stock: Callable[..., None]) -> Callable[..., None]:
    def _save_topk_checkpoint(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        plugin = _plugin_of(trainer) if self.save_last else None
        with nullcontext() if plugin is None else plugin.twins.first(self):
            stock(self, trainer, *args, **kwargs)

    return _save_topk_checkpoint


def _second(stock: Callable[..., None]) -> Callable[..., None]:
    def _save_last_checkpoint(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        plugin = _plugin_of(trainer)
        with nullcontext() if plugin is None else plugin.twins.second(self):
            stock(self, trainer, *args, **kwargs)

    return _save_last_checkpoint


def _requeued(stock: Callable[..., str | None]) -> Callable[..., str | None]:
    def _hpc_resume_path(self: Any) -> str | None:
        found = stock(self)
        plugin = _plugin_of(self.trainer)
        # Nobody is there to be told of what another job left half done.
        return found if found is None or plugin is None else plugin.places.complete(found, "latest")

    return _hpc_resume_path


def _finding(stock: Callable[..., set[str]]) -> Callable[..., set[str]]:
    def _find_last_checkpoints(self: Any, trainer: Any) -> set[str]:
        plugin = _plugin_of(trainer)
        if plugin is None:
            return stock(self, trainer)
        folder = str(self._ModelCheckpoint__resolve_ckpt_dir(trainer))
        last = re.compile(rf"^{re.escape(self.CHECKPOINT_NAME_LAST)}(-(\d+))?")

        def named_last(paths: Iterable[str]) -> set[str]:
            names = {path: PurePosixPath(split(path)[1]) for path in paths}
            return {path for path, n in names.items() if n.suffix == self.FILE_EXTENSION and last.match(n.stem)}

        if local_path(folder) is not None:
            return _whole(plugin.places, stock(self, trainer) | named_last(ordinary.stepped_aside(folder)))
        children = open_storage(folder, plugin.places.options_for(folder)).children()
        found = _whole(plugin.places, named_last(join(folder, name) for name in children))
        return {join(path, MANIFEST) for path in found} or stock(self, trainer)

    return _find_last_checkpoints


def _whole(places: Places, candidates: set[str]) -> set[str]:
    """The candidates for "last" that are complete, and what is taken in place of those cut short."""
    cut = {path for path in candidates if places.is_cut_short(path)}
    if places.resume is None and cut != candidates:
        for path in sorted(cut):
            log.warning("%s is not complete: its save was cut short. It is not taken for the last checkpoint", path)
        candidates = candidates - cut
    return {found for path in sorted(candidates) if (found := places.complete(path)) is not None}


def _sparing(stock: Callable[..., bool]) -> Callable[..., bool]:
    def _should_remove_checkpoint(self: Any, trainer: Any, previous: str, current: str) -> bool:
        resumed_from = trainer.ckpt_path
        if resumed_from is not None and local_path(previous) is None and _plugin_of(trainer) is not None:
            spared = checkpoint_path(resumed_from).rstrip("/") == checkpoint_path(previous).rstrip("/")
            return not spared and stock(self, trainer, previous, current)
        return stock(self, trainer, previous, current)

    return _should_remove_checkpoint


def _dating(stock: Callable[..., Any]) -> Callable[..., Any]:
    def get_filesystem(path: Any, **kwargs: Any) -> Any:
        # Nothing says here for which Trainer it is asked.
        known = [plugin.places.options_for(str(path)) for plugin in list(living)]
        for options in [{}, *(options for options in known if options)]:
            try:
                if ordinary.is_ours(str(path), options):
                    return _Dates(str(path), options)
            except (ShardckptError, OSError):  # what is wrong with the path is for Lightning to say, asked last
                continue
        return stock(path, **kwargs)

    return get_filesystem


class _Dates:
    """What "last" asks a file system, answered by the manifest: a prefix has no date, and half a checkpoint is none."""

    def __init__(self, path: str, options: Options) -> None:
        self._filesystem = url_to_fs(path, **options)[0]
        self._options = options

    def exists(self, path: Any) -> bool:
        return is_checkpoint(str(path), self._options)

    def modified(self, path: Any) -> Any:
        return self._filesystem.modified(join(checkpoint_path(str(path)), MANIFEST))
