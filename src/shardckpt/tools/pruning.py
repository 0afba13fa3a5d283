"""Removing what dead saves have left behind, below a directory."""

from collections.abc import Mapping
from typing import Any

from shardckpt import commit, filenames, options
from shardckpt.errors import CheckpointNotFoundError
from shardckpt.options import Path
from shardckpt.storage import Storage, Uploads, is_temporary, join, open_storage


def prune(
    path: Path, *, dry_run: bool = False, storage_options: Mapping[str, Any] | None = None
) -> dict[str, list[str]]:
    """Remove what saves that died left at ``path`` and directly below it: names of files, by place.

    Checkpoints stay, and so do the files of saves that run and whatever is not ours. ``dry_run`` removes nothing.
    Raises CheckpointNotFoundError where nothing is at ``path``, StorageError, and CorruptCheckpointError for a place
    whose manifest is damaged: which of its files are rubbish cannot be told. Places before it have been pruned then.
    """
    text = commit.checkpoint_path(options.path_text(path))
    told = options.mapping("storage_options", storage_options)
    root = open_storage(text, told)
    children = root.children()
    if not children and not root.list() and not isinstance(root, Uploads):
        raise CheckpointNotFoundError(f"there is nothing to prune at {text}: it is empty or does not exist.")
    found = {}
    for place in (text, *(join(text, name) for name in children)):
        storage = open_storage(place, told)
        # A directory without anything of ours is somebody else's, though it be empty.
        names = commit.prune(storage, dry_run=dry_run) if _is_ours(storage) else []
        if names:
            found[place] = names
    return found


def _is_ours(storage: Storage) -> bool:
    names = [stat.name for stat in storage.list()]
    return any(filenames.is_checkpoint_file(name) or is_temporary(name) for name in names) or isinstance(
        storage, Uploads
    )
