"""The engine behind every entry point: options, memory and the background in one object.

Save: flatten → plan → stage → write → commit. Load: manifest → plan → read → place.
"""

import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec

from shardckpt import commit, coordinator, loading, options, saving
from shardckpt.background import Background, PendingSave
from shardckpt.coordinator import Operation, turn
from shardckpt.errors import RankTimeoutError, ShardckptError
from shardckpt.loading import OpenCheckpoint
from shardckpt.options import Compression, Path, SaveOptions, ShareReads
from shardckpt.relocation import MapLocation
from shardckpt.reports import SaveReport
from shardckpt.saving import AliasJob, Job, Opening, Structure
from shardckpt.staging import StagingPool
from shardckpt.state import Flattened, KeyMap, Prefix, Stepped, flatten
from shardckpt.storage import open_storage

log = logging.getLogger(__name__)

SYNC_MEMORY: Final = 128 << 20
"""Bytes of staging memory that a synchronous save uses: it need not hold the whole shard."""

_RESTARTS: Final = 3
"""How often a load starts over because the checkpoint was overwritten while it read."""


class Checkpointer:
    """Saves and restores the state of a training job, every rank its own part.

    All ranks of the default process group make the same calls in the same order; without a process group it is a job of
    one. One save is in flight at a time: the next waits for it, and raises its error if nobody has seen that yet.

    Args:
        storage_options: for the fsspec file system behind a URL, such as ``key``, ``secret``, ``endpoint_url`` of s3fs.
        compression: None, ``"zstd"`` or ``("zstd", level)``, in frames that are read one by one.
        replicated: loose tensors and buffers that are equal on all ranks, so that their writing is shared: True for
            all, or patterns of their names. Parameters, optimizer state and DTensors are shared without asking.
        include, exclude: patterns (``fnmatch``) of the names that a save takes; by default all.
        staging_limit: bytes of host memory that an asynchronous save may hold; a save past it still works, but its
            caller waits for the disk. By default as much as this rank's shard.
        overlap: None, or ``"step"``: an asynchronous save copies parameters and optimizer state beside forward and
            backward, and the next step of any optimizer waits until that is done. Whatever else changes them in the
            meantime must wait for it with `PendingSave.wait_until_staged`, or the checkpoint may be wrong; see
            ``docs/async.md`` for what is noticed and what is not.
        timeout: seconds to wait for the other ranks to make the same call.
        commit_timeout: seconds to wait in the background for the other ranks to finish writing.
        share_reads: whether ranks that want the same stored bytes read them for each other and pass them on, over
            gloo, in the foreground of a load: True, False, or "auto": where that spares much, and a short trial at the
            start of the load shows that it is faster.
        alone: agree with no other rank, whatever process group there is.
    """

    def __init__(
        self,
        *,
        storage_options: Mapping[str, Any] | None = None,
        compression: Compression = None,
        replicated: bool | Sequence[str] = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        staging_limit: int | None = None,
        overlap: options.Overlap = None,
        timeout: float = 600.0,
        commit_timeout: float = 1800.0,
        share_reads: ShareReads = "auto",
        alone: bool = False,
    ) -> None:
        self._storage_options = options.mapping("storage_options", storage_options)
        self._save_options = SaveOptions.of(compression, replicated, include, exclude, overlap)
        self._staging_limit = None if staging_limit is None else options.positive("staging_limit", staging_limit)
        self._timeout = options.positive("timeout", timeout)
        self._commit_timeout = options.positive("commit_timeout", commit_timeout)
        self._share_reads = options.share_reads(share_reads)
        self._alone = alone
        self._pool = StagingPool()
        self._background = Background()
        self._last: Job | None = None
        self._jobs: list[Job] = []
        self._to_remove: list[str] = []
        self._version: Hashable | None = None
        self._own_structure = ""
        self._structure: Structure | None = None

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(
        self,
        state: Any,
        path: Path,
        *,
        storage_options: Mapping[str, Any] | None = None,
        state_version: Hashable | None = None,
        save_options: SaveOptions | None = None,
    ) -> SaveReport:
        """Save ``state`` to ``path`` and return once it is committed; otherwise as `async_save`."""
        chosen = replace(save_options or self._save_options, overlap=None)  # it waits for more than the copy
        pending = self._start(state, path, storage_options, state_version, chosen, memory=SYNC_MEMORY)
        report = pending.result()
        return replace(report, stall_seconds=report.total_seconds)

    def async_save(
        self,
        state: Any,
        path: Path,
        *,
        storage_options: Mapping[str, Any] | None = None,
        state_version: Hashable | None = None,
        save_options: SaveOptions | None = None,
    ) -> PendingSave:
        """Save ``state`` to ``path`` in the background; returns once the state may change.

        What is saved is the state at this call. With ``overlap="step"`` the state may first change by an optimizer's
        step, which waits as long as it must. A checkpoint that lies at ``path`` is replaced at the commit, at once.

        ``save_options`` stand in for those that the Checkpointer was made with. ``state_version`` is a promise: two
        successive saves with equal ones have the same tensors, though plain values may differ. The second shares the
        first's shards, by hard links or server-side copies, and neither waits nor writes them again.

        Raises, on every rank, what any rank met before the first byte was written: UnserialisableError, UsageError,
        ConflictingStateError, StorageError and its kinds, RankTimeoutError; and SaveFailedError for the save before
        this one, if it failed and nobody has been told.
        """
        chosen = save_options or self._save_options
        return self._start(state, path, storage_options, state_version, chosen, memory=self._staging_limit)

    def _start(
        self,
        state: Any,
        path: Path,
        storage_options: Mapping[str, Any] | None,
        state_version: Hashable | None,
        chosen: SaveOptions,
        *,
        memory: int | None,
    ) -> PendingSave:
        called = time.monotonic()
        operation = self._begin(f"save({options.path_text(path)!r})")
        with turn(operation, "open") as opening:
            place = commit.checkpoint_path(path)
            storage = open_storage(place, self._options(storage_options))
            may_alias = state_version is not None and state_version == self._version and self._can_share(storage.url)
            if not may_alias:
                self._drain()
            flat = _flatten(state, chosen, operation.rank)
            stepped = Stepped(state) if chosen.overlap == "step" else None
            own = flat.own.structure if flat.own is not None else ""
            if may_alias and own != self._own_structure:
                may_alias = False
                self._drain()
            known = self._structure.key if self._structure is not None else ""
            own_nbytes = sum(source.nbytes for source in saving.own_sources(flat))
            opening.word = msgspec.msgpack.encode(
                Opening(flat.structure, flat.outline, known, may_alias, flat.places, own_nbytes)
            )
        openings = [msgspec.msgpack.decode(word, type=Opening) for word in opening.heard]
        source = self._last if saving.may_share(openings, self._structure) else None
        key = saving.structure_key(openings)
        is_known = self._structure is not None and all(opening.known == key for opening in openings)
        descriptions = None if is_known else saving.exchange(operation, flat)
        if any(opening.may_alias for opening in openings) and source is None:
            # Some ranks could have shared the last save's shards, but not all.
            with turn(operation, "drain"):
                self._drain()
        previous = None
        with turn(operation, "place") as placing:
            if descriptions is not None:
                self._structure = None
                self._structure = saving.plan(descriptions, openings, operation.rank)
            structure = self._structure
            assert structure is not None, "it is known, or has just been planned"
            if operation.rank == 0:
                save_id = commit.new_save_id()
                # What compression makes of it is known when it is done.
                nbytes = structure.nbytes + sum(opening.own_nbytes for opening in openings)
                needed = nbytes if source is None and chosen.codec is None else 0
                previous = commit.open_place(storage, save_id, needed, shares=source.shards_of if source else None)
                placing.word = save_id.encode()
                placing.undo = lambda: commit.abandon(storage, save_id, [0])
        pending = PendingSave(place, placing.heard[0].decode())
        order = saving.Order(
            pending=pending,
            operation=operation,
            storage=storage,
            structure=structure,
            speaks=saving.speaks(openings, operation.rank),
            skeleton=flat.skeleton,
            objects=flat.objects,
            own=saving.describe(flat, operation.world_size),
            previous=previous,
            commit_timeout=self._commit_timeout,
            called=called,
            owner=self._background,
        )
        if source is None:
            self._last = saving.write(
                order, flat, chosen.codec, pool=self._pool, memory=memory, stepped=stepped, submit=self._submit
            )
        else:
            pending.share_staging(source.order.pending)
            self._last = AliasJob(order, source)
            self._submit(self._last)
        self._version, self._own_structure = state_version, own
        pending.add_stall(time.monotonic() - called)
        return pending

    def _can_share(self, url: str) -> bool:
        """Whether the shards of the last save are there, or still to come, and nothing that is queued changes ``url``.

        What a save replaces has to be there, or gone, before it begins.
        """
        changing = [job.order.storage.url for job in self._jobs if not job.order.pending.done()]
        if self._last is None or url in changing or url in self._to_remove:
            return False
        pending = self._last.order.pending
        return not pending.done() or (pending.succeeded() and self._last.is_there())

    def _submit(self, job: Job) -> None:
        self._jobs.append(job)
        try:
            self._background.submit(job.run)
        except RuntimeError as error:
            # No thread can be started. The others are under way, so this rank has to join them and say so.
            job.cancel(error)
            job.run()

    # -- loading ----------------------------------------------------------------------------------------------------

    def load(
        self,
        path: Path,
        state: Any = None,
        *,
        prefix: Prefix = (),
        key_map: KeyMap | None = None,
        map_location: MapLocation = None,
        strict: bool = True,
        weights_only: bool | None = None,
        convert_dtype: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Restore ``state`` in place from the checkpoint at ``path``, on any number of ranks, and return a LoadReport.

        Without ``state``, return the whole saved state on this process, asking no other rank.

        Tensors are written into, plain values replaced, modules and optimizers restored through their own semantics. A
        top-level key that ``state`` lacks is skipped and reported. ``strict=False`` restores what matches and reports
        the rest. ``map_location`` and ``weights_only`` mean what they mean in ``torch.load``; live tensors stay where
        they are. Those on the meta device get memory where ``map_location`` says, or on the devices of their mesh, and
        stay the same objects.

        ``prefix`` takes a sub-tree of the saved state for the whole: dotted text, or a tuple of keys. ``key_map``
        gives names of the checkpoint (below ``prefix``) other ones: a dict of names, of which each stands for all that
        lies below it and the longest counts, or a function from name to name.

        A `PerRank` gets its rank's value, or on another number of ranks what its ``resize`` makes of all ranks' values.

        Raises CheckpointNotFoundError, CorruptCheckpointError, StateMismatchError naming every difference before
        anything has been changed, TensorNotFoundError and UsageError for a prefix or a key map that does not fit,
        UnsafeLoadError, StorageError; on every rank, if on any.
        """
        if state is None:
            opened = self.open(path, storage_options=storage_options)
            return opened.materialise(prefix, key_map=key_map, map_location=map_location, weights_only=weights_only)
        for attempt in range(_RESTARTS):
            opened = self.open(path, storage_options=storage_options, collective=True)
            try:
                return opened.restore(
                    state,
                    prefix=prefix,
                    key_map=key_map,
                    strict=strict,
                    map_location=map_location,
                    weights_only=weights_only,
                    convert_dtype=convert_dtype,
                )
            except RankTimeoutError:
                raise
            except Exception as error:
                # All ranks come here if one does, though each with an error of its own.
                if attempt + 1 == _RESTARTS or not self._overwritten(opened, error):
                    raise
        raise AssertionError("the last attempt returns or raises")

    def open(
        self, path: Path, *, storage_options: Mapping[str, Any] | None = None, collective: bool = False
    ) -> OpenCheckpoint:
        """Read the manifest of a checkpoint; ``collective``: rank 0 reads it, and all ranks get the same one."""
        self._background.wait()
        operation = self._begin(f"load({options.path_text(path)!r})") if collective else coordinator.begin_alone()
        place, storage, manifest = loading.read_manifest(path, self._options(storage_options), operation)
        return OpenCheckpoint(
            place,
            manifest,
            storage,
            pool=self._pool,
            begin=self._begin_load,
            patience=self._commit_timeout,
            share_reads=self._share_reads,
        )

    def _overwritten(self, opened: OpenCheckpoint, error: Exception) -> bool:
        operation = self._begin(f"reload({opened.path!r})")
        with turn(operation, "overwritten") as looked:
            if operation.rank == 0:
                looked.word = b"yes" if loading.overwritten(opened, error) else b"no"
        return looked.heard[0] == b"yes"

    # -- the rest ---------------------------------------------------------------------------------------------------

    def remove(self, path: Path, *, storage_options: Mapping[str, Any] | None = None) -> None:
        """Remove the checkpoint at ``path``; called by one rank, and the others need not know.

        While a save is in flight, the removal waits for it in the background, and is dropped if it fails: the last good
        checkpoint is not removed before the one that replaces it is committed. A symbolic link is unlinked.
        """
        self._background.check_fork()
        storage = open_storage(commit.checkpoint_path(path), self._options(storage_options))
        if self._last is not None and self._last.order.storage.url == storage.url:
            self._version = None  # nothing will be left to share
        waiting_for = [job.order.pending for job in self._jobs if not job.order.pending.told]
        if not self._background.busy and all(pending.succeeded() for pending in waiting_for):
            commit.remove(storage)
            return

        def job() -> None:
            if not all(pending.succeeded() for pending in waiting_for):
                log.warning("%s was to be removed, but is kept: the save that was to replace it failed", storage.url)
                return
            try:
                commit.remove(storage)
            except ShardckptError as error:
                log.warning("could not remove %s: %s", storage.url, error)

        self._to_remove.append(storage.url)
        self._background.submit(job)

    def prepare(self, state: Any) -> None:
        """Allocate and touch, in the background, the memory that saving ``state`` will need."""
        self._background.check_fork()
        rank, world_size = (0, 1) if self._alone else coordinator.rank_and_world_size()
        nbytes = saving.bytes_to_stage(_flatten(state, self._save_options, rank), world_size)
        self._pool.warm(nbytes if self._staging_limit is None else min(nbytes, self._staging_limit))

    def wait(self) -> None:
        """Until nothing is in flight. Raises the SaveFailedError that nobody has been told of yet."""
        self._drain()

    def close(self) -> None:
        """Wait as `wait` does, then give the memory back. The Checkpointer stays usable and allocates anew."""
        self._background.check_fork()
        try:
            self._drain()
        finally:
            self._pool.close()
            self._pool = StagingPool()
            self._last, self._version = None, None

    def _begin_load(self, call: str) -> Operation:
        saving.wait_for_copies()  # another Checkpointer's too: what is read may go into what it copies
        return self._begin(call)

    def _begin(self, call: str) -> Operation:
        self._background.check_fork()
        return coordinator.begin_alone() if self._alone else coordinator.begin(call, timeout=self._timeout)

    def _options(self, storage_options: Mapping[str, Any] | None) -> dict[str, Any]:
        return self._storage_options | options.mapping("storage_options", storage_options)

    def _drain(self) -> None:
        self._background.wait()
        # A save that has failed may still be copying.
        saving.wait_for_copies([job.order.pending for job in self._jobs])
        failures = [error for job in self._jobs if (error := job.order.pending.unreported_error()) is not None]
        self._jobs.clear()
        self._to_remove.clear()
        if failures:
            raise failures[0]


def _flatten(state: Any, chosen: SaveOptions, rank: int) -> Flattened:
    return flatten(state, replicated=chosen.replicated, include=chosen.include, exclude=chosen.exclude, rank=rank)
