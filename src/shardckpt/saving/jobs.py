"""The background half of a save: what each rank writes, and how all of them come to one verdict."""

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from shardckpt import commit, manifest
from shardckpt.background import PendingSave
from shardckpt.coordinator import Operation
from shardckpt.errors import RankTimeoutError, SaveFailedError, ShardckptError, UncertainCommitError
from shardckpt.filenames import MANIFEST
from shardckpt.manifest import Manifest, RankManifest, RankValues
from shardckpt.reports import SaveReport
from shardckpt.saving.own import Own, put_objects, with_objects
from shardckpt.saving.structure import Structure
from shardckpt.storage import Storage
from shardckpt.workers import for_each
from shardckpt.writer import ShardWriter

log = logging.getLogger(__name__)


def settle(
    operation: Operation, word: bytes | Exception, timeout: float, conclude: Callable[[list[bytes]], bytes]
) -> bytes:
    """The second half of a commit: every rank says how it went, rank 0 concludes, every rank hears the verdict."""
    operation.post("written", word)
    if operation.rank != 0:
        return operation.hear("written", timeout)
    try:
        verdict = conclude(operation.collect("written", timeout))
    except Exception as error:
        operation.announce("written", error)
        raise
    except BaseException as error:
        uncertain = UncertainCommitError(
            f"rank 0 was interrupted by {type(error).__name__} in the commit, which may have been made; load it to see."
        )
        operation.announce("written", uncertain)
        raise uncertain from error
    try:
        operation.announce("written", verdict)
        operation.see_off("written")
    except RankTimeoutError as error:  # the commit stands, whether or not the others hear of it
        log.warning("committed, but the other ranks could not be told: %s", error)
    return verdict


def failure(path: str, error: BaseException, *, unheard: bool = False) -> SaveFailedError:
    """What a failed save raises: the cause, and what is still safe. ``unheard``: rank 0 may yet commit it."""
    if isinstance(error, UncertainCommitError):
        return error
    if unheard:
        uncertain = UncertainCommitError(
            f"this rank never heard whether the save to {path} was committed, so it may have been; load it to see."
            f" Checkpoints committed before it are intact. Cause: {error}"
        )
        uncertain.__cause__ = error
        return uncertain
    reason = str(error) if isinstance(error, ShardckptError) else f"{type(error).__name__}: {error}"
    failed = SaveFailedError(
        f"the save to {path} failed and left no checkpoint behind. Checkpoints committed before it are intact. "
        f"Cause: {reason}"
    )
    failed.__cause__ = error
    return failed


def told(error: BaseException) -> Exception:
    """What other ranks hear of an error: an interruption is one for this process alone."""
    return error if isinstance(error, Exception) else SaveFailedError(f"it was interrupted by {type(error).__name__}")


def _let_go(error: BaseException | None) -> None:
    """Have an error keep nothing of what it came from: the frames of its traceback have the tensors, and the writer."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _cause(word: bytes | Exception, verdict: Exception, rank: int) -> Exception:
    """What a save that failed on this rank with ``word``, and on all with ``verdict``, failed of.

    An error of this rank's own, which has its traceback, unless another rank's came before: then this one may have
    come of it, since that rank clears up.
    """
    told_by = verdict.rank if isinstance(verdict, ShardckptError) else None
    return word if isinstance(word, Exception) and told_by in (None, rank) else verdict


@dataclass(frozen=True)
class Order:
    """What both kinds of background job need to know of the save that ordered them."""

    pending: PendingSave
    operation: Operation
    """Over the connection of the background thread that runs the job."""
    storage: Storage
    structure: Structure
    speaks: bool
    """Whether this rank's skeleton and objects are stored; they are not where rank 0's say the same."""
    skeleton: Any
    objects: dict[str, bytes]
    own: Own | None
    """What differs by rank, as this rank has it."""
    previous: bytes | None
    """On rank 0: the commit record that this save may replace."""
    commit_timeout: float
    called: float
    """When the save was called, by the monotonic clock, in seconds."""

    def report(self, verdict: bytes, *, rank_nbytes: int, alias: bool) -> SaveReport:
        """What the caller hears of a committed save; ``verdict`` is the size of all shards, as rank 0 said it."""
        return SaveReport(
            path=self.pending.path,
            save_id=self.pending.save_id,
            world_size=self.operation.world_size,
            nbytes=msgspec.msgpack.decode(verdict, type=int),
            rank_nbytes=rank_nbytes,
            stall_seconds=0.0,  # the pending save knows, once the call has returned
            total_seconds=time.monotonic() - self.called,
            alias=alias,
        )


class Job:
    """The background half of a save."""

    order: Order
    committed: Manifest | None = None
    """On rank 0, once it is."""
    shards_of: str
    """The id of the save that wrote the shards."""
    is_alias = False

    def run(self) -> None:
        """Do it, and resolve the pending save; never raises."""
        order = self.order
        rank = order.operation.rank
        rank_nbytes = 0
        word: bytes | Exception
        try:
            word, rank_nbytes = self._put()
        except BaseException as caught:  # noqa: BLE001 - any failure, whatever it is, becomes every rank's
            word = told(caught)
        self._forget()
        try:
            verdict = settle(order.operation, word, order.commit_timeout, self._conclude)
        except BaseException as caught:  # noqa: BLE001 - told to whoever asks for the result
            error = told(caught)
            # Whoever never heard the verdict must not remove files that rank 0 may just be committing.
            unheard = isinstance(error, RankTimeoutError) and rank != 0 and not isinstance(word, Exception)
            if self.committed is None and not unheard and not isinstance(error, UncertainCommitError):
                # Rank 0 stands in for ranks that have died.
                ranks = range(order.operation.world_size) if rank == 0 else [rank]
                commit.abandon(order.storage, order.pending.save_id, ranks, also=self._linked())
            commit.end_lease(order.storage, order.pending.save_id)
            cause = _cause(word, error, rank)
            for found in (cause, error, caught):
                _let_go(found)
            order.pending.resolve(failure(order.pending.path, cause, unheard=unheard))
            return
        self._finish(order.report(verdict, rank_nbytes=rank_nbytes, alias=self.is_alias))

    def desert(self) -> None:
        """Tell the other ranks that this process ends before the job does."""
        operation, who = self.order.operation, f"rank {self.order.operation.rank}"
        if operation.rank == 0:  # which may be committing at this moment
            operation.leave(
                UncertainCommitError(
                    f"{who}: its process ended before it said whether the save to {self.order.pending.path} was"
                    " committed, so it may have been; load it to see. Checkpoints committed before it are intact."
                )
            )
        else:
            operation.leave(SaveFailedError(f"{who}: its process ended before it had written its part"))

    def cancel(self, error: Exception) -> None:
        """Have `run` do nothing but tell all ranks of ``error``. Comes before `run` or while it waits for blocks."""
        raise NotImplementedError

    def _put(self) -> tuple[bytes, int]:
        """Write this rank's part; returns what rank 0 is to hear of it, and the bytes of its shard."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Let go of what only `_put` needed."""

    def _conclude(self, words: list[bytes]) -> bytes:
        """On rank 0: commit what all ranks have put; returns what all are to hear."""
        raise NotImplementedError

    def _linked(self) -> Sequence[str]:
        """Files that this job put in the place and that are named after another save."""
        return ()

    def _finish(self, report: SaveReport) -> None:
        """Clear up what the checkpoint replaces, now that all ranks know of it, and resolve the pending save."""
        order = self.order
        if self.committed is not None:
            commit.clean(order.storage, self.committed.save_id)
        # A later save may share the shards, which takes none of these.
        self.order = replace(order, skeleton=None, objects={}, own=None)
        order.pending.resolve(report)

    def is_there(self) -> bool:
        """Whether a committed checkpoint has not been removed since, as far as this rank has to say."""
        if self.committed is None:
            return True
        try:
            sizes = [self.order.storage.size(name) for name in (MANIFEST, self.committed.files[0].name)]
        except ShardckptError:
            return False
        return all(sizes)


def _find_place(order: Order) -> None:
    """Rank 0 has left a marker in the place, but a network file system may be slow to show it."""
    if order.operation.rank != 0 and not order.storage.list():
        order.storage.prepare()


class SaveJob(Job):
    """Shard, rank manifest, commit."""

    def __init__(self, order: Order, writer: ShardWriter | Exception) -> None:
        """``writer`` may be what kept this rank from having one: that is for all ranks to know."""
        self.order = order
        self.shards_of = order.pending.save_id
        self._writer: ShardWriter | Exception | None = writer

    def cancel(self, error: Exception) -> None:
        if isinstance(self._writer, ShardWriter):
            self._writer.cancel(error)

    def _put(self) -> tuple[bytes, int]:
        order = self.order
        rank, save_id = order.operation.rank, order.pending.save_id
        if isinstance(self._writer, Exception):
            raise self._writer
        assert self._writer is not None, "a job runs once"
        _find_place(order)
        own_word = self._writer.run()
        objects = order.objects if order.speaks else {}
        own = order.own.objects if order.own is not None else {}
        entries = put_objects(order.storage, rank, save_id, objects | own)
        if order.speaks:
            own_word.state = order.skeleton
            own_word.objects = {path: entries[path] for path in objects}
        if order.own is not None:
            own_word.per_rank = with_objects(order.own, entries)
        written = commit.put_rank_manifest(order.storage, own_word)
        return msgspec.msgpack.encode(written), written.file.size

    def _forget(self) -> None:
        self._writer = None  # and with it the tensors, which the caller may want to free

    def _conclude(self, words: list[bytes]) -> bytes:
        order = self.order
        ranks = [msgspec.msgpack.decode(word, type=commit.Written) for word in words]
        files, layouts = [rank.file for rank in ranks], [rank.layout for rank in ranks]
        tables = order.structure.known.get(layouts)
        said: dict[int, RankManifest] = {}

        def read(index: int) -> None:
            data = commit.read_back(order.storage, files[index])
            if tables is None or ranks[index].speaks:
                # These are the bytes that the rank encoded, by the digest that it told.
                where = f"{order.storage.url}/{files[index].manifest}"
                said[index] = manifest.decode_rank_manifest(data, where, doubted=False)

        # Whoever has overtaken this save has removed its files; that they are missing would be a poor reason.
        commit.check_unchanged(order.storage, order.previous)
        for_each(range(len(ranks)), read, threads=order.storage.width, name="manifests")
        if tables is None:
            tables = commit.tables(said, order.structure.heads, order.structure.aliases)
            order.structure.known.keep(layouts, tables)
        record = commit.assemble(order.pending.save_id, files, tables, said)
        commit.publish(order.storage, record, order.previous)
        self.committed = record
        return msgspec.msgpack.encode(sum(file.size for file in files))


class AliasJob(Job):
    """Of a save whose tensors are those of the one before: links, and a manifest of its own."""

    is_alias = True

    def __init__(self, order: Order, source: Job) -> None:
        self.order = order
        self.shards_of = source.shards_of
        self._source: Job | None = source
        self._shared: Manifest | None = None
        self._copied: list[str] = []
        self._refusal: Exception | None = None

    def cancel(self, error: Exception) -> None:
        self._refusal = error

    def _put(self) -> tuple[bytes, int]:
        # Kept no longer than needed: the next save that shares has this one, and would have all before it.
        source, self._source = self._source, None
        if self._refusal is not None:
            raise self._refusal
        assert source is not None, "a job runs once"
        if not source.order.pending.succeeded():
            raise SaveFailedError(f"the save to {source.order.pending.path}, whose shards it shares, failed.")
        self._shared, self._from = source.committed, source.order.storage
        return self._own_values(), 0

    def _linked(self) -> Sequence[str]:
        return self._copied

    def _own_values(self) -> bytes:
        """What rank 0 is to hear of this rank's values: those in the rank manifest that is shared may be older."""
        order = self.order
        if order.own is None or order.operation.rank == 0:
            return b""
        _find_place(order)
        entries = put_objects(order.storage, order.operation.rank, order.pending.save_id, order.own.objects)
        return msgspec.json.encode(with_objects(order.own, entries))

    def _conclude(self, words: list[bytes]) -> bytes:
        order = self.order
        shared = self._shared
        assert shared is not None, "rank 0 knows what it committed"
        names = [name for file in shared.files for name in (file.name, file.manifest)]
        present = {stat.name for stat in order.storage.list()}
        self._copied = [name for name in names if name not in present]
        order.storage.copy_from(self._from, self._copied)
        own = order.own.objects if order.own is not None else {}
        entries = put_objects(order.storage, 0, order.pending.save_id, order.objects | own)
        record = msgspec.structs.replace(
            shared,
            save_id=order.pending.save_id,
            created=commit.now(),
            state=order.skeleton,
            objects={path: entries[path] for path in order.objects},
        )
        values = {rank: msgspec.json.decode(word, type=RankValues) if word else None for rank, word in enumerate(words)}
        values[0] = with_objects(order.own, entries) if order.own is not None else None
        record = commit.with_values(record, values)
        commit.publish(order.storage, record, order.previous)
        self.committed = record
        return msgspec.msgpack.encode(sum(file.size for file in record.files))
