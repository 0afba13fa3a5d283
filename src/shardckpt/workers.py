"""A few plain threads that do the input and output of one save or one load.

Not ``concurrent.futures``: its executors refuse work once the interpreter has begun to shut down, which is when the
last asynchronous save of a program may still be running.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from typing import Self

THREADS: Final = 4
"""Threads per save or load unless the caller says otherwise; more don't make a local disk faster."""

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
            threading.Thread(target=self._run, name=f"shardckpt-{name}-{number}") for number in range(max(1, threads))
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
        """Wait for every job, then raise the first exception: that of the enclosed code, or of a job."""
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
                    thread.join()
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

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - it is raised again where the work was ordered
                self.fail(error)
            # A job holds on to its block, and waiting for the next one may take long.
            del job


def for_each(items: Sequence[T], do: Callable[[T], None], *, threads: int, name: str) -> None:
    """Call `do` on every item, in several threads; after the first error no further item is begun, and it is raised."""
    if len(items) <= 1:
        for item in items:
            do(item)
        return
    with Workers(min(threads, len(items)), name) as workers:

        def unless_failed(item: T) -> None:
            if workers.error is None:
                do(item)

        for item in items:
            workers.submit(partial(unless_failed, item))
