"""Finding: where a checkpoint is, and what lies there instead of one."""

import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from shardckpt import filenames
from shardckpt import manifest as mf
from shardckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ObjectNotFoundError,
    ShardckptError,
    StorageError,
)
from shardckpt.filenames import MANIFEST
from shardckpt.manifest import Manifest
from shardckpt.storage import Storage, is_local, join, local_path, open_storage, split

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """The commit record at a path: parsed, and as its bytes, so that all ranks may read the same."""

    manifest: Manifest
    data: bytes


def checkpoint_path(path: str | os.PathLike[str]) -> str:
    """A checkpoint's path as text; that of its ``manifest.json`` is taken for the checkpoint's own."""
    text = os.fspath(path)
    parent, name = split(text) if text else (text, "")
    return parent if name == MANIFEST else text


def find_bytes(storage: Storage) -> bytes | None:
    """The commit record of a place as it stands there, sound or not; None where there is none."""
    try:
        return storage.get(MANIFEST)
    except ObjectNotFoundError:
        return None


def find(storage: Storage) -> Found | None:
    """The commit record of a place, or None where there is none. Raises CorruptCheckpointError if it is damaged."""
    data = find_bytes(storage)
    return None if data is None else parsed(storage, data)


def read(path: str, storage: Storage, storage_options: Mapping[str, Any] | None) -> Found:
    """The commit record at ``path``. Raises as `find` and `read_bytes` do."""
    return parsed(storage, read_bytes(path, storage, storage_options))


def parsed(storage: Storage, data: bytes) -> Found:
    return Found(mf.decode_manifest(data, f"{storage.url}/{MANIFEST}"), data)


def read_bytes(path: str, storage: Storage, storage_options: Mapping[str, Any] | None) -> bytes:
    """The commit record at ``path`` as it stands there, sound or not.

    Raises CheckpointNotFoundError that says what is there instead, and which complete checkpoint lies beside it.
    """
    if _is_file(path):
        raise CheckpointNotFoundError(
            f"{path} is a file, not a sharded checkpoint. A file that torch.save wrote is read with torch.load."
            + _beside(path, storage_options)
        )
    data = find_bytes(storage)
    if data is None:
        raise CheckpointNotFoundError(_why_not(path, storage) + _beside(path, storage_options))
    return data


def _is_file(path: str) -> bool:
    directory = local_path(path)
    # Unlike pathlib's, this takes a path that cannot be for one where nothing is.
    return directory is not None and os.path.isfile(os.path.expanduser(directory))


def _why_not(path: str, storage: Storage) -> str:
    files = [stat.name for stat in storage.list()]
    if not files and not storage.children():
        return f"there is no checkpoint at {path}: nothing is there."
    if any(filenames.is_checkpoint_file(name) for name in files):
        return (
            f"there is no complete checkpoint at {path}: it has shards but no {MANIFEST}, so its save was cut short or "
            "is still running."
        )
    return f"there is no checkpoint at {path}: it has no {MANIFEST}."


def _beside(path: str, storage_options: Mapping[str, Any] | None) -> str:
    for where, root in (("in", path), ("beside", split(path)[0])):
        try:
            newest = latest(root, storage_options)
        except ShardckptError:  # the hint is a courtesy; the error itself is what matters
            continue
        if newest is not None:
            return f" The newest complete checkpoint {where} it is {newest}."
    return ""


def latest(root: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> str | None:
    """The path of the newest complete checkpoint directly below ``root``, by the time its save was begun; or None."""
    storage = open_storage(root, storage_options)
    newest: tuple[str, str] | None = None
    for name in storage.children():
        child = join(root, name)
        try:
            found = find(open_storage(child, storage_options))
        except CorruptCheckpointError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
            continue
        if found is not None and (newest is None or found.manifest.save_id > newest[0]):
            newest = (found.manifest.save_id, child)
    return None if newest is None else newest[1]


def is_checkpoint(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether a complete checkpoint lies at ``path``; a damaged manifest counts, since loading says what is wrong."""
    try:
        return open_storage(checkpoint_path(path), storage_options).size(MANIFEST) >= 0
    except (ObjectNotFoundError, CorruptCheckpointError):  # nothing is there, or a directory of that name
        return False
    except StorageError:
        if is_local(path):  # a path through a file, or one that may not be read, is no checkpoint
            return False
        raise
