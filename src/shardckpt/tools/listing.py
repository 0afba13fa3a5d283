"""The checkpoints below a directory or prefix, and what is there that would be one and is not."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shardckpt import commit, filenames, options
from shardckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError
from shardckpt.filenames import MANIFEST
from shardckpt.manifest import Manifest
from shardckpt.options import Path
from shardckpt.storage import Stat, Storage, is_local, join, local_path, open_storage, split
from shardckpt.tools.opened import committed, is_foreign, objects_of, step_in, step_of
from shardckpt.workers import for_each

Status = Literal["complete", "saving", "unfinished", "incomplete", "damaged", "newer"]


@dataclass(frozen=True)
class Listed:
    """A checkpoint, or what a save has left of one."""

    path: str
    name: str
    status: Status
    """``complete``; ``saving``: a save is writing it now; ``unfinished``: a save that died left it; ``incomplete``:
    files are missing or have another size; ``damaged``: its manifest cannot be read; ``newer``: of a later format."""
    problem: str | None
    """Why it is not complete."""
    step: int | None
    """As the state says, else the name."""
    time: float | None
    """Unix time in seconds of its commit, else of the last write to it."""
    nbytes: int
    """Of the files of the checkpoint, without what else lies there."""
    world_size: int | None
    save_id: str | None


def ls(path: Path, *, storage_options: Mapping[str, Any] | None = None) -> list[Listed]:
    """The checkpoints directly below ``path``, newest first; if it is one, it alone. No shard is read.

    Raises CheckpointNotFoundError where there is no such directory; on an object store, where nothing is there.
    """
    text = commit.checkpoint_path(options.path_text(path))
    told = options.mapping("storage_options", storage_options)
    local = local_path(text)
    if local is not None and os.path.isfile(os.path.expanduser(local)):
        raise CheckpointNotFoundError(f"{text} is a file, and checkpoints are directories.")
    root = open_storage(text, told)
    itself = _look(text, root)
    if itself is not None:
        return [itself]
    names = root.children()
    if not names and not _exists(text, root):
        raise CheckpointNotFoundError(f"there is nothing at {text}.")
    found: list[Listed] = []

    def look(name: str) -> None:
        child = join(text, name)
        listed = _look(child, open_storage(child, told))
        if listed is not None:
            found.append(listed)

    for_each(names, look, threads=root.width, name="ls")
    return sorted(found, key=lambda listed: (-(listed.time or 0.0), listed.name))


def _exists(path: str, root: Storage) -> bool:
    if is_local(path):
        return os.path.isdir(os.path.expanduser(str(local_path(path))))
    return bool(root.list())


def _look(path: str, storage: Storage, *, again: bool = False) -> Listed | None:
    """What a place holds; None where nothing of ours is there. ``again``: what is lacking has been looked for twice."""
    stats = {stat.name: stat for stat in storage.list()}
    ours = [stat for name, stat in stats.items() if filenames.is_checkpoint_file(name)]
    if not ours or ([stat.name for stat in ours] == [MANIFEST] and is_foreign(storage)):
        return None
    name = split(path)[1]
    step = step_in(name)
    last = max((stat.modified for stat in ours if stat.modified is not None), default=None)
    nbytes = sum(stat.size for stat in ours)
    try:
        found = commit.find(storage)
    except CorruptCheckpointError as error:
        status: Status = "newer" if isinstance(error, UnsupportedFormatError) else "damaged"
        return Listed(path, name, status, str(error), step, last, nbytes, None, None)
    if found is None:
        running = bool(commit.running(storage))
        why = "a save is writing it" if running else f"no {MANIFEST}: its save was cut short"
        return Listed(path, name, "saving" if running else "unfinished", why, step, last, nbytes, None, None)
    manifest = found.manifest
    problem = _lacking(manifest, stats)
    if problem is not None and not again:
        return _look(path, storage, again=True)  # it may have been replaced between the listing and its record
    return Listed(
        path,
        name,
        "complete" if problem is None else "incomplete",
        problem,
        step_of(manifest, name),
        committed(manifest) or last,
        sum(stats[file].size for file in (MANIFEST, *manifest.file_names()) if file in stats),
        manifest.world_size,
        manifest.save_id,
    )


def _lacking(manifest: Manifest, stats: Mapping[str, Stat]) -> str | None:
    """What is missing of a checkpoint, as far as a listing shows it."""
    sizes = [(file.name, file.size) for file in manifest.files]
    sizes += [(file.manifest, file.manifest_size) for file in manifest.files]
    sizes += objects_of(manifest).items()
    there = [(stats[name], size) for name, size in sizes if name in stats]
    wrong = [f"{stat.name} has {stat.size} of {size} bytes" for stat, size in there if stat.size != size]
    missing = [f"{name} is missing" for name in manifest.file_names() if name not in stats]
    return _first_of([*missing, *wrong])


def _first_of(problems: Sequence[str]) -> str | None:
    if not problems:
        return None
    return problems[0] if len(problems) == 1 else f"{problems[0]}, and {len(problems) - 1} more"


def age(listed: Listed) -> float | None:
    """Seconds since then, by this machine's clock; None where nobody knows."""
    return None if listed.time is None else max(0.0, time.time() - listed.time)
