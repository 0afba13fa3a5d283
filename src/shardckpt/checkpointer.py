"""The engine behind every entry point: options, memory and the background in one object.

Save: flatten → plan → stage → write → commit. Load: manifest → plan → read → place.
"""

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from shardckpt import commit, coordinator, options, saving
from shardckpt.background import Background, PendingSave
from shardckpt.coordinator import Operation, taking_part, turn
from shardckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, ObjectNotFoundError, StorageError
from shardckpt.loading import OpenCheckpoint
from shardckpt.options import Compression, OnSaveError, Path, SaveOptions, ShareReads
from shardckpt.relocation import MapLocation
from shardckpt.reports import LoadReport, SaveReport
from shardckpt.saving import Request, Series
from shardckpt.staging import StagingPool
from shardckpt.state import KeyMap, Prefix
from shardckpt.storage import BLOCK, Storage, open_storage

log = logging.getLogger(__name__)

SYNC_MEMORY: Final = 128 << 20
"""Bytes of staging memory that a synchronous save uses: it need not hold the whole shard."""

_RESTARTS: Final = 3
"""How often a load begins at most, where the checkpoint is overwritten while it reads."""

T = TypeVar("T")


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
        on_save_error: ``"raise"``: a save that failed is an error of the next call. ``"warn"``: every rank logs it
            once and counts it in `failed_saves`, and the job goes on with the checkpoints that it has; what the lost
            one was to replace is kept. This goes for what the storage, a disk or a rank does to a save. A state that
            cannot be saved, a wrong call, and a rank that does not make the call are errors as ever.
        on_report: called on every rank with the SaveReport or LoadReport of each save and load that is over, for
            metrics and traces; of a save that failed the report has an ``error``. For an asynchronous save that is
            mostly in the background's thread. What it raises is logged.
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
        on_save_error: OnSaveError = "raise",
        on_report: Callable[[SaveReport | LoadReport], None] | None = None,
        share_reads: ShareReads = "auto",
        alone: bool = False,
    ) -> None:
        self._storage_options = options.mapping("storage_options", storage_options)
        self._save_options = SaveOptions.of(compression, replicated, include, exclude, overlap)
        self._staging_limit = None if staging_limit is None else options.positive("staging_limit", staging_limit)
        self._timeout = options.positive("timeout", timeout)
        self._commit_timeout = options.positive("commit_timeout", commit_timeout)
        self._share_reads = options.share_reads(share_reads)
        self._on_report = options.function("on_report", on_report)
        self._alone = alone
        self._pool = StagingPool()
        self._background = Background()
        tolerant = options.on_save_error(on_save_error) == "warn"
        self._series = Series(self._background, commit_timeout=self._commit_timeout, tolerant=tolerant)

    @property
    def failed_saves(self) -> int:
        """How many saves have failed in the background so far; under ``on_save_error="warn"``, how many at all."""
        return self._series.queue.failed

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
        """Save ``state`` to ``path`` and return once it is committed; otherwise as `async_save`.

        Under ``on_save_error="warn"`` the report of a save that failed has an ``error``.
        """
        started = time.monotonic()
        chosen = replace(save_options or self._save_options, overlap=None)  # it waits for more than the copy
        opener = partial(self._open_storage, storage_options)
        pending = self._start(Request(state, path, opener, state_version, chosen, SYNC_MEMORY))
        report = pending.report(self._rank_and_world_size()[1])
        report = replace(report, stall_seconds=time.monotonic() - started)
        self._tell(report)
        if report.error is not None and not self._series.queue.tolerant:
            pending.result()  # raises
        return report

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
        this one, if it failed and nobody has been told. Under ``on_save_error="warn"`` neither that nor a StorageError
        is raised: the save that is returned has failed, and its `PendingSave.result` says of what.
        """
        chosen = save_options or self._save_options
        opener = partial(self._open_storage, storage_options)
        return self._start(
            Request(state, path, opener, state_version, chosen, self._staging_limit, on_over=self._is_over)
        )

    def _is_over(self, pending: PendingSave) -> None:
        self._tell(pending.report(self._rank_and_world_size()[1]))

    def _tell(self, report: SaveReport | LoadReport) -> None:
        if self._on_report is None:
            return
        try:
            self._on_report(report)
        except Exception:
            log.exception("on_report failed, which is nobody's checkpoint: the save or load itself is over")

    def _start(self, request: Request) -> PendingSave:
        operation = self.begin(f"save({options.path_text(request.path)!r})")
        return self._series.begin(request, operation, self._pool)

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

        def act(opened: OpenCheckpoint) -> Any:
            if state is None:
                return opened.materialise(prefix, key_map=key_map, map_location=map_location, weights_only=weights_only)
            return opened.restore(
                state,
                prefix=prefix,
                key_map=key_map,
                strict=strict,
                map_location=map_location,
                weights_only=weights_only,
                convert_dtype=convert_dtype,
            )

        return self.reading(path, act, storage_options=storage_options, collective=state is not None)

    def reading(
        self,
        path: Path,
        act: Callable[[OpenCheckpoint], T],
        *,
        storage_options: Mapping[str, Any] | None = None,
        collective: bool = False,
    ) -> T:
        """What ``act`` makes of the checkpoint at ``path``, and of the new one if that is replaced under its hands.

        ``collective`` is as for `open`. Raises CheckpointNotFoundError where the checkpoint was removed meanwhile.
        """
        for attempt in range(_RESTARTS):
            opened = self.open(path, storage_options=storage_options, collective=collective)
            try:
                return act(opened)
            except (CorruptCheckpointError, ObjectNotFoundError) as error:
                # All ranks come here if one does, as the kind of error is the same on all.
                fate = self._fate(opened, collective=collective)
                if fate == "removed":
                    safety = " Nothing was changed." if collective and not opened.touched else ""
                    raise CheckpointNotFoundError(
                        f"the checkpoint at {opened.path} was removed while it was read: {error}.{safety}"
                    ) from error
                if fate == "other":
                    raise type(error)(
                        f"{error} Another save, of other tensors, has replaced it meanwhile: load again."
                    ) from error
                if fate != "replaced" or attempt + 1 == _RESTARTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def open(
        self, path: Path, *, storage_options: Mapping[str, Any] | None = None, collective: bool = False
    ) -> OpenCheckpoint:
        """Read the manifest of a checkpoint; ``collective``: rank 0 reads it, and all ranks get the same one."""
        self._background.wait()
        operation = self.begin(f"load({options.path_text(path)!r})") if collective else coordinator.begin_alone()
        with taking_part(operation):
            place, storage, manifest = commit.read_for_all(path, self._options(storage_options), operation)
        return OpenCheckpoint(
            place,
            manifest,
            storage,
            pool=self._pool,
            begin=self._begin_load,
            patience=self._commit_timeout,
            share_reads=self._share_reads,
            tell=self._tell,
        )

    def _fate(self, opened: OpenCheckpoint, *, collective: bool) -> str:
        operation = self.begin(f"reload({opened.path!r})") if collective else coordinator.begin_alone()
        with turn(operation, "fate") as looked:
            if operation.rank == 0:
                looked.word = opened.fate().encode()
        return looked.heard[0].decode()

    # -- the rest ---------------------------------------------------------------------------------------------------

    def prune(self, path: Path, *, storage_options: Mapping[str, Any] | None = None) -> list[str]:
        """Remove what saves that died have left at ``path``, and return the names of that; called by one rank.

        It goes with the next save to ``path`` too, but for what nobody sees: an object store keeps the parts of an
        upload that was never finished, and charges for them. Finding these takes s3fs. A checkpoint at ``path`` stays.
        """
        self._background.check_fork()
        return commit.prune(open_storage(commit.checkpoint_path(path), self._options(storage_options)))

    def remove(self, path: Path, *, storage_options: Mapping[str, Any] | None = None) -> None:
        """Remove the checkpoint at ``path``; called by one rank, and the others need not know.

        While a save is in flight, the removal waits for it in the background, and is dropped if it fails: the last good
        checkpoint is not removed before the one that replaces it is committed. A symbolic link is unlinked. Raises
        StorageError, which in the background, and under ``on_save_error="warn"``, is logged instead.
        """
        self._background.check_fork()
        try:
            self._series.remove(self._open_storage(storage_options, commit.checkpoint_path(path)))
        except StorageError as error:  # on this rank alone, while the others go on
            if not self._series.queue.tolerant:
                raise
            log.warning("could not remove %s: %s", path, error)

    def prepare(self, state: Any) -> None:
        """Allocate and touch, in the background, the memory that saving ``state`` will need."""
        self._background.check_fork()
        rank, world_size = self._rank_and_world_size()
        flat = saving.flatten_selected(state, self._save_options, rank)
        # The header is not known yet, and rarely larger than a block.
        nbytes = saving.bytes_to_stage(flat, world_size) + BLOCK
        if any(view.is_cuda for leaf in flat.tensors.values() for view in leaf.views):
            self._pool.pin()
        self._pool.warm(saving.bytes_to_hold(nbytes, self._staging_limit))

    def wait(self) -> None:
        """Until nothing is in flight. Raises the SaveFailedError that nobody has been told of, if that is to raise."""
        self._series.queue.drain()

    def close(self) -> None:
        """Wait as `wait` does, then give the memory back. The Checkpointer stays usable and allocates anew."""
        self._background.check_fork()
        try:
            self._series.queue.drain()
        finally:
            self._pool.close()
            self._pool = StagingPool()
            self._series.forget()

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (0, 1) if self._alone else coordinator.rank_and_world_size()

    def _begin_load(self, call: str) -> Operation:
        saving.wait_for_copies()  # another Checkpointer's too: what is read may go into what it copies
        return self.begin(call)

    def begin(self, call: str) -> Operation:
        """Begin an operation of those ranks that share this Checkpointer's calls; not for users, nor kept for them."""
        self._background.check_fork()
        return coordinator.begin_alone() if self._alone else coordinator.begin(call, timeout=self._timeout)

    def _open_storage(self, storage_options: Mapping[str, Any] | None, place: str) -> Storage:
        return open_storage(place, self._options(storage_options))

    def _options(self, storage_options: Mapping[str, Any] | None) -> dict[str, Any]:
        return self._storage_options | options.mapping("storage_options", storage_options)
