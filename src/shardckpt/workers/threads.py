"""A few plain threads that do the input and output of one save or one load.

Not ``concurrent.futures``: its executors refuse work once the interpreter has begun to shut down, which is when the
last asynchronous save of a program may still be running. And they are daemons, for which the exit of the interpreter
does not wait: whoever starts them does, as long as they come back from the calls that they make.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from shardckpt.workers import under_way

if TYPE_CHECKING:
    from typing import Self

THREADS: Final = 4
"""Threads per save or load unless the caller says otherwise; more don't make a local disk faster."""
_LOOK_SECONDS: Final = 5.0
"""How often whoever waits for threads looks whether one of them reads for ever."""

Job = Callable[[], None]
T = TypeVar("T")


class Workers:
    """Threads that run jobs in the order of submission; a context manager that ends when all jobs are done.

    The first exception of a job is kept in `error`. Later jobs still run, since they may have something to release:
    a job that would start new work asks `error` first.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"shardckpt-{name}-{number}", daemon=True)
            for number in range(max(1, threads))
        ]

    def __enter__(self) -> "Self":
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for every job, then raise the first exception: that of the enclosed code, or of a job.

        It does not wait for a job that reads from a file system which has hung; see `under_way.check_reads`.
        """
        if error is not None:
            self.fail(error)
        self._end()
        if error is None and self._error is not None:
            raise self._error

    def _end(self) -> None:
        """Wait until the threads have done every job, even if the user interrupts: a job may be writing to a tensor."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            while thread.is_alive():
                try:
                    under_way.check_reads(self._threads)
                except Exception as stuck:
                    self.fail(stuck)
                    raise
                try:
                    thread.join(_LOOK_SECONDS)
                except BaseException as interruption:  # noqa: BLE001 - it is raised again, if nothing came before it
                    self.fail(interruption)

    @property
    def error(self) -> BaseException | None:
        """The first exception of a job, or what `fail` was told; None while all is well."""
        return self._error

    def fail(self, error: BaseException) -> None:
        """Let the jobs that are still to come know that their work isn't wanted; the first caller's word stays."""
        with self._lock:
            self._error = self._error or error

    def submit(self, job: Job) -> None:
        """Have a thread call `job`, never waiting."""
        self._jobs.put(job)

    def give_up(self, error: BaseException) -> None:
        """Do the jobs that no thread has taken yet, all of which hear of `error`; the threads may never come back."""
        self.fail(error)
        ends = 0
        with suppress(Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is None:
                    ends += 1
                else:
                    self._do(job)
        for _ in range(ends):
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)
            # A job holds on to its block, and waiting for the next one may take long.
            del job

    def _do(self, job: Job) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - it is raised again where the work was ordered
            self.fail(error)


class Aside(Generic[T]):
    """Something done by a thread of its own that may be left behind."""

    def __init__(self, do: Callable[[], T], name: str) -> None:
        self._outcome: list[T] = []
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._outcome.append(do())
            except BaseException as error:  # noqa: BLE001 - it is raised where the outcome is asked for
                self._error = error

        self._thread = threading.Thread(target=run, name=f"shardckpt-{name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread can be had
            run()

    def wait(self, seconds: float) -> bool:
        """Wait until it is done, and tell whether it is."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def outcome(self) -> T:
        """What it returned, or raised; once it is done."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._outcome[0]

    def read(self) -> T:
        """What it reads. Where that never comes it raises as `under_way.check_reads` does."""
        while not self.wait(_LOOK_SECONDS):
            under_way.check_reads([self._thread])
        return self.outcome()


def read_aside(read: Callable[[], T]) -> T:
    """What `read` returns, which reads a few small files. Waits no longer for a file system that has hung."""
    return Aside(read, "look").read()


def for_each(items: Sequence[T], do: Callable[[T], None], *, threads: int, name: str) -> None:
    """Call `do` on every item, in several threads; after the first error no further item is begun, and it is raised.

    A single item has a thread too, so that a read which never returns is left behind.
    """
    if not items:
        return
    with Workers(min(threads, len(items)), name) as workers:

        def unless_failed(item: T) -> None:
            if workers.error is None:
                do(item)

        for item in items:
            workers.submit(partial(unless_failed, item))
