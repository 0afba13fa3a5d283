"""The background half of a save: what each rank writes, and how all of them come to one verdict."""

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from shardckpt import commit
from shardckpt.background import PendingSave
from shardckpt.coordinator import Operation, told
from shardckpt.errors import RankTimeoutError, SaveFailedError, ShardckptError, UncertainCommitError
from shardckpt.filenames import MANIFEST
from shardckpt.manifest import Manifest
from shardckpt.reports import SaveReport
from shardckpt.saving.own import Own
from shardckpt.saving.structure import Structure
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

    def run(self) -> None:
        """Do it, and resolve the pending save; never raises."""
        order = self.order
        rank = order.operation.rank
        rank_nbytes, written, retries_before = 0, 0.0, retries()
        word: bytes | Exception
        try:
            said, rank_nbytes = self._put()
            written = order.seconds()
            word = msgspec.msgpack.encode(_Part(written, said))
        except BaseException as caught:  # noqa: BLE001 - any failure, whatever it is, becomes every rank's
            word = told(caught, rank)
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
                commit.abandon(order.storage, order.pending.save_id, ranks, also=self.linked)
            commit.end_lease(order.storage, order.pending.save_id)
            cause = _cause(word, error, rank)
            for found in (cause, error, caught):
                _let_go(found)
            order.pending.resolve(failure(order.pending.path, cause, unheard=unheard))
            return
        heard = msgspec.msgpack.decode(verdict, type=_Verdict)
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

    def _commit(self, words: list[bytes]) -> bytes:
        """On rank 0: commit what all ranks have put; returns what all are to hear."""
        parts = [msgspec.msgpack.decode(word, type=_Part) for word in words]
        nbytes = self._conclude([part.word for part in parts])
        slowest = max(range(len(parts)), key=lambda rank: parts[rank].seconds)
        return msgspec.msgpack.encode(_Verdict(nbytes, slowest, parts[slowest].seconds))

    def _conclude(self, words: list[bytes]) -> int:
        """On rank 0: commit what all ranks have put; returns the size of all shards in bytes."""
        raise NotImplementedError

    def _finish(self, report: SaveReport) -> None:
        """Clear up what the checkpoint replaces, now that all ranks know of it, and resolve the pending save."""
        order = self.order
        record, self.record = self.record, None
        if record is not None:
            commit.clean(order.storage, record)
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
