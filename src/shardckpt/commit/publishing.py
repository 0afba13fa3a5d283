"""Publishing: from the first sign of a save in its place to the commit record that makes it a checkpoint."""

import datetime
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import msgspec
import torch

from shardckpt import filenames
from shardckpt import manifest as mf
from shardckpt.codecs import digest, digests_text
from shardckpt.commit.clearing import end_lease, take_lease
from shardckpt.commit.finding import find_bytes
from shardckpt.errors import (
    ConflictingStateError,
    CorruptCheckpointError,
    ObjectNotFoundError,
    SaveFailedError,
    ShardckptError,
    StorageFullError,
    UncertainCommitError,
)
from shardckpt.filenames import MANIFEST
from shardckpt.garbage import held_off
from shardckpt.manifest import FileEntry, Manifest, RankManifest, RankValues, TensorEntry, TensorHead
from shardckpt.state import merge
from shardckpt.state.schema import check_skeleton
from shardckpt.state.skeleton import per_rank_places
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


def open_place(storage: Storage, save_id: str, nbytes: int, *, shares: str | None = None) -> bytes | None:
    """Rank 0, before the first byte: make the place ready and leave a marker there; returns the record to be replaced.

    The marker makes the path exist at once, which callers that look right after saving rely on. Raises StorageFullError
    where the disk cannot hold ``nbytes`` more; an error leaves nothing behind. ``shares`` is the id of another save
    whose shards will be linked here.
    """
    free = storage.free_bytes()
    if free is not None and free < nbytes:
        raise StorageFullError(
            f"{storage.url} has {free:,} bytes free and this checkpoint needs {nbytes:,}. Nothing was written; free "
            "some space, or save elsewhere."
        )
    storage.unlink_link()
    previous = None

    def look() -> None:
        nonlocal previous
        previous = find_bytes(storage)

    steps: list[Callable[[], None]] = [storage.prepare, look, partial(take_lease, storage, save_id, shares)]
    try:
        # Each costs a round trip for which training waits; but a directory must be there before anything in it.
        if storage.has_places:
            for step in steps:
                step()
        else:
            for_each(steps, _call, threads=len(steps), name="open")
    except BaseException:
        end_lease(save_id)
        with suppress(ShardckptError):
            if not storage.has_places:
                storage.delete([filenames.marker_name(save_id)])
            storage.remove_place()
        raise
    return previous


def _call(step: Callable[[], None]) -> None:
    step()


def put_rank_manifest(storage: Storage, manifest: RankManifest) -> FileEntry:
    """Make one rank's word durable; returns how the commit record refers to it."""
    data = mf.encode(manifest)
    name = filenames.rank_manifest_name(manifest.rank, manifest.save_id)
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
    # These are the bytes that the rank encoded, by the digest that it told.
    return mf.decode_rank_manifest(data, f"{storage.url}/{entry.manifest}", doubted=False)


@held_off()
def assemble(
    save_id: str,
    files: Sequence[FileEntry],
    ranks: Sequence[RankManifest],
    heads: Mapping[str, TensorHead],
    aliases: Mapping[str, str],
) -> Manifest:
    """The commit record of what the ranks wrote; ``heads`` lists every tensor, also those without elements."""
    tensors = {fqn: _without_shards(head) for fqn, head in heads.items()}
    aliases = dict(aliases)
    for index, rank in enumerate(ranks):
        if rank.per_rank is not None:
            _add_own(index, rank.per_rank, tensors, aliases)
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
    return with_values(
        Manifest(
            save_id=save_id,
            created=now(),
            world_size=len(ranks),
            writer=writer_versions(),
            files=list(files),
            state=skeleton,
            tensors=tensors,
            aliases=aliases,
            objects=objects,
        ),
        [rank.per_rank for rank in ranks],
    )


def with_values(manifest: Manifest, ranks: Sequence[RankValues | None]) -> Manifest:
    """``manifest`` with what each rank saved at the places that differ by rank.

    Raises ConflictingStateError where a place is none on the rank whose word counts for it.
    """
    per_rank: dict[str, dict[int, Any]] = {}
    objects = dict(manifest.objects)
    for rank, values in enumerate(ranks):
        if values is not None:
            _check_free(rank, values.objects, manifest.objects)
            objects.update(values.objects)
            for place, node in values.nodes.items():
                per_rank.setdefault(place, {})[rank] = node
    if per_rank:
        found = set(per_rank_places(manifest.state))
        for place, nodes in per_rank.items():
            if place not in found:
                raise ConflictingStateError(
                    f"{place!r} is a PerRank on rank {min(nodes)}, but another value on a rank below it. Make it a"
                    " PerRank on all ranks, or leave it out where there is nothing to save."
                )
    requires = [name for name in manifest.requires if name != mf.PER_RANK] + ([mf.PER_RANK] if per_rank else [])
    return msgspec.structs.replace(manifest, per_rank=per_rank, objects=objects, requires=requires)


def _without_shards(head: TensorHead) -> TensorEntry:
    # Interned, since msgspec leaves out a default that is the very object, not one that is equal.
    return TensorEntry(head.dtype, head.shape, [], [], [], [], [], location=sys.intern(head.location))


def _add_own(rank: int, own: RankValues, tensors: dict[str, TensorEntry], aliases: dict[str, str]) -> None:
    for added in (own.tensors, own.aliases):
        _check_free(rank, added, tensors)
        _check_free(rank, added, aliases)
    tensors.update({fqn: _without_shards(head) for fqn, head in own.tensors.items()})
    aliases.update(own.aliases)


def _check_free(rank: int, added: Iterable[str], taken: Mapping[str, Any]) -> None:
    """Raise ConflictingStateError where a value of one rank has a name that another rank gave to something else."""
    for name in added:
        if name in taken:
            raise ConflictingStateError(
                f"{name!r} is the name of a value by rank of rank {rank}, and of another value on another rank; rename"
                " that one's key."
            )


def now() -> str:
    """The time of a commit, as the manifest says it: UTC, ISO 8601, milliseconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def writer_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("shardckpt")
    except PackageNotFoundError:  # used from a source tree that was never installed
        ours = "unknown"
    return {"shardckpt": ours, "torch": str(torch.__version__), "python": platform.python_version()}


def publish(storage: Storage, manifest: Manifest, previous: bytes | None) -> None:
    """The switch: after this the checkpoint exists, before it did not.

    Raises SaveFailedError if the place does not hold the record that it held when the save began: somebody else saved
    there. Raises UncertainCommitError if the storage fails in a way that leaves open whether it took the record; the
    files that it names must then stay.
    """
    check_skeleton(manifest, f"{storage.url}/{MANIFEST}")
    publish_record(storage, mf.encode(manifest), previous)


def publish_record(storage: Storage, data: bytes, previous: bytes | None) -> None:
    """`publish` a commit record as it was written elsewhere."""
    storage.sync()
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
        if current == data:  # a lost answer to a put that succeeded is a success
            return
        if current != previous:
            raise _overtaken(storage) from error
        raise


def check_unchanged(storage: Storage, previous: bytes | None) -> None:
    """Raise SaveFailedError if somebody has committed to the place, or removed its checkpoint, since a save began."""
    if find_bytes(storage) != previous:
        raise _overtaken(storage)


def _overtaken(storage: Storage) -> SaveFailedError:
    return SaveFailedError(
        f"another save was committed to {storage.url}, or its checkpoint removed, while this save was running; that "
        "stands. Two jobs must not save to one path."
    )
