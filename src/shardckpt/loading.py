"""One load: the manifest, what it is restored into, and the order in which nothing is lost."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from shardckpt import commit
from shardckpt.box import full_box
from shardckpt.codecs import torch_dtype
from shardckpt.coordinator import Operation, taking_part, turn
from shardckpt.errors import ShardckptError, TensorNotFoundError
from shardckpt.garbage import held_off
from shardckpt.indexing import Index, select
from shardckpt.manifest import Manifest
from shardckpt.options import ShareReads
from shardckpt.planner import Wanted
from shardckpt.progress import bar
from shardckpt.reader import Reading, ReadPlan, ReadStats, Target, opening, read_object, read_together
from shardckpt.relocation import MapLocation, relocation
from shardckpt.reports import LoadReport
from shardckpt.safety import enough_memory, telling
from shardckpt.staging import StagingPool
from shardckpt.state import (
    Differences,
    KeyMap,
    Maker,
    Matching,
    Prefix,
    hint,
    meshes,
    meta_tensors,
    parameter_names,
    prefix_name,
    rename,
    subtree,
    together,
    walk,
)
from shardckpt.state.names import check_root, iter_modules
from shardckpt.state.per_rank import Here, resize
from shardckpt.storage import Storage, retries

log = logging.getLogger(__name__)


class Matched(msgspec.Struct, array_like=True):
    """What each rank says once it has held its state against the manifest."""

    differences: Differences
    meshes: list[tuple[list[int], str]]


_MATCHED: Final = msgspec.msgpack.Decoder(Matched)


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
        tell: Callable[[LoadReport], None],
    ) -> None:
        """``pool`` is the memory to read through; ``begin`` starts an operation of all ranks, for `restore`.

        ``tell`` hears what each `restore` returns.

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
        self._tell = tell
        self.touched = False
        """Whether the state may have been changed."""

    def keys(self) -> list[Any]:
        """The top-level keys of the state."""
        return list(self._maker(None).items(self.manifest.state, "") or {})

    def materialise(
        self,
        prefix: Prefix = (),
        *,
        key_map: KeyMap | None = None,
        map_location: MapLocation = None,
        weights_only: bool | None = None,
        maker: Maker | None = None,
        stats: ReadStats | None = None,
    ) -> Any:
        """The value at a place of the state, made anew on this process alone.

        ``maker`` is to make it, in place of one that makes all of it in memory; ``stats`` hears of what is read. A
        module becomes a dict of its tensors, an optimizer torch's index-keyed state dict. Raises TensorNotFoundError, a
        KeyError, where the state has no such place.
        """
        maker = self._maker(map_location) if maker is None else maker
        value = maker.new(self._part(prefix, key_map, None, strict=True), prefix_name(prefix))
        self._check_words(Here(0, 1))
        self._read_objects(maker, map_location, weights_only)
        self._fill_new(maker, stats)
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
        with taking_part(operation), bar(f"loading {self.path}", wanted=operation.rank == 0) as shown:
            started, retries_before = time.monotonic(), retries()
            stats = ReadStats(heard=None if shown is None else shown.advance)
            with turn(operation, "match") as matched, held_off():
                check_root(state)
                match = Matching(
                    self.manifest,
                    walk,
                    parameters=parameter_names(state),
                    convert_dtype=convert_dtype,
                    strict=strict,
                    relocate=relocation(map_location),
                    here=Here(operation.rank, operation.world_size),
                )
                on_meta = list(meta_tensors(state))
                place = match.root(state, self._part(prefix, key_map, state, strict=strict))
                matched.word = msgspec.msgpack.encode(Matched(match.differences, match.meshes.digests()))
            ranks = [_MATCHED.decode(word) for word in matched.heard]
            verdict, differences = together([found.differences for found in ranks], operation.rank)
            if meshes.may_differ([found.meshes for found in ranks]):
                meshes.check(operation.agree("meshes", match.meshes.encode()))
            with turn(operation, "check") as checked, held_off():
                # Before the verdict: what differs may be what is damaged.
                stats.count(self._check_words(match.here))
                where = prefix_name(prefix)
                verdict.check(f"{self.path} at {where!r}" if where else self.path, strict=strict)
                self._read_objects(match, map_location, weights_only)
                live = [Wanted(tensor.fqn, box) for tensor in match.live() for box in tensor.boxes]
                reading = self._prepare(match, live, convert_dtype=convert_dtype, stats=stats)
                if shown is not None:
                    shown.total = sum(
                        target.tensor.nbytes for targets in reading.targets.values() for target in targets
                    )
                if operation.world_size > 1:
                    checked.word = opening(reading, self._share_reads)
            per_rank: dict[str, list[Any]] = {}
            if self.manifest.per_rank and operation.world_size != self.manifest.world_size:
                with turn(operation, "resize", self._patience):
                    per_rank = self._resize(match, map_location, weights_only, stats)
            others_may_have = operation.world_size > 1
            # What was placed while reading may be in new tensors only, which nobody has seen.
            safely = telling(self.path, lambda: (stats.placing and bool(match.targets)) or others_may_have)
            self.touched = True
            with turn(operation, "restore", self._patience), safely:
                read_together(reading, checked.heard, operation, patience=self._patience)
                del reading  # it holds what was read, of which `settle` may make copies elsewhere
                match.settle()
            # In a turn of its own: a module's loading code may hold collectives, and wait for one that could not read.
            with turn(operation, "place", self._patience), telling(self.path, lambda: True):
                place()
            if not strict and self.manifest.tensors and not match.restored:
                log.warning(
                    "%s has nothing for this state: no tensor was restored, and strict=False lets that pass", self.path
                )
            operation.see_off("place")
            left_on_meta = [name for name, tensor in on_meta if tensor.is_meta]
            if left_on_meta:
                log.warning(
                    "%s has nothing for %s, still on the meta device; fill what you need of it (buffers that are not"
                    " persistent are never saved)",
                    self.path,
                    ", ".join(left_on_meta),
                )
            report = LoadReport(
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
                retries=retries() - retries_before,
                bytes_received=stats.bytes_received,
                per_rank=per_rank,
            )
        self._tell(report)
        return report

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
        plan = ReadPlan(self.manifest, self.storage, [Wanted(name, box)])
        plan.check()
        with enough_memory(self.path):
            tensor = torch.empty(box.lengths, dtype=torch_dtype(entry.dtype), device="cpu")
        Reading(plan, [Target(name, box, tensor)], pool=self._pool).alone()
        # What lies between the steps of a slice is not kept.
        return relocate(tensor[within].contiguous(), entry.location)

    def fate(self) -> str:
        """What has become of the checkpoint while it was read, so that a file was not as the manifest says.

        "" for nothing; "removed"; "replaced", where to start again on the new one restores all that this one did; or
        "other" where that would leave a mixture.
        """
        try:
            found = commit.find(self.storage)
        except ShardckptError:  # what went wrong before says more
            return ""
        if found is None:
            return "removed"
        new, old = found.manifest, self.manifest
        if new.save_id == old.save_id:
            return ""
        names = ({*manifest.tensors, *manifest.aliases} for manifest in (old, new))
        return "replaced" if not self.touched or set.issubset(*names) else "other"

    def _part(self, prefix: Prefix, key_map: KeyMap | None, state: Any, *, strict: bool) -> Any:
        """The node at ``prefix`` under the names that ``key_map`` gives; ``state`` is what it is restored into."""
        node = subtree(self.manifest.state, prefix)
        if key_map is None:
            return node
        modules = None if state is None else [path for path, _ in iter_modules(state)]
        return rename(node, key_map, modules, strict=strict)

    def _check_words(self, here: Here) -> int:
        """Hold plain values, which have no digest in the commit record, against what ranks wrote: each a part of it.

        Returns the bytes read.
        """
        ranks = range(here.rank, self.manifest.world_size, here.world_size) if self.manifest.per_rank else ()
        # Where no value differs by rank, what rank 0 wrote has them all, but for containers that it lacks.
        return commit.check_words(self.manifest, self.storage, ranks or range(here.rank == 0))

    def _resize(
        self, match: Matching, map_location: MapLocation, weights_only: bool | None, stats: ReadStats
    ) -> dict[str, list[Any]]:
        """Read all ranks' values, and have the state say what to make of them on this number of ranks.

        Returns those that it says nothing about, by place, and logs once where they are.
        """
        everyone = self._maker(map_location)
        made = {offer.place: everyone.per_rank(offer.place, offer.place) for offer in match.offers}
        self._read_objects(everyone, map_location, weights_only)
        stats.count(self._fill_new(everyone).bytes_read)
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

    def _maker(self, map_location: MapLocation) -> Maker:
        return Maker(self.manifest, relocation(map_location))

    def _fill_new(self, maker: Maker, stats: ReadStats | None = None) -> ReadStats:
        """Fill new tensors only, which are whole."""
        whole = [Wanted(fresh.fqn, full_box(fresh.entry.shape)) for fresh in maker.fresh]
        reading = self._prepare(maker, [wanted for wanted in whole if wanted.box.volume], stats=stats)
        reading.alone()
        stats = reading.stats
        del reading  # it holds what was read, of which `settle` may make copies elsewhere
        maker.settle()
        return stats

    def _prepare(
        self,
        maker: Maker,
        known: Sequence[Wanted],
        *,
        convert_dtype: bool = False,
        stats: ReadStats | None = None,
    ) -> Reading:
        """Check the files and make what is to be made; ``known`` is what of it is known to be wanted before."""
        plan = ReadPlan(self.manifest, self.storage, known)
        # What isn't there needs no memory.
        plan.check()
        with enough_memory(self.path), held_off():
            tensors = maker.allocate()
            targets = [Target(t.fqn, box, view) for t in tensors for box, view in zip(t.boxes, t.views, strict=True)]
        plan.add([Wanted(target.fqn, target.box) for target in targets[len(known) :]])
        plan.check()
        return Reading(plan, targets, pool=self._pool, convert_dtype=convert_dtype, stats=stats)

    def _read_objects(self, maker: Maker, map_location: MapLocation, weights_only: bool | None) -> None:
        for path in maker.objects:
            maker.objects[path] = read_object(
                self.path, self.manifest, self.storage, path, map_location=map_location, weights_only=weights_only
            )
