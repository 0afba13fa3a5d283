"""Commit: what a checkpoint is called, how it becomes one, how it is found, and how it goes away.

A place holds a checkpoint from the moment ``manifest.json`` is there, and no longer once it is gone. Every other file
is named after the save that wrote it, so a save never touches what it replaces, and what a crash leaves behind names
itself.
"""

import datetime
import logging
import os
import platform
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from shardckpt import manifest as mf
from shardckpt.codecs import digest, digests_text
from shardckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ObjectNotFoundError,
    SaveFailedError,
    ShardckptError,
    StorageError,
    StorageFullError,
)
from shardckpt.manifest import MANIFEST, FileEntry, Manifest, RankManifest, TensorEntry
from shardckpt.state import merge
from shardckpt.storage import Storage, is_local, join, local_path, open_storage, split

log = logging.getLogger(__name__)

_STALE_SECONDS: Final = 24 * 3600.0
"""Age past which files of an uncommitted save are taken for a dead one's, and removed by the next save to the path."""

_ALPHABET: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


def new_save_id() -> str:
    """A name for one save: its time in milliseconds, then chance, in base 36; sorts by time."""
    return _base36(int(time.time() * 1000), 9) + _base36(secrets.randbits(30), 6)


def _base36(number: int, width: int) -> str:
    text = ""
    for _ in range(width):
        number, digit = divmod(number, 36)
        text = _ALPHABET[digit] + text
    return text


def _started(save_id: str) -> float:
    """Unix time in seconds at which a save began, from its id."""
    return int(save_id[:9], 36) / 1000


class TensorHead(NamedTuple):
    """What all shards of a tensor have in common."""

    dtype: str
    shape: tuple[int, ...]
    location: str


class Found(NamedTuple):
    """The commit record at a path: parsed, and as the bytes that an overwrite must still find there."""

    manifest: Manifest
    data: bytes


def checkpoint_path(path: str | os.PathLike[str]) -> str:
    """A checkpoint's path as text; that of its ``manifest.json`` is taken for the checkpoint's own."""
    text = os.fspath(path)
    parent, name = split(text) if text else (text, "")
    return parent if name == MANIFEST else text


def find(storage: Storage) -> Found | None:
    """The commit record of a place, or None where there is none. Raises CorruptCheckpointError if it is damaged."""
    try:
        data = storage.get(MANIFEST)
    except ObjectNotFoundError:
        return None
    return Found(mf.decode_manifest(data, f"{storage.url}/{MANIFEST}"), data)


def read(path: str, storage: Storage, storage_options: Mapping[str, Any] | None) -> Found:
    """The commit record at ``path``.

    Raises CheckpointNotFoundError that says what is there instead, and which complete checkpoint lies beside it.
    """
    found = find(storage)
    if found is not None:
        return found
    raise CheckpointNotFoundError(_why_not(path, storage) + _beside(path, storage_options))


def _why_not(path: str, storage: Storage) -> str:
    directory = local_path(path)
    if directory is not None and Path(directory).expanduser().is_file():
        return f"{path} is a file, not a sharded checkpoint. A file that torch.save wrote is read with torch.load."
    files = [stat.name for stat in storage.list()]
    if not files and not storage.children():
        return f"there is no checkpoint at {path}: nothing is there."
    if any(mf.is_checkpoint_file(name) for name in files):
        return (
            f"there is no complete checkpoint at {path}: it has shards but no {MANIFEST}, so its save was cut short or"
            " is still running."
        )
    return f"there is no checkpoint at {path}: it has no {MANIFEST}."


def _beside(path: str, storage_options: Mapping[str, Any] | None) -> str:
    try:
        newest = latest(split(path)[0], storage_options)
    except ShardckptError:  # the hint is a courtesy; the error itself is what matters
        return ""
    return "" if newest is None else f" The newest complete checkpoint beside it is {newest}."


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
    except ObjectNotFoundError:
        return False
    except StorageError:
        if is_local(path):  # a path through a file, or one that may not be read, is no checkpoint
            return False
        raise


# -- saving ---------------------------------------------------------------------------------------------------------


def open_place(storage: Storage, save_id: str, nbytes: int) -> Found | None:
    """Rank 0, before the first byte: make the place ready and leave a marker there; returns what it will replace.

    The marker makes the path exist at once, which callers that look right after saving rely on, and names the save to
    whoever finds its remains. Raises StorageFullError where the disk cannot hold ``nbytes`` more.
    """
    storage.unlink_link()
    storage.prepare()
    free = storage.free_bytes()
    if free is not None and free < nbytes:
        raise StorageFullError(
            f"{storage.url} has {free:,} bytes free and this checkpoint needs {nbytes:,}. Nothing was written; free"
            " some space, or save elsewhere."
        )
    try:
        previous = find(storage)
    except CorruptCheckpointError as error:
        log.warning("overwriting a damaged checkpoint: %s", error)
        previous = None
    marker = f'{{"save_id": "{save_id}", "host": "{platform.node()}", "pid": {os.getpid()}}}\n'
    storage.put(marker_name(save_id), marker.encode(), replace=True)
    return previous


def marker_name(save_id: str) -> str:
    return f"saving-{save_id}.json"


def put_rank_manifest(storage: Storage, manifest: RankManifest) -> FileEntry:
    """Make one rank's word durable; returns how the commit record refers to it."""
    data = mf.encode(manifest)
    name = mf.rank_manifest_name(manifest.rank, manifest.save_id)
    storage.put(name, data, replace=False)
    return FileEntry(manifest.file, manifest.size, name, len(data), digests_text([digest(data)]))


def get_rank_manifest(storage: Storage, entry: FileEntry) -> RankManifest:
    """Read one rank's word back, and hold it against what the rank said it wrote."""
    try:
        data = storage.get(entry.manifest)
    except ObjectNotFoundError as error:
        raise SaveFailedError(
            f"{entry.manifest} was written by its rank but cannot be seen by rank 0 at {storage.url}. All ranks must"
            " save to one shared file system or object store; a node's own disk is not one."
        ) from error
    if len(data) != entry.manifest_size or digests_text([digest(data)]) != entry.manifest_digest:
        raise CorruptCheckpointError(f"{storage.url}/{entry.manifest} does not hold what its rank wrote there.")
    return mf.decode_rank_manifest(data, f"{storage.url}/{entry.manifest}")


def assemble(
    save_id: str,
    files: Sequence[FileEntry],
    ranks: Sequence[RankManifest],
    heads: Mapping[str, TensorHead],
    aliases: Mapping[str, str],
) -> Manifest:
    """The commit record of what the ranks wrote; ``heads`` lists every tensor, also those without elements."""
    tensors = {
        fqn: TensorEntry(head.dtype, head.shape, [], [], [], [], [], location=head.location)
        for fqn, head in heads.items()
    }
    skeleton = None
    objects = {}
    for index, rank in enumerate(ranks):
        for entry in rank.entries.values():
            tensor = tensors[entry.fqn]
            tensor.file.append(index)
            tensor.offset.append(entry.offset)
            tensor.nbytes.append(entry.nbytes)
            tensor.starts.append(entry.starts)
            tensor.lengths.append(entry.lengths)
            tensor.codec = entry.codec
        if rank.state is not None:
            skeleton = rank.state if skeleton is None else merge(skeleton, rank.state)
        objects.update({path: entry for path, entry in rank.objects.items() if path not in objects})
    return Manifest(
        save_id=save_id,
        created=now(),
        world_size=len(ranks),
        writer=writer_versions(),
        files=list(files),
        state=skeleton,
        tensors=tensors,
        aliases=dict(aliases),
        objects=objects,
    )


def now() -> str:
    """The time of a commit, as the manifest says it: UTC, ISO 8601, milliseconds."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


def writer_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"shardckpt": version("shardckpt"), "torch": str(torch.__version__), "python": platform.python_version()}


def publish(storage: Storage, manifest: Manifest, previous: Found | None) -> None:
    """The switch: after this the checkpoint exists, before it did not.

    Raises SaveFailedError if the place does not hold what it held when the save began: somebody else saved there.
    """
    storage.sync()
    current = find_bytes(storage)
    if current != (previous.data if previous is not None else None):
        raise SaveFailedError(
            f"another save was committed to {storage.url} while this one was running; that one stands. Two jobs must"
            " not save to one path."
        )
    data = mf.encode(manifest)
    try:
        storage.put(MANIFEST, data, replace=previous is not None)
    except StorageError:
        if find_bytes(storage) != data:  # a lost answer to a put that succeeded is a success
            raise


def find_bytes(storage: Storage) -> bytes | None:
    try:
        return storage.get(MANIFEST)
    except ObjectNotFoundError:
        return None


def clean(storage: Storage, committed: Manifest) -> None:
    """After a commit: remove what the checkpoint replaced, this save's marker, and what dead saves left long ago."""
    keep = {MANIFEST, *committed.file_names()}
    try:
        storage.delete(
            [stat.name for stat in storage.list() if stat.name not in keep and _is_dead(stat.name, committed.save_id)]
        )
    except StorageError as error:
        log.warning(
            "the checkpoint at %s is committed, but what it replaced could not be removed: %s", storage.url, error
        )


def _is_dead(name: str, committed: str) -> bool:
    """Whether a file that the commit record does not name can go.

    A save that began before the committed one can never commit any more: it would find another manifest than it saw.
    One that began after may be alive, until it is too old to be.
    """
    save_id = mf.save_id_of(name)
    return save_id is not None and (save_id <= committed or time.time() - _started(save_id) > _STALE_SECONDS)


def abandon(storage: Storage, save_id: str, ranks: Sequence[int], also: Sequence[str] = ()) -> None:
    """After a failure: remove what these ranks wrote. A failure to do so is logged, since the save's own matters
    more.
    """
    names = [marker_name(save_id), *also] if 0 in ranks else []
    for rank in ranks:
        names += [mf.shard_name(rank, save_id), mf.rank_manifest_name(rank, save_id), mf.objects_name(rank, save_id)]
    try:
        storage.delete(names)
        storage.remove_place()
    except ShardckptError as error:
        log.warning("could not remove the remains of a failed save at %s: %s", storage.url, error)


def remove(storage: Storage) -> None:
    """Remove a checkpoint: the manifest first, so that no instant shows half of one; a link is unlinked, not
    followed.
    """
    if storage.unlink_link():
        return
    storage.delete([MANIFEST])
    storage.sync()
    storage.delete([stat.name for stat in storage.list() if mf.is_checkpoint_file(stat.name)])
    storage.remove_place()
