"""The background half of a save: what each rank writes, and how all of them come to one verdict."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import msgspec

from shardckpt import commit
from shardckpt.background import PendingSave
from shardckpt.coordinator import Operation, told
from shardckpt.errors import RankTimeoutError, SaveFailedError, ShardckptError, StorageError, UncertainCommitError
from shardckpt.filenames import MANIFEST
from shardckpt.manifest import Manifest
from shardckpt.reports import SaveReport
from shardckpt.saving.own import Own
from shardckpt.saving.patience import Patience
from shardckpt.saving.structure import Structure
from shardckpt.saving.verdict import cause_of, failure, let_go, settle
from shardckpt.storage import Storage, retries

log = logging.getLogger(__name__)


class _Part(msgspec.Struct, array_like=True):
    """What a rank says once its part is durable."""

    seconds: float
    """From its call of the save until then."""
    word: bytes
    """What the job on rank 0 wants to hear."""


class _Verdict(msgspec.Struct, array_like=True):
    """What rank 0 says once the checkpoint is committed."""

    nbytes: int
    """Of all shards."""
    slowest_rank: int
    slowest_seconds: float


_PART: Final = msgspec.msgpack.Decoder(_Part)
_VERDICT: Final = msgspec.msgpack.Decoder(_Verdict)


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

    def seconds(self) -> float:
        """Since the save was called."""
        return time.monotonic() - self.called


class Job:
    """The background half of a save."""

    order: Order
    committed: Manifest | None = None
    """On rank 0, once it is."""
    record: commit.Found | None = None
    """The same with its bytes, until what it replaces has been cleared up."""
    shards_of: str
    """The id of the save that wrote the shards."""
    is_alias = False
    linked: Sequence[str] = ()
    """Files that it has put in the place and that are named after another save."""
    patience: Patience

    def run(self) -> None:
        """Do it, and resolve the pending save; never raises."""
        order = self.order
        rank = order.operation.rank
        rank_nbytes, written, retries_before = 0, 0.0, retries()
        word: bytes | Exception
        self.patience = patience = Patience(order.storage, order.commit_timeout)
        try:
            said, rank_nbytes = patience.wait_for(self._put, "put", late=partial(self._abandon, [rank]))
            written = order.seconds()
            word = msgspec.msgpack.encode(_Part(written, said))
        except BaseException as caught:  # noqa: BLE001 - any failure, whatever it is, becomes every rank's
            word = told(caught, rank)
            self._give_up(word)
        self._forget()
        try:
            verdict = settle(order.operation, word, order.commit_timeout, self._commit)
        except BaseException as caught:  # noqa: BLE001 - told to whoever asks for the result
            error = told(caught, rank)
            # Whoever never heard the verdict must not remove files that rank 0 may just be committing.
            unheard = isinstance(error, RankTimeoutError) and rank != 0 and not isinstance(word, Exception)
            if self.committed is None and not unheard and not isinstance(error, UncertainCommitError):
                # Rank 0 stands in for ranks that have died.
                ranks = range(order.operation.world_size) if rank == 0 else [rank]
                patience.tidy(partial(self._abandon, ranks), "abandon")
            if not patience.may_yet_settle:
                patience.tidy(self._end_lease, "release")
            cause = cause_of(word, error, rank)
            for found in (cause, error, caught):
                let_go(found)
            order.pending.resolve(failure(order.pending.path, cause, unheard=unheard))
            return
        heard = _VERDICT.decode(verdict)
        self._finish(
            SaveReport(
                path=order.pending.path,
                save_id=order.pending.save_id,
                world_size=order.operation.world_size,
                nbytes=heard.nbytes,
                rank_nbytes=rank_nbytes,
                stall_seconds=0.0,  # the pending save knows, once the call has returned; and when it was staged
                total_seconds=order.seconds(),
                written_seconds=written,
                slowest_rank=heard.slowest_rank,
                slowest_seconds=heard.slowest_seconds,
                retries=retries() - retries_before,
                alias=self.is_alias,
            )
        )

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

    def _give_up(self, error: Exception) -> None:
        """`_put` has failed, or hangs: end what waits for it."""

    def _abandon(self, ranks: Iterable[int]) -> None:
        commit.abandon(self.order.storage, self.order.pending.save_id, ranks, also=self.linked)

    def _end_lease(self) -> None:
        commit.end_lease(self.order.storage, self.order.pending.save_id)

    def _commit(self, words: list[bytes]) -> bytes:
        """On rank 0: commit what all ranks have put, unless the storage hangs; returns what all are to hear."""
        parts = [_PART.decode(word) for word in words]
        conclude = partial(self._conclude, [part.word for part in parts])
        try:
            nbytes = self.patience.wait_for(conclude, "commit", late=self._end_lease)
        except StorageError as error:
            if error is not self.patience.given_up or not self.patience.may_yet_settle:
                raise
            raise UncertainCommitError(
                f"the checkpoint at {self.order.pending.path} was being committed, and may yet be: {error} Nothing was"
                " removed: what is at that path, the new checkpoint or what was there before, is whole."
            ) from error
        slowest = max(range(len(parts)), key=lambda rank: parts[rank].seconds)
        return msgspec.msgpack.encode(_Verdict(nbytes, slowest, parts[slowest].seconds))

    def _conclude(self, words: list[bytes]) -> int:
        """On rank 0: commit what all ranks have put; returns the size of all shards in bytes."""
        raise NotImplementedError

    def _publish(self, record: commit.Found) -> None:
        """On rank 0: the last step, which whoever has been held up for too long must not take any more."""
        self.patience.settle()
        commit.publish(self.order.storage, record, self.order.previous)
        self.record, self.committed = record, record.manifest

    def _finish(self, report: SaveReport) -> None:
        """Clear up what the checkpoint replaces, now that all ranks know of it, and resolve the pending save."""
        order = self.order
        record, self.record = self.record, None
        if record is not None:
            clean = partial(commit.clean, order.storage, record)
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


def find_place(order: Order) -> None:
    """Rank 0 has left a marker in the place, but a network file system may be slow to show it."""
    if order.operation.rank != 0 and not order.storage.list():
        order.storage.prepare()
