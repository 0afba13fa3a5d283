"""The background half of a save: what each rank writes, and how all of them come to one verdict."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec

from shardckpt import commit, manifest
from shardckpt.background import PendingSave
from shardckpt.coordinator import Operation
from shardckpt.errors import RankTimeoutError, SaveFailedError, ShardckptError, StorageError, UncertainCommitError
from shardckpt.filenames import MANIFEST
from shardckpt.manifest import Manifest, RankManifest, RankValues
from shardckpt.reports import SaveReport
from shardckpt.saving.own import Own, put_objects, with_objects
from shardckpt.saving.patience import Patience
from shardckpt.saving.structure import Structure
from shardckpt.saving.verdict import cause_of, failure, let_go, settle
from shardckpt.storage import Storage
from shardckpt.workers import for_each
from shardckpt.writer import ShardWriter

log = logging.getLogger(__name__)


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
    patience: Patience

    def run(self) -> None:
        """Do it, and resolve the pending save; never raises."""
        order = self.order
        rank = order.operation.rank
        rank_nbytes = 0
        word: bytes | Exception
        self.patience = patience = Patience(order.storage, order.commit_timeout)
        try:
            word, rank_nbytes = patience.wait_for(self._put, "put", late=partial(self._abandon, [rank]))
        except Exception as error:  # noqa: BLE001 - any failure, whatever it is, becomes every rank's
            word = error
            self._give_up(error)
        self._forget()
        try:
            verdict = settle(order.operation, word, order.commit_timeout, self._commit)
        except Exception as error:  # noqa: BLE001 - told to whoever asks for the result
            # Whoever never heard the verdict must not remove files that rank 0 may just be committing.
            unheard = isinstance(error, RankTimeoutError) and rank != 0 and not isinstance(word, Exception)
            if self.committed is None and not unheard and not isinstance(error, UncertainCommitError):
                # Rank 0 stands in for ranks that have died.
                ranks = range(order.operation.world_size) if rank == 0 else [rank]
                patience.tidy(partial(self._abandon, ranks), "abandon")
            if not patience.may_yet_settle:
                patience.tidy(self._end_lease, "release")
            cause = cause_of(word, error, rank)
            for found in (cause, error):
                let_go(found)
            order.pending.resolve(failure(order.pending.path, cause, unheard=unheard))
            return
        self._finish(order.report(verdict, rank_nbytes=rank_nbytes, alias=self.is_alias))

    def cancel(self, error: Exception) -> None:
        """Have `run` do nothing but tell all ranks of ``error``. Comes before `run` or while it waits for blocks."""
        raise NotImplementedError

    def _put(self) -> tuple[bytes, int]:
        """Write this rank's part; returns what rank 0 is to hear of it, and the bytes of its shard."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Let go of what only `_put` needed."""

    def _give_up(self, error: Exception) -> None:
        """`_put` has failed, or hangs: end what waits for it."""

    def _abandon(self, ranks: Iterable[int]) -> None:
        order = self.order
        commit.abandon(order.storage, order.pending.save_id, ranks, also=self._linked())

    def _end_lease(self) -> None:
        commit.end_lease(self.order.storage, self.order.pending.save_id)

    def _commit(self, words: list[bytes]) -> bytes:
        """`_conclude`, unless the storage hangs."""
        try:
            return self.patience.wait_for(partial(self._conclude, words), "commit", late=self._end_lease)
        except StorageError as error:
            if error is not self.patience.given_up or not self.patience.may_yet_settle:
                raise
            raise UncertainCommitError(
                f"the checkpoint at {self.order.pending.path} was being committed, and may yet be: {error} Nothing was"
                " removed: what is at that path, the new checkpoint or what was there before, is whole."
            ) from error

    def _conclude(self, words: list[bytes]) -> bytes:
        """On rank 0: commit what all ranks have put; returns what all are to hear."""
        raise NotImplementedError

    def _publish(self, record: Manifest) -> None:
        """On rank 0: the last step, which whoever has been held up for too long must not take any more."""
        self.patience.settle()
        commit.publish(self.order.storage, record, self.order.previous)
        self.committed = record

    def _linked(self) -> Sequence[str]:
        """Files that this job put in the place and that are named after another save."""
        return ()

    def _finish(self, report: SaveReport) -> None:
        """Clear up what the checkpoint replaces, now that all ranks know of it, and resolve the pending save."""
        order = self.order
        if self.committed is not None:
            clean = partial(commit.clean, order.storage, self.committed.save_id)
            if not self.patience.tidy(clean, "clean"):
                log.warning("the save to %s is committed; what it replaced is not removed yet", order.pending.path)
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
        self.patience.check()
        objects = order.objects if order.speaks else {}
        own = order.own.objects if order.own is not None else {}
        entries = put_objects(order.storage, rank, save_id, objects | own)
        if order.speaks:
            own_word.state = order.skeleton
            own_word.objects = {path: entries[path] for path in objects}
        if order.own is not None:
            own_word.per_rank = with_objects(order.own, entries)
        self.patience.check()
        written = commit.put_rank_manifest(order.storage, own_word)
        return msgspec.msgpack.encode(written), written.file.size

    def _give_up(self, error: Exception) -> None:
        if isinstance(self._writer, ShardWriter):
            self._writer.give_up(error)

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
        self._publish(commit.assemble(order.pending.save_id, files, tables, said))
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
        self._publish(record := commit.with_values(record, values))
        return msgspec.msgpack.encode(sum(file.size for file in record.files))
