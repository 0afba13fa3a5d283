"""The background of one Checkpointer: saves, aliases and removals in order, in a thread that ends when idle."""

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from shardckpt.errors import SaveFailedError, UncertainCommitError, UsageError
from shardckpt.reports import SaveReport

log = logging.getLogger(__name__)


class PendingSave:
    """A save that has been started.

    Once `async_save` has returned this, the snapshot is taken and the state may change; with ``overlap="step"``, by
    steps of optimizers only, until `staged`.
    """

    def __init__(
        self,
        path: str,
        save_id: str,
        called: float,
        on_over: "Callable[[PendingSave], None] | None" = None,
    ) -> None:
        """``save_id`` is empty where the save failed before it had one; ``called`` is when, by the monotonic clock.

        ``on_over`` is called once, when the save is over and its call has returned.
        """
        self.path = path
        self.save_id = save_id
        self._finished = threading.Event()
        self._staged = threading.Event()
        self._report: SaveReport | None = None
        self._error: SaveFailedError | None = None
        self._reported = False
        self._stall_seconds = 0.0
        self._called = called
        self._on_over = on_over
        self._telling = threading.Lock()
        self._has_returned = False
        self._staged_seconds = self._total_seconds = 0.0

    @property
    def staged(self) -> bool:
        """Whether the snapshot is complete, so that the state may change."""
        return self._staged.is_set()

    def wait_until_staged(self, timeout: float | None = None) -> bool:
        """Wait until the state may change in any way, and tell whether it may; ``timeout`` is in seconds.

        For what changes parameters outside of an optimizer's step, where ``overlap="step"`` copies beside training.
        """
        return self._staged.wait(timeout)

    def done(self) -> bool:
        """Whether the save is over, well or badly. Does not wait."""
        return self._finished.is_set()

    def result(self, timeout: float | None = None) -> SaveReport:
        """Wait until the save is over on all ranks.

        ``timeout`` is in seconds; None waits as long as it takes, which ``commit_timeout`` bounds. Raises
        SaveFailedError if any rank failed, on every rank, and TimeoutError if it is not over yet.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"the save to {self.path} is still running after {timeout} s")
        if self._error is not None:
            self._reported = True
            raise self._error
        assert self._report is not None
        return replace(self._report, stall_seconds=self._stall_seconds, staged_seconds=self._staged_seconds)

    def outcome(self) -> SaveReport | SaveFailedError:
        """Wait until the save is over, and say how it ended. Nobody counts as told of a failure."""
        self._finished.wait()
        return self._error or self.result()

    def report(self, world_size: int) -> SaveReport:
        """As `outcome`, of a failure too: the report has an ``error`` then."""
        outcome = self.outcome()
        if isinstance(outcome, SaveReport):
            return outcome
        return SaveReport(
            path=self.path,
            save_id=self.save_id,
            world_size=world_size,
            nbytes=0,
            rank_nbytes=0,
            stall_seconds=self._stall_seconds,
            total_seconds=self._total_seconds,
            staged_seconds=self._staged_seconds,
            error=str(outcome),
            uncertain=isinstance(outcome, UncertainCommitError),
        )

    @property
    def told(self) -> bool:
        """Whether somebody has been told of the failure."""
        return self._reported

    def succeeded(self) -> bool:
        """Whether the save is over and committed."""
        return self._finished.is_set() and self._error is None

    def mark_staged(self) -> None:
        self._staged_seconds = time.monotonic() - self._called
        self._staged.set()

    def share_staging(self, other: "PendingSave") -> None:
        """Count as staged when ``other`` does, whose shards this save shares."""
        self._staged = other._staged  # noqa: SLF001 - of the same class

    def add_stall(self, seconds: float) -> None:
        """Note that the caller was kept from going on for so long."""
        self._stall_seconds += seconds

    def mark_returned(self) -> None:
        """Note that the call which began this save returns now: it stalled its caller until here."""
        self.add_stall(time.monotonic() - self._called)
        self._has_returned = True
        self._tell()

    def resolve(self, outcome: SaveReport | SaveFailedError) -> None:
        if isinstance(outcome, SaveFailedError):
            # Whoever never asks for the result, and makes no further save, is told here.
            log.error("%s", outcome)
            self._error = outcome
        else:
            self._report = outcome
        self._total_seconds = time.monotonic() - self._called
        self._finished.set()
        self._tell()

    def _tell(self) -> None:
        """Say how it ended, once, when the save is over and its call too."""
        with self._telling:
            if not (self._has_returned and self.done()) or self._on_over is None:
                return
            on_over, self._on_over = self._on_over, None
        on_over(self)

    def unreported_error(self) -> SaveFailedError | None:
        """The failure, if the save is over and nobody has been told yet; telling it counts."""
        if not self._finished.is_set() or self._reported:
            return None
        self._reported = True
        return self._error

    def __repr__(self) -> str:
        state = "running" if not self.done() else "committed" if self._error is None else "failed"
        return f"PendingSave({self.path!r}, {state})"


class NotTakenError(RuntimeError):
    """No thread runs a job: the process is at its limit of them, or was interrupted. The cause is what happened."""


class Background:
    """Jobs in order, in one thread that lives while there are any, so that an idle process has none of ours.

    The thread is no daemon: a process that ends without waiting still finishes its save.
    """

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._jobs: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._desert: Callable[[], None] | None = None
        """Of the job that is running."""
        self._runner: object | None = None
        """Stands for the thread that runs jobs; None where there is none."""
        self._pid = os.getpid()
        _all.add(self)

    @property
    def busy(self) -> bool:
        with self._state:
            return self._runner is not None

    def submit(self, job: Callable[[], None], desert: Callable[[], None] = lambda: None) -> None:
        """Run ``job`` after those submitted before it. It must not raise.

        ``desert`` is called if the process ends before it is through, which takes an interrupt of the wait for it.
        Raises NotTakenError where it will not be run. An interruption that comes later is raised as it is.
        """
        self.check_fork()
        with self._state:
            self._jobs.append((job, desert))
            if self._runner is not None:
                return
            thread = None
            # Before it starts: an interrupt in `start` finds the thread started, and the job its.
            self._runner = runner = object()
            try:
                thread = threading.Thread(target=self._run, args=(runner,), name="shardckpt-background", daemon=False)
                thread.start()
            except BaseException as error:
                if thread is not None and thread.is_alive():
                    raise
                # One that starts nevertheless waits for the lock, and finds that it is not wanted.
                self._runner = None
                self._jobs.pop()
                raise NotTakenError(str(error)) from error

    def wait(self) -> None:
        """Until nothing is left to do."""
        self.check_fork()
        with self._state:
            while self._runner is not None:
                self._state.wait()

    def desert(self) -> None:
        """Say of all that is left to do that it will not be done."""
        for desert in (self._desert, *(desert for _, desert in list(self._jobs))):
            if desert is not None:
                desert()

    def belongs_here(self) -> bool:
        """Whether this process made it: a forked child has none of the parent's threads, and half of its locks."""
        return os.getpid() == self._pid

    def check_fork(self) -> None:
        """Raise UsageError in a forked child."""
        if not self.belongs_here():
            raise UsageError(
                "this Checkpointer was made in a parent process and cannot be used in a forked child. Use the spawn"
                " start method, or make a new Checkpointer in the child."
            )

    def _run(self, runner: object) -> None:
        while True:
            with self._state:
                if self._runner is not runner:
                    return
                if not self._jobs:
                    self._runner = None
                    self._state.notify_all()
                    return
                job, self._desert = self._jobs.popleft()
            try:
                job()
            except BaseException:
                log.exception("a background job of shardckpt failed unexpectedly")
            del job
            self._desert = None


_last_of_all: list[Callable[[], None]] = []


def at_end(act: Callable[[], None]) -> None:
    """Have ``act`` called when this process ends, after it has waited for all that is in flight."""
    _last_of_all.append(act)


_all: "weakref.WeakSet[Background]" = weakref.WeakSet()


def _wait_for_all() -> None:
    here = [background for background in list(_all) if background.belongs_here()]
    try:
        for background in here:
            background.wait()
    except BaseException:
        for background in here:
            background.desert()
        raise
    finally:
        for act in _last_of_all:
            act()


def _wait_before_executors_close() -> None:
    """Have interpreter exit wait for saves while libraries under the storage may still start their threads.

    ``atexit`` is too late: it runs after concurrent.futures has refused new work, which aiobotocore needs.
    """
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        import concurrent.futures.thread  # noqa: F401  # callbacks run last in, first out, and ours must run before its

        register(_wait_for_all)


_wait_before_executors_close()
