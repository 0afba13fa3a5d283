"""Publishing: from the first sign of a save in its place to the commit record that makes it a checkpoint."""

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

import msgspec

from shardckpt import filenames
from shardckpt import manifest as mf
from shardckpt.codecs import digest, digests_text
from shardckpt.commit.assembly import layout_of
from shardckpt.commit.clearing import check_lease, end_lease, take_lease
from shardckpt.commit.finding import Found, find_bytes
from shardckpt.commit.visibility import awaited
from shardckpt.errors import (
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    SaveFailedError,
    ShardckptError,
    StorageFullError,
    UncertainCommitError,
)
from shardckpt.filenames import MANIFEST
from shardckpt.manifest import FileEntry, Manifest, RankManifest
from shardckpt.state.schema import check_skeleton
from shardckpt.storage import Storage
from shardckpt.workers import for_each

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


def open_place(
    storage: Storage, save_id: str, nbytes: int, *, shares: str | None = None, alone: bool = False
) -> bytes | None:
    """Rank 0, before the first byte: make the place ready and leave a marker there; returns the record to be replaced.

    The marker makes the path exist at once, which callers that look right after saving rely on. Raises StorageFullError
    where the disk cannot hold ``nbytes`` more; an error leaves nothing behind. ``shares`` is the id of another save
    whose shards will be linked here. ``alone``: raise ObjectExistsError where the same save is being written there.
    """
    free = storage.free_bytes()
    if free is not None and free < nbytes:
        raise StorageFullError(
            f"{storage.url} has {free:,} bytes free and this checkpoint needs {nbytes:,}. Nothing was written; free "
            "some space, or save elsewhere."
        )
    storage.unlink_link()
    previous = None
    is_marked = False

    def look() -> None:
        nonlocal previous
        previous = find_bytes(storage)

    def mark() -> None:
        nonlocal is_marked
        take_lease(storage, save_id, shares, alone=alone)
        is_marked = True

    steps: list[Callable[[], None]] = [storage.prepare, look, mark]
    try:
        # Each costs a round trip for which training waits; but a directory must be there before anything in it.
        if storage.has_places:
            for step in steps:
                step()
        else:
            for_each(steps, _call, threads=len(steps), name="open")
    except BaseException:
        with suppress(ShardckptError):
            if is_marked:
                end_lease(storage, save_id)
                storage.delete([filenames.marker_name(save_id)])
            storage.remove_place()
        raise
    return previous


def _call(step: Callable[[], None]) -> None:
    step()


class Written(msgspec.Struct, array_like=True):
    """What a rank tells rank 0 once all of its bytes are durable."""

    file: FileEntry
    layout: str
    """See `layout_of`."""
    speaks: bool
    """Whether the rank's manifest says more than where its tensors lie, so that it has to be parsed."""


def put_rank_manifest(storage: Storage, manifest: RankManifest) -> Written:
    """Make one rank's word durable; returns what rank 0 has to know of it."""
    data = mf.encode(manifest)
    name = filenames.rank_manifest_name(manifest.rank, manifest.save_id)
    storage.put(name, data, replace=False)
    file = FileEntry(manifest.file, manifest.size, name, len(data), digests_text([digest(data)]))
    speaks = manifest.state is not None or manifest.per_rank is not None or bool(manifest.objects)
    return Written(file, layout_of(manifest), speaks)


def read_back(storage: Storage, file: FileEntry) -> bytes:
    """One rank's manifest as it lies in the place, held against what the rank said it wrote."""
    try:
        data = awaited(storage, partial(storage.get, file.manifest))
    except ObjectNotFoundError as error:
        raise SaveFailedError(
            f"{file.manifest} was written by its rank but cannot be seen by rank 0 at {storage.url}. All ranks must"
            " save to one shared file system or object store; a node's own disk is not one."
        ) from error
    if len(data) != file.manifest_size or digests_text([digest(data)]) != file.manifest_digest:
        raise CorruptCheckpointError(f"{storage.url}/{file.manifest} does not hold what its rank wrote there.")
    return data


def encoded(manifest: Manifest) -> Found:
    """A commit record with the bytes that it has on the disk."""
    return Found(manifest, mf.encode(manifest))


def publish(storage: Storage, record: Found, previous: bytes | None) -> None:
    """The switch: after this the checkpoint exists, before it did not.

    Raises SaveFailedError if the place does not hold the record that it held when the save began, since somebody else
    saved there, and if the save was taken for dead. Raises UncertainCommitError if the storage fails in a way that
    leaves open whether it took the record; the files that it names must then stay.
    """
    check_skeleton(record.manifest, f"{storage.url}/{MANIFEST}")
    publish_record(storage, record, previous)


def publish_record(storage: Storage, record: Found, previous: bytes | None) -> None:
    """`publish` a commit record as it was written elsewhere."""
    data = record.data
    storage.sync()
    check_lease(storage, record.manifest.save_id)
    try:
        storage.put(MANIFEST, data, replace=False if previous is None else previous)
    except Exception as error:
        try:
            current = find_bytes(storage)
        except ShardckptError:
            raise UncertainCommitError(
                f"{storage.url} did not answer when the checkpoint was to be committed ({error}), and cannot be asked "
                "whether it was. Nothing was removed: what is at that path, the new checkpoint or what was there "
                "before, is whole."
            ) from error
        if current == data:
            _settle(storage, error)
            return
        if current != previous:
            raise _overtaken(storage) from error
        raise


def _settle(storage: Storage, error: Exception) -> None:
    """The record is there although putting it raised ``error``; raises UncertainCommitError where it may not last."""
    if not storage.has_places:  # a lost answer to a put that succeeded is a success
        return
    if isinstance(error, ObjectExistsError):  # NFS lost the answer and asked again; nothing was synced yet
        with suppress(ShardckptError):
            storage.sync()
            return
    # After an fsync that failed, one that succeeds would prove nothing.
    raise UncertainCommitError(
        f"the commit record is in {storage.url}, but may be lost if the machine fails now: {error}. Nothing was"
        " removed. Look after the disk, then load that checkpoint, or save again elsewhere."
    ) from error


def check_unchanged(storage: Storage, previous: bytes | None) -> None:
    """Raise SaveFailedError if somebody has committed to the place, or removed its checkpoint, since a save began."""
    if find_bytes(storage) != previous:
        raise _overtaken(storage)


def _overtaken(storage: Storage) -> SaveFailedError:
    return SaveFailedError(
        f"another save was committed to {storage.url}, or its checkpoint removed, while this save was running; that "
        "stands. Two jobs must not save to one path."
    )
