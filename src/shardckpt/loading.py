"""One load: the manifest, what it is restored into, and the order in which nothing is lost."""

import io
import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor

from shardckpt import commit, filenames
from shardckpt import manifest as mf
from shardckpt.box import full_box
from shardckpt.codecs import torch_dtype
from shardckpt.coordinator import Operation, begin_alone, turn
from shardckpt.errors import (
    CorruptCheckpointError,
    LoadFailedError,
    ObjectNotFoundError,
    ShardckptError,
    TensorNotFoundError,
    UnsafeLoadError,
)
from shardckpt.garbage import held_off
from shardckpt.indexing import Index, select
from shardckpt.manifest import Manifest
from shardckpt.options import Path, ShareReads
from shardckpt.planner import Wanted
from shardckpt.reader import ReadStats, Target, check_files, read_bytes, read_targets, read_together
from shardckpt.relocation import MapLocation, relocation
from shardckpt.reports import LoadReport
from shardckpt.staging import StagingPool
from shardckpt.state import (
    Differences,
    KeyMap,
    Match,
    Prefix,
    hint,
    meshes,
    meta_tensors,
    parameter_names,
    prefix_name,
    rename,
    subtree,
    together,
)
from shardckpt.state.names import check_root, iter_modules
from shardckpt.state.per_rank import Here, resize
from shardckpt.state.schema import check_skeleton
from shardckpt.storage import Storage, open_storage

log = logging.getLogger(__name__)


def read_manifest(
    path: Path, storage_options: Mapping[str, Any], operation: Operation
) -> tuple[str, Storage, Manifest]:
    """Read the manifest once, on rank 0, and hand it to all: every rank restores one save.

    Returns the path as text, the storage there, and the manifest.
    """
    with turn(operation, "manifest") as said:
        place = commit.checkpoint_path(path)
        storage = open_storage(place, storage_options)
        found = commit.read(place, storage, storage_options) if operation.rank == 0 else None
        if found is not None:
            said.word = found.data
    where = f"{storage.url}/{filenames.MANIFEST}"
    # Decoding, and doubting, 20,000 tensors takes a fifth of a second.
    manifest = mf.decode_manifest(said.heard[0], where) if found is None else found.manifest
    check_skeleton(manifest, where)
    return place, storage, manifest


class Matched(msgspec.Struct, array_like=True):
    """What each rank says once it has held its state against the manifest."""

    differences: Differences
    meshes: list[tuple[list[int], str]]


class OpenCheckpoint:
    """A checkpoint whose manifest has been read; its shards are read when something asks for them."""

    def __init__(
        self,
        path: str,
        manifest: Manifest,
        storage: Storage,
        *,
        pool: StagingPool,
        begin: Callable[[str], Operation],
        patience: float,
        share_reads: ShareReads,
    ) -> None:
        """``pool`` is the memory to read through; ``begin`` starts an operation of all ranks, for `restore`.

        ``patience`` is how many seconds longer one rank may read than another, and ``share_reads`` whether they read
        for each other.
        """
        self.path = path
        self.manifest = manifest
        self.storage = storage
        self._pool = pool
        self._begin = begin
        self._patience = patience
        self._share_reads = share_reads

    def keys(self) -> list[Any]:
        """The top-level keys of the state."""
        match = self._match({}, None, strict=False, convert_dtype=False)
        return list(match.items(self.manifest.state, "") or {})

    def materialise(
        self,
        prefix: Prefix = (),
        *,
        key_map: KeyMap | None = None,
        map_location: MapLocation = None,
        weights_only: bool | None = None,
    ) -> Any:
        """The value at a place of the state, made anew on this process alone.

        A module becomes a dict of its tensors, an optimizer torch's index-keyed state dict. Raises TensorNotFoundError,
        a KeyError, where the state has no such place.
        """
        match = self._match({}, map_location, strict=True, convert_dtype=False)
        value = match.new(self._part(prefix, key_map, None, strict=True), prefix_name(prefix))
        self._load_objects(match, map_location, weights_only)
        self._fill_new(match)
        return value()

    def restore(
        self,
        state: Any,
        *,
        prefix: Prefix = (),
        key_map: KeyMap | None = None,
        strict: bool = True,
        map_location: MapLocation = None,
        weights_only: bool | None = None,
        convert_dtype: bool = False,
    ) -> LoadReport:
        """Restore into ``state`` in place, the same verdict on all ranks; every rank calls.

        Everything that can be known to fail is checked on every rank before any rank changes anything. Arguments and
        errors are those of `Checkpointer.load`.
        """
        operation = self._begin(f"load({self.path!r})")
        started = time.monotonic()
        stats = ReadStats()
        with turn(operation, "match") as matched, held_off():
            check_root(state)
            match = self._match(
                parameter_names(state),
                map_location,
                strict=strict,
                convert_dtype=convert_dtype,
                here=Here(operation.rank, operation.world_size),
            )
            on_meta = list(meta_tensors(state))
            place = match.root(state, self._part(prefix, key_map, state, strict=strict))
            matched.word = msgspec.msgpack.encode(Matched(match.differences, match.meshes.digests()))
        ranks = [msgspec.msgpack.decode(word, type=Matched) for word in matched.heard]
        verdict, differences = together([found.differences for found in ranks], operation.rank)
        if meshes.may_differ([found.meshes for found in ranks]):
            meshes.check(operation.agree("meshes", match.meshes.encode()))
        with turn(operation, "check"):
            where = prefix_name(prefix)
            verdict.check(f"{self.path} at {where!r}" if where else self.path, strict=strict)
            self._load_objects(match, map_location, weights_only)
            check_files(self.manifest, self.storage, [Wanted(t.fqn, box) for t in match.live() for box in t.boxes])
        per_rank: dict[str, list[Any]] = {}
        if self.manifest.per_rank and operation.world_size != self.manifest.world_size:
            with turn(operation, "resize", self._patience):
                per_rank = self._resize(match, map_location, weights_only, stats)
        others_may_have = operation.world_size > 1
        # What was placed while reading may be in new tensors only, which nobody has seen.
        reading = _telling(self.path, lambda: (stats.placing and bool(match.targets)) or others_may_have)
        with turn(operation, "restore", self._patience), reading:
            self._fill(match, convert_dtype=convert_dtype, stats=stats, operation=operation)
        # In a turn of its own: a module's loading code may hold collectives, and wait for a rank that could not read.
        with turn(operation, "place", self._patience), _telling(self.path, lambda: True):
            place()
        if not strict and self.manifest.tensors and not match.restored:
            log.warning(
                "%s has nothing for this state: no tensor was restored, and strict=False lets that pass", self.path
            )
        left_on_meta = [name for name, tensor in on_meta if tensor.is_meta]
        if left_on_meta:
            log.warning(
                "%s has nothing for %s, still on the meta device; fill what you need of it (buffers that are not"
                " persistent are never saved)",
                self.path,
                ", ".join(left_on_meta),
            )
        return LoadReport(
            path=self.path,
            save_id=self.manifest.save_id,
            world_size=self.manifest.world_size,
            restored=match.restored,
            missing=differences.missing,
            unexpected=differences.unexpected,
            mismatched=differences.mismatched,
            skipped=differences.skipped,
            left_on_meta=left_on_meta,
            bytes_read=stats.bytes_read,
            seconds=time.monotonic() - started,
            bytes_received=stats.bytes_received,
            per_rank=per_rank,
        )

    def read_tensor(self, name: str, index: Index = ..., *, map_location: MapLocation = None) -> Tensor:
        """One tensor by its name, or the part ``index`` of it, on this process alone: what ``full[index]`` would be.

        Reads what holds the smallest box around that part. Raises TensorNotFoundError where there is none of the name,
        TensorIndexError and UsageError for an index that the tensor does not have or that is none.
        """
        entry = self.manifest.resolve(name)
        if entry is None:
            near = hint(name, [*self.manifest.tensors, *self.manifest.aliases])
            raise TensorNotFoundError(f"{self.path} has no tensor {name!r}.{near}")
        relocate = relocation(map_location)
        box, within = select(index, entry.shape, name)
        check_files(self.manifest, self.storage, [Wanted(name, box)])
        try:
            tensor = torch.empty(box.lengths, dtype=torch_dtype(entry.dtype), device="cpu")
        except (RuntimeError, MemoryError) as error:
            raise self._no_memory(error) from error
        read_targets(self.manifest, self.storage, [Target(name, box, tensor)], pool=self._pool)
        # What lies between the steps of a slice is not kept.
        return relocate(tensor[within].contiguous(), entry.location)

    def _part(self, prefix: Prefix, key_map: KeyMap | None, state: Any, *, strict: bool) -> Any:
        """The node at ``prefix`` under the names that ``key_map`` gives; ``state`` is what it is restored into."""
        node = subtree(self.manifest.state, prefix)
        if key_map is None:
            return node
        modules = None if state is None else [path for path, _ in iter_modules(state)]
        return rename(node, key_map, modules, strict=strict)

    def _resize(
        self, match: Match, map_location: MapLocation, weights_only: bool | None, stats: ReadStats
    ) -> dict[str, list[Any]]:
        """Read all ranks' values, and have the state say what to make of them on this number of ranks.

        Returns those that it says nothing about, by place, and logs once where they are.
        """
        everyone = self._match({}, map_location, strict=True, convert_dtype=False)
        made = {offer.place: everyone.per_rank(offer.place, offer.place) for offer in match.offers}
        self._load_objects(everyone, map_location, weights_only)
        stats.count(self._fill_new(everyone).bytes_read)
        assert match.here is not None, "it was made for a restore"
        unsaid = resize(match.offers, {place: value() for place, value in made.items()}, match.here, self.path)
        if unsaid and match.here.rank == 0:
            log.warning(
                "%s was saved by %d ranks and is loaded by %d, so the values by rank at %s are left as they are here."
                " LoadReport.per_rank has those of all ranks that saved; PerRank(value, resize=...) can make new ones.",
                self.path,
                self.manifest.world_size,
                match.here.world_size,
                ", ".join(map(repr, unsaid)),
            )
        return unsaid

    def _match(
        self,
        parameters: Mapping[int, str],
        map_location: MapLocation,
        *,
        strict: bool,
        convert_dtype: bool,
        here: Here | None = None,
    ) -> Match:
        return Match(
            self.manifest,
            parameters=parameters,
            convert_dtype=convert_dtype,
            strict=strict,
            relocate=relocation(map_location),
            here=here,
        )

    def _fill_new(self, match: Match) -> ReadStats:
        """Fill a match of new tensors only, which are whole: what isn't there needs no memory."""
        wanted = [Wanted(fresh.fqn, full_box(fresh.entry.shape)) for fresh in match.fresh]
        check_files(self.manifest, self.storage, wanted)
        stats = ReadStats()
        self._fill(match, convert_dtype=False, stats=stats)
        return stats

    def _fill(self, match: Match, *, convert_dtype: bool, stats: ReadStats, operation: Operation | None = None) -> None:
        """Read the tensors of a match; with ``operation``, all its ranks do, and may read for each other."""

        @held_off()
        def targets() -> list[Target]:
            try:
                return _targets(match.allocate())
            except (RuntimeError, MemoryError) as error:
                raise self._no_memory(error) from error

        read_together(
            self.manifest,
            self.storage,
            targets,
            operation=operation or begin_alone(),
            share=self._share_reads,
            patience=self._patience,
            pool=self._pool,
            convert_dtype=convert_dtype,
            stats=stats,
        )
        match.settle()

    def _no_memory(self, error: Exception) -> LoadFailedError:
        return LoadFailedError(f"{self.path}: no memory for what is to be restored: {_first_line(error)}.")

    def _load_objects(self, match: Match, map_location: MapLocation, weights_only: bool | None) -> None:
        for path in match.objects:
            entry = self.manifest.objects.get(path)
            if entry is None:
                raise CorruptCheckpointError(
                    f"{self.path}: the state has an object at {path!r} that the manifest does not list."
                )
            data = read_bytes(self.storage, entry.file, entry.offset, entry.nbytes, entry.digest)
            try:
                match.objects[path] = torch.load(io.BytesIO(data), map_location=map_location, weights_only=weights_only)
            except pickle.UnpicklingError as error:
                if weights_only is False:
                    raise LoadFailedError(
                        f"{self.path}: the object at {path!r} cannot be unpickled: {error}"
                    ) from error
                raise UnsafeLoadError(
                    f"{self.path} holds a pickled object at {path!r}, and weights_only forbids to load it: unpickling"
                    " runs code. If you trust whoever wrote it, pass weights_only=False. Nothing was changed."
                ) from error
            except (AttributeError, ImportError) as error:
                raise LoadFailedError(
                    f"{self.path}: the object at {path!r} needs code that is not here: {error}. Nothing was changed."
                ) from error
            except Exception as error:  # what a pickle holds may raise anything
                raise LoadFailedError(
                    f"{self.path}: the object at {path!r} cannot be read: {type(error).__name__}: {_first_line(error)}."
                    " Nothing was changed."
                ) from error


def _targets(tensors: Any) -> list[Target]:
    return [Target(t.fqn, box, view) for t in tensors for box, view in zip(t.boxes, t.views, strict=True)]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def _telling(path: str, changed: Callable[[], bool]) -> Iterator[None]:
    """Have what is raised say whether something may have been changed."""
    try:
        yield
    except Exception as error:
        raise _with_safety(error, path, changed=changed()) from error


def _with_safety(error: Exception, path: str, *, changed: bool) -> Exception:
    safety = (
        "The live state may be partly restored: load a checkpoint again before training on."
        if changed
        else "Nothing was changed."
    )
    if isinstance(error, ShardckptError):
        told = type(error)(f"{error} {safety}")
    else:
        told = LoadFailedError(f"the load of {path} failed: {type(error).__name__}: {error}. {safety}")
    return told


def overwritten(opened: OpenCheckpoint, error: Exception) -> bool:
    """Whether a load failed because another save replaced the checkpoint meanwhile, so that it is worth a new start."""
    if not isinstance(error, (CorruptCheckpointError, ObjectNotFoundError)):
        return False
    try:
        found = commit.find(opened.storage)
    except ShardckptError:  # what went wrong before says more
        return False
    return found is not None and found.manifest.save_id != opened.manifest.save_id
