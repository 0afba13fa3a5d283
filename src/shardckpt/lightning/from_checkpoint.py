"""``MyModel.load_from_checkpoint(path)`` on a sharded path, for modules and datamodules.

Lightning reads the file with a function that its ``core.saving`` module calls ``pl_load``. That name is bound to ours
here, which hands everything but a sharded checkpoint, and a directory of Lightning's own, on to it. Hyper-parameters,
``hparams_file``, overrides, ``strict`` and the hooks stay Lightning's code.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardckpt.checkpointer import Checkpointer
from shardckpt.commit import checkpoint_path
from shardckpt.errors import ShardckptError
from shardckpt.lightning import flavours, ordinary, restore
from shardckpt.lightning.living import living


def install() -> None:
    """Do it for each flavour that is imported. Calling again is fine, and needed when the other is imported later."""
    for flavour in flavours.loaded():
        flavours.wrap(flavour.module("core.saving"), "pl_load", _dispatching)


def _dispatching(stock: Callable[..., Any]) -> Callable[..., Any]:
    def pl_load(path_or_url: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        _settle()
        if _is_sharded(path_or_url):
            return _load(checkpoint_path(path_or_url), map_location, weights_only)
        if isinstance(path_or_url, (str, Path)) and ordinary.is_directory(str(path_or_url)):
            return ordinary.load(str(path_or_url), map_location, weights_only)
        return stock(path_or_url, map_location=map_location, weights_only=weights_only)

    return pl_load


def _settle() -> None:
    """Wait for what Trainers of this process are still writing: a hook may ask for what was saved a moment ago."""
    for plugin in list(living):
        plugin.settle()


def _is_sharded(path: Any) -> bool:
    if not isinstance(path, (str, Path)) or str(path).startswith("http"):
        return False
    try:
        return ordinary.is_ours(os.fspath(path), None)
    except ShardckptError:  # what is wrong with the path is for Lightning to say, which is asked next
        return False


def _load(path: str, map_location: Any, weights_only: bool | None) -> dict[str, Any]:
    opened = Checkpointer(alone=True).open(path)
    return restore.Reading(opened, map_location, weights_only).for_inference()
