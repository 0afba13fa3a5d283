"""Whether a checkpoint is what was written: every byte that it names, read in parallel and held against its digest."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from shardckpt import commit
from shardckpt.box import full_box
from shardckpt.codecs import itemsize_of
from shardckpt.errors import CorruptCheckpointError, TensorNotFoundError, UsageError
from shardckpt.filenames import MANIFEST, objects_name, save_id_of
from shardckpt.manifest import Manifest, ObjectEntry, RankWord
from shardckpt.options import Path
from shardckpt.planner import Wanted
from shardckpt.reader import ReadPlan
from shardckpt.reports import Fault, VerifyReport
from shardckpt.staging import StagingPool
from shardckpt.state import hint
from shardckpt.tools.checking import Checking, in_order
from shardckpt.tools.opened import Opened, Progress, open_checkpoint, unheard
from shardckpt.workers import for_each


def verify(
    path: Path,
    *,
    rank: int | None = None,
    tensor: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress = unheard,
) -> VerifyReport:
    """Read all that a checkpoint names, by this process alone, and report everything that is not what was written.

    Shards with their headers, the manifests of ranks, and pickled objects are held against their digests, compressed
    data is decompressed, plain values are held against what the ranks said. Nothing is unpickled, and no tensor is
    made: memory is 256 MiB of buffers and the manifests. ``rank`` checks only what that rank wrote, ``tensor`` only
    that tensor, by its name as for `read_tensor`. ``progress`` hears of bytes done and of all bytes.

    What is damaged is no error but in the report, and so are a codec and a dtype that are not known here. Raises
    CorruptCheckpointError where the commit record itself cannot be read, UsageError for a rank that there was none of,
    TensorNotFoundError, CheckpointNotFoundError, UnsupportedFormatError for a newer format, and StorageError and its
    kinds where the storage refuses; a disk that cannot read some bytes (EIO) is in the report too.
    """
    started = time.monotonic()
    opened = open_checkpoint(path, storage_options)
    pool = StagingPool()
    try:
        while True:
            report = _Verification(opened, rank, tensor, pool, progress).run(started)
            # Files that are gone since another save replaced the checkpoint are no fault of either.
            current = opened if report.ok else open_checkpoint(path, storage_options)
            if current.manifest.save_id == opened.manifest.save_id:
                return report
            opened = current
    finally:
        pool.close()


class _Verification:
    """One look at one save."""

    def __init__(
        self, opened: Opened, rank: int | None, tensor: str | None, pool: StagingPool, progress: Progress
    ) -> None:
        self._opened = opened
        self._manifest = opened.manifest
        self._whole = tensor is None
        self._names = _names(opened, rank, tensor)
        self._files = _files(opened, rank, self._names if tensor is not None else None)
        self._objects = _objects(self._manifest, rank) if tensor is None else {}
        self._plan = ReadPlan(self._manifest, opened.storage)
        self._checking = Checking(self._plan, pool, progress, self._total())

    def run(self, started: float) -> VerifyReport:
        checking, manifest = self._checking, self._manifest
        for name in self._names:
            try:
                entry = manifest.tensors[name]
                itemsize_of(entry.dtype)  # of a tensor without elements the plan doesn't ask
                self._plan.add([Wanted(name, full_box(entry.shape))])
            except CorruptCheckpointError as error:
                checking.note(Fault(f"cannot be used: {error}", MANIFEST, name))
        said: dict[int, RankWord] = {}
        for words in checking.groups(self._files, whole=self._whole):
            said |= {index: RankWord(word.state, word.objects, word.per_rank) for index, word in words.items()}
        is_said = self._whole and commit.has_words(manifest)
        for what in commit.contradictions(manifest, said) if is_said else ():
            checking.note(Fault(f"{what} wrote in the manifests beside it: is damaged", MANIFEST))
        for_each([*self._objects.items()], self._check_object, threads=self._opened.storage.width, name="verify")
        return VerifyReport(
            path=self._opened.path,
            save_id=manifest.save_id,
            world_size=manifest.world_size,
            faults=in_order(checking.faults),
            tensors=len(self._names),
            objects=len(self._objects),
            values_checked=is_said and said.keys() == set(self._files) and commit.suffice(manifest, said),
            bytes_read=checking.bytes_read,
            seconds=time.monotonic() - started,
        )

    def _check_object(self, item: tuple[str, ObjectEntry]) -> None:
        place, entry = item
        self._checking.stretch(Fault("is damaged", entry.file, None, place, entry.offset, entry.nbytes), entry.digest)

    def _total(self) -> int:
        files = [self._manifest.files[index] for index in self._files]
        total = sum(file.manifest_size for file in files)
        if self._whole:
            return total + sum(file.size for file in files) + sum(entry.nbytes for entry in self._objects.values())
        chosen = set(self._files)
        tensors = [self._manifest.tensors[name] for name in self._names]
        return total + sum(n for t in tensors for f, n in zip(t.file, t.nbytes, strict=True) if f in chosen)


def _names(opened: Opened, rank: int | None, tensor: str | None) -> list[str]:
    """The stored names of the tensors to check."""
    manifest = opened.manifest
    if tensor is None:
        return [name for name, entry in manifest.tensors.items() if rank is None or rank in entry.file]
    name = manifest.aliases.get(tensor, tensor)
    if name not in manifest.tensors:
        near = hint(tensor, [*manifest.tensors, *manifest.aliases])
        raise TensorNotFoundError(f"{opened.path} has no tensor {tensor!r}.{near}")
    return [name]


def _files(opened: Opened, rank: int | None, names: Sequence[str] | None) -> list[int]:
    """The files to check, by number: all, those with something of tensors, and of these only that of one rank."""
    manifest = opened.manifest
    if rank is not None and not (type(rank) is int and 0 <= rank < len(manifest.files)):
        raise UsageError(f"{opened.path} was saved by ranks 0 to {len(manifest.files) - 1}; there was no rank {rank!r}")
    chosen = range(len(manifest.files)) if names is None else {f for name in names for f in manifest.tensors[name].file}
    return sorted(index for index in chosen if rank in (None, index))


def _objects(manifest: Manifest, rank: int | None) -> dict[str, ObjectEntry]:
    """The pickled objects to check, by place: all, or those that one rank wrote."""
    return {
        place: entry
        for place, entry in manifest.objects.items()
        if rank is None or entry.file == objects_name(rank, save_id_of(entry.file) or "")
    }
