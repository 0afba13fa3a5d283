"""A checkpoint whose manifest has been read by this process alone, for looking at it."""

import datetime
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from shardckpt import commit, coordinator, options
from shardckpt.errors import ShardckptError
from shardckpt.filenames import MANIFEST
from shardckpt.manifest import FORMAT, Manifest
from shardckpt.options import Path
from shardckpt.state import values
from shardckpt.storage import Storage

Progress = Callable[[int, int], None]
"""Hears of bytes done, and of all bytes."""
_FOREIGN_BYTES: Final = 1 << 20
"""Bytes of a ``manifest.json`` past which nobody but us writes one."""
_STEP: Final = re.compile(r"step[=_-]?(\d{1,18})", re.ASCII | re.IGNORECASE)


def unheard(_done: int, _total: int) -> None:
    """The progress that nobody watches."""


class Opened(NamedTuple):
    """Where it lies, and what its commit record says."""

    path: str
    storage: Storage
    manifest: Manifest


def open_checkpoint(path: Path, storage_options: Mapping[str, Any] | None) -> Opened:
    """Read the commit record at ``path``, and doubt all of it.

    Raises CheckpointNotFoundError that says what is there instead, CorruptCheckpointError, UnsupportedFormatError,
    StorageError and its kinds.
    """
    options.path_text(path)
    told = options.mapping("storage_options", storage_options)
    return Opened(*commit.read_for_all(path, told, coordinator.begin_alone()))


def step_of(manifest: Manifest, name: str) -> int | None:
    """The training step of a checkpoint: as its state says at its top level, where people write it, else its name."""
    top = {key: node for key, node in values.pairs_of(manifest.state) or [] if isinstance(key, str)}
    found = (top.get(key) for key in ("global_step", "step"))
    return next((step for step in found if type(step) is int), step_in(name))


def step_in(name: str) -> int | None:
    """The step that the name of a checkpoint tells, as "step=2000.ckpt" does."""
    found = _STEP.search(name)
    return int(found[1]) if found else None


def objects_of(manifest: Manifest) -> dict[str, int]:
    """The files of pickled objects, and the size of each in bytes."""
    objects: dict[str, int] = {}
    for entry in manifest.objects.values():
        objects[entry.file] = max(objects.get(entry.file, 0), entry.offset + entry.nbytes)
    return objects


def nbytes_of(manifest: Manifest) -> int:
    """Bytes of all files that a checkpoint names: shards, the manifests of ranks, pickled objects; not its own."""
    return sum(file.size + file.manifest_size for file in manifest.files) + sum(objects_of(manifest).values())


def is_foreign(storage: Storage) -> bool:
    """Whether the ``manifest.json`` of a place is somebody else's: JSON, as web pages have it, of another format."""
    try:
        said = msgspec.json.decode(storage.get(MANIFEST, limit=_FOREIGN_BYTES))
    except (ShardckptError, msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return not isinstance(said, dict) or said.get("format") != FORMAT


def committed(manifest: Manifest) -> float | None:
    """Unix time in seconds of the commit, as the manifest says it; None where that is no time."""
    try:
        return datetime.datetime.fromisoformat(manifest.created).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def begun(manifest: Manifest) -> float | None:
    """Unix time in seconds at which the save began, by its id; None where that is none of ours."""
    try:
        found = int(manifest.save_id[:9], 36) / 1000
    except ValueError:
        return None
    end = committed(manifest)
    # Ids of other writers, and clocks that were set in between, must not look like a time.
    return found if len(manifest.save_id) == 15 and end is not None and 0 <= end - found < 7 * 86400 else None
