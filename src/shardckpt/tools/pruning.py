"""Removing what dead saves have left behind, below a directory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardckpt import commit, filenames, options
from shardckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from shardckpt.filenames import MANIFEST
from shardckpt.options import Path
from shardckpt.storage import Storage, Uploads, is_temporary, join, local_path, open_storage
from shardckpt.tools.opened import is_foreign


@dataclass(frozen=True)
class Pruned:
    """What `prune` did, by place."""

    removed: dict[str, list[str]]
    """Names of files, and of uploads that were never finished."""
    skipped: dict[str, str]
    """Places whose manifest is damaged, so that nobody can tell which files are rubbish, and what is wrong with it."""


def prune(path: Path, *, dry_run: bool = False, storage_options: Mapping[str, Any] | None = None) -> Pruned:
    """Remove what saves that died left at ``path`` and directly below it.

    Checkpoints stay, and so do the files of saves that run and whatever is not ours; links are not followed.
    ``dry_run`` removes nothing. Raises CheckpointNotFoundError where nothing is at ``path``, and StorageError.
    """
    text = commit.checkpoint_path(options.path_text(path))
    told = options.mapping("storage_options", storage_options)
    root = open_storage(text, told)
    children = root.children()
    if not children and not root.list() and not isinstance(root, Uploads):
        raise CheckpointNotFoundError(f"there is nothing to prune at {text}: it is empty or does not exist.")
    found = Pruned({}, {})
    for place in (text, *(child for name in children if not _is_link(child := join(text, name)))):
        storage = open_storage(place, told)
        # A directory without anything of ours is somebody else's, though it be empty.
        if not _is_ours(storage):
            continue
        try:
            names = commit.prune(storage, dry_run=dry_run)
        except CorruptCheckpointError as error:
            found.skipped[place] = str(error)
            continue
        if names:
            found.removed[place] = names
    return found


def _is_link(path: str) -> bool:
    local = local_path(path)
    return local is not None and os.path.islink(os.path.expanduser(local))


def _is_ours(storage: Storage) -> bool:
    ours = [name for name in (stat.name for stat in storage.list()) if _is_named_so(name)]
    if ours == [MANIFEST] and is_foreign(storage):
        return False
    return bool(ours) or isinstance(storage, Uploads)


def _is_named_so(name: str) -> bool:
    return filenames.is_checkpoint_file(name) or is_temporary(name)
