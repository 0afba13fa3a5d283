"""The saves and removals of one Checkpointer, in the order of its calls, in the background."""

import logging
from functools import partial

from shardckpt import commit
from shardckpt.background import Background, NotTakenError, PendingSave
from shardckpt.coordinator import told
from shardckpt.errors import ShardckptError
from shardckpt.saving.jobs import Job
from shardckpt.saving.overlap import wait_for_copies
from shardckpt.saving.patience import Patience
from shardckpt.storage import Storage

log = logging.getLogger(__name__)


class Queue:
    """What is under way, and what has ended since the last `drain` that somebody may have to be told of.

    ``tolerant``: of a failure nobody is told but by the log and the count.
    """

    def __init__(self, background: Background, *, commit_timeout: float, tolerant: bool) -> None:
        self.tolerant = tolerant
        self._commit_timeout = commit_timeout
        self._background = background
        self._jobs: list[Job] = []
        self._to_remove: list[str] = []
        self._newest: PendingSave | None = None
        self._failed = 0
        """Of the saves that are no longer in `_jobs`."""

    @property
    def failed(self) -> int:
        """How many saves have failed so far."""
        return self._failed + sum(pending.done() and not pending.succeeded() for pending in self._pending())

    def lose(self, pending: PendingSave) -> None:
        """Note a save that failed before there was a job for it."""
        self._newest = pending
        self._failed += 1

    def submit(self, job: Job) -> None:
        self._newest = job.order.pending
        self._jobs.append(job)
        try:
            self._background.submit(job.run, job.desert)
        except NotTakenError as error:
            # The others are under way, so this rank has to join them and say so.
            cause = error.__cause__ or error
            job.cancel(told(cause, job.order.operation.rank))
            job.run()
            if not isinstance(cause, Exception):
                raise cause from None

    def remove(self, storage: Storage) -> None:
        """Remove a checkpoint once the saves in flight are committed; if one fails, it is kept."""
        # The newest counts for longer: under "warn" it may have failed and be none of the jobs any more.
        saves = self._pending() if self._newest is None else [*self._pending(), self._newest]
        waiting_for = [pending for pending in saves if not pending.told]
        if not self._background.busy and all(pending.succeeded() for pending in waiting_for):
            commit.remove(storage)
            return

        def job() -> None:
            if not all(pending.succeeded() for pending in waiting_for):
                log.warning("%s was to be removed, but is kept: the save that was to replace it failed", storage.url)
                return
            patience = Patience(storage, self._commit_timeout)
            try:
                patience.wait_for(partial(commit.remove, storage, in_time=patience.check), "remove")
            except ShardckptError as error:
                log.warning("could not remove %s: %s", storage.url, error)

        self._to_remove.append(storage.url)
        try:
            self._background.submit(job)
        except NotTakenError as error:  # so none is under way
            job()
            if error.__cause__ is not None and not isinstance(error.__cause__, Exception):
                raise error.__cause__ from None

    def may_change(self, url: str) -> bool:
        """Whether a save to ``url`` is under way, or a removal of what is there has been asked for."""
        saving = (job.order.storage.url for job in self._jobs if not job.order.pending.done())
        return url in saving or url in self._to_remove

    def drain(self) -> None:
        """Until nothing is under way. Unless tolerant, raises the SaveFailedError that nobody has been told of yet."""
        self._background.wait()
        pending = self._pending()
        # A save that has failed may still be copying.
        wait_for_copies(pending)
        self._failed += sum(not save.succeeded() for save in pending)
        self._jobs.clear()
        self._to_remove.clear()
        if self.tolerant:
            return
        failures = [error for save in pending if (error := save.unreported_error()) is not None]
        if failures:
            raise failures[0]

    def _pending(self) -> list[PendingSave]:
        return [job.order.pending for job in self._jobs]
