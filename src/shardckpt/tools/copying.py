"""Copying a checkpoint from one storage to another: verified on its way, committed there at once."""

import os
import threading
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from shardckpt import commit, filenames, options
from shardckpt.codecs import DIGEST_BLOCK, digest, digests_text
from shardckpt.errors import (
    ConflictingStateError,
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    ShardckptError,
    UncertainCommitError,
    UsageError,
)
from shardckpt.filenames import save_id_of
from shardckpt.manifest import FileEntry, ObjectEntry, RankManifest, decode_rank_manifest
from shardckpt.options import Path
from shardckpt.reader import read_bytes
from shardckpt.storage import BLOCK, Storage, is_temporary, join, local_path, open_storage, split
from shardckpt.tools.opened import Progress, nbytes_of, unheard
from shardckpt.workers import for_each

_RESTARTS: Final = 3
"""How often a copy begins at most, where the source is overwritten while it is read."""
_FILES: Final = 4
"""Files copied side by side."""
_PIECES: Final = 4
"""Pieces of each on their way at the same time: `BLOCK` bytes and at most two blocks under a digest."""
_HEADER_LIMIT: Final = 128 << 20
"""Bytes of a header past which no reader of safetensors opens a file: what a hostile one can make us allocate."""


@dataclass(frozen=True)
class CopyReport:
    """A checkpoint that was copied, or was there already."""

    source: str
    target: str
    save_id: str
    nbytes: int
    """That were copied; 0 where the target held this very save. Its shards were not read again then."""


def copy(
    source: Path,
    target: Path,
    *,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    target_storage_options: Mapping[str, Any] | None = None,
    progress: Progress = unheard,
) -> CopyReport:
    """Copy the checkpoint at ``source`` to ``target``; a target that ends in ``/`` gets it under its own name.

    Every byte is compared with its digest between reading and writing, and the manifest is written last: before that,
    ``target`` holds no checkpoint, or the one before. What fails removes what it wrote.

    ``overwrite`` is whether a checkpoint at ``target`` may be replaced, ``target_storage_options`` are by default those
    of the source.

    Raises UsageError where ``target`` holds another checkpoint that may not be replaced, or is the source; what opening
    and reading a checkpoint do; StorageError and its kinds; SaveFailedError where another save was there first.
    """
    place = commit.checkpoint_path(options.path_text(source))
    into = options.path_text(target)
    into = commit.checkpoint_path(join(into, split(place)[1]) if into.endswith("/") else into)
    told = options.mapping("storage_options", storage_options)
    told_target = told if target_storage_options is None else options.mapping("target_", target_storage_options)
    local = local_path(into)
    if local is not None and os.path.islink(local):
        raise UsageError(f"{into} is a symbolic link. Nothing was changed; copy to where it leads, or remove it first.")
    reading, writing = open_storage(place, told), open_storage(into, told_target)
    if (reading.url, told) == (writing.url, told_target):
        raise UsageError(f"{into} is what is to be copied, not a place to copy it to.")
    for attempt in range(_RESTARTS):
        found = commit.read(place, reading, told)
        try:
            return CopyReport(
                place, into, found.manifest.save_id, _copy(found, reading, into, writing, overwrite, progress)
            )
        except (CorruptCheckpointError, ObjectNotFoundError):
            # A training that overwrites its last.ckpt beside this has taken the files away.
            now = commit.find(reading)
            if attempt + 1 == _RESTARTS or now is None or now.manifest.save_id == found.manifest.save_id:
                raise
    raise AssertionError("the last attempt returns or raises")


def _copy(found: commit.Found, source: Storage, into: str, target: Storage, overwrite: bool, progress: Progress) -> int:
    """Copy what was found to ``target``, which the caller calls ``into``; returns the bytes copied."""
    held = commit.find_bytes(target)
    if held == found.data:
        return 0
    if held is None:
        _check_room(into, target)
    elif not overwrite:
        raise UsageError(f"{into} holds another checkpoint. Nothing was changed; overwrite (--overwrite) replaces it.")
    _Copy(source, found, target, progress).run(held)
    return nbytes_of(found.manifest) + len(found.data)


def _check_room(path: str, storage: Storage) -> None:
    """Raise UsageError where other things than the remains of a checkpoint lie."""
    names = [stat.name for stat in storage.list()]
    others = [name for name in names if not filenames.is_checkpoint_file(name) and not is_temporary(name)]
    if others := [*others, *storage.children()]:
        raise UsageError(
            f"{path} is a directory with {others[0]!r} in it. Nothing was changed; end it with / to copy into it."
        )


class _Cell(NamedTuple):
    """Bytes of a file under one digest."""

    start: int
    stop: int
    digest: str


class _Copy:
    """One copy, from the first byte to the commit."""

    def __init__(self, source: Storage, found: commit.Found, target: Storage, progress: Progress) -> None:
        self._source = source
        self._found = found
        self._manifest = found.manifest
        self._target = target
        self._names = found.manifest.file_names()
        self._total = nbytes_of(found.manifest)
        self._progress = progress
        self._is_damaged = False
        """Whether the target's commit record is."""
        self._done = 0
        self._lock = threading.Lock()

    def run(self, held: bytes | None) -> None:
        """Copy, and replace the commit record ``held``."""
        save_id = self._manifest.save_id
        self._check_free(held)
        # What a copy that died has left has the names of what is to come.
        with suppress(CorruptCheckpointError):  # a manifest that cannot be read, and is to be replaced
            commit.prune(self._target)
        if self._is_damaged:  # which that does not touch
            self._target.delete([filenames.marker_name(save_id)])
        shares = next((other for other in self._save_ids() if other != save_id), None)
        try:
            previous = commit.open_place(self._target, save_id, self._total, shares=shares, alone=True)
        except ObjectExistsError as error:
            raise self._is_running() from error
        try:
            # Before the first byte: what another copy of this save has committed has the names of what is to come.
            if previous != held:
                raise ConflictingStateError(f"{self._target.url} was changed by another save just now; copy again.")
            if self._is_damaged:
                self._target.delete(self._names)  # nobody can say whose they are, and it is to be replaced
            for_each(self._manifest.files, self._copy_shard, threads=_FILES, name="copy")
            objects: defaultdict[str, list[ObjectEntry]] = defaultdict(list)
            for entry in self._manifest.objects.values():
                objects[entry.file].append(entry)
            for name, entries in objects.items():
                self._copy_objects(name, entries)
            commit.publish_record(self._target, self._found, previous)
        except UncertainCommitError:  # what it names must stay
            commit.end_lease(self._target, save_id)
            raise
        except BaseException:
            # The marker last: until it is gone no other copy writes files of these names.
            commit.abandon(self._target, save_id, [], also=[*self._nobodys(), filenames.marker_name(save_id)])
            raise
        commit.clean(self._target, self._found)

    def _nobodys(self) -> list[str]:
        """The files to come less those of a checkpoint that is there: another copy may have won."""
        try:
            current = commit.find(self._target)
        except ShardckptError:  # then nobody can tell
            return []
        return [name for name in self._names if current is None or name not in current.manifest.file_names()]

    def _save_ids(self) -> set[str]:
        return {save_id for name in self._names if (save_id := save_id_of(name)) is not None}

    def _check_free(self, held: bytes | None) -> None:
        """Raise where files there, which must stay, have the names of those that are to come."""
        if held is not None:
            try:
                current = commit.find(self._target)
            except CorruptCheckpointError:
                current, self._is_damaged = None, True
            if current is not None and set(current.manifest.file_names()) & set(self._names):
                raise UsageError(f"{self._target.url} holds a checkpoint of the same shards; copy to another place.")
        if commit.running(self._target) & {self._manifest.save_id, *self._save_ids()}:
            raise self._is_running()

    def _is_running(self) -> ConflictingStateError:
        return ConflictingStateError(
            f"another copy of this checkpoint to {self._target.url} is running, or was until a moment ago; try again in"
            " three minutes."
        )

    def _copied(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._progress(min(self._done, self._total), self._total)

    def _copy_shard(self, file: FileEntry) -> None:
        where = f"{self._source.url}/{file.manifest}"
        data = read_bytes(self._source, file.manifest, 0, file.manifest_size, file.manifest_digest)
        size = self._source.size(file.name)
        if size != file.size:
            raise CorruptCheckpointError(
                f"{self._source.url}/{file.name} should have {file.size} bytes, and has {size}. Copy another."
            )
        manifest = decode_rank_manifest(data, where)
        if (manifest.file, manifest.size) != (file.name, file.size):
            raise CorruptCheckpointError(f"{where} describes another file than {file.name!r} of this checkpoint.")
        cells = sorted(_cells(manifest, where))
        ends = [cell.stop for cell in cells]
        if [cell.start for cell in cells] != [0, *ends[:-1]] or ends[-1] != size:
            raise CorruptCheckpointError(f"{where} has no digest for some bytes of {file.name!r}, or two.")
        writer = self._target.create(file.name, size)
        try:

            def copy_piece(start: int) -> None:
                stop = min(start + BLOCK, size)
                first, last = bisect_right(ends, start), bisect_left(ends, stop)
                piece = memoryview(self._verified(file.name, cells[first : last + 1]))
                at = cells[first].start
                writer.write(start, piece[start - at : stop - at])
                self._copied(stop - start)

            for_each(range(0, size, BLOCK), copy_piece, threads=_PIECES, name="copy")
            writer.commit()
        except BaseException:
            writer.abort()
            raise
        self._target.put(file.manifest, data, replace=False)
        self._copied(len(data))

    def _verified(self, name: str, cells: list[_Cell]) -> bytearray:
        """Adjacent cells of a file, read at once."""
        begin = cells[0].start
        data = bytearray(cells[-1].stop - begin)
        view = memoryview(data)
        self._source.read_into(name, begin, view)
        for start, stop, expected in cells:
            found = digests_text([digest(view[start - begin : stop - begin])])
            if found != expected:
                raise CorruptCheckpointError(
                    f"{self._source.url}/{name} is damaged: {stop - start} bytes at {start} have the digest {found},"
                    f" not {expected}. Nothing was committed at {self._target.url}; copy another checkpoint."
                )
        return data

    def _copy_objects(self, name: str, entries: list[ObjectEntry]) -> None:
        # All are read before memory is taken for their places: the file is as long as they say then.
        parts = [read_bytes(self._source, name, entry.offset, entry.nbytes, entry.digest) for entry in entries]
        data = bytearray(max(entry.offset + entry.nbytes for entry in entries))
        for entry, part in zip(entries, parts, strict=True):
            data[entry.offset : entry.offset + entry.nbytes] = part
        self._target.put(name, bytes(data), replace=False)
        self._copied(len(data))


def _cells(manifest: RankManifest, where: str) -> Iterator[_Cell]:
    """What of a shard is under which digest. Raises CorruptCheckpointError for what would take boundless memory."""
    if manifest.header_nbytes > _HEADER_LIMIT:
        raise CorruptCheckpointError(f"{where} has a header of {manifest.header_nbytes} bytes, which none can read.")
    yield _Cell(0, manifest.header_nbytes, manifest.header_digest)
    for key, entry in manifest.entries.items():
        whole, rest = divmod(entry.nbytes, DIGEST_BLOCK)
        sizes = [DIGEST_BLOCK] * whole + [rest] * bool(rest) if entry.frames is None else entry.frames
        if len(entry.digests) != 16 * len(sizes) or max(sizes, default=0) > BLOCK or min(sizes, default=1) < 1:
            raise CorruptCheckpointError(f"{where}: the blocks of {key!r} and their digests do not go together.")
        at = entry.offset
        for number, size in enumerate(sizes):
            yield _Cell(at, at + size, entry.digests[16 * number : 16 * number + 16])
            at += size
