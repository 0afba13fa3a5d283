"""The threads of a save or a load."""

import threading
import time
from unittest import mock

import pytest

from shardckpt.workers import Workers, for_each


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_every_item_is_done_once(threads: int) -> None:
    """No range of a checkpoint is read twice or left out, with any number of threads or items."""
    for count in (0, 1, 2, 100):
        seen: list[int] = []
        for_each(range(count), seen.append, threads=threads, name="test")
        assert sorted(seen) == list(range(count))


def test_first_error_stops_the_rest() -> None:
    """After an error nothing more is begun, what was begun is finished, and the error of the first comes out."""
    finished: list[int] = []

    def do(item: int) -> None:
        if item == 1:
            raise ValueError("first")
        time.sleep(0.05)
        finished.append(item)
        if item == 0:
            raise ValueError("second")

    with pytest.raises(ValueError, match="first"):
        for_each(range(100), do, threads=2, name="test")
    assert 0 in finished
    assert len(finished) < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shardckpt-test")]


def test_jobs_run_after_an_error_too() -> None:
    """A job may have memory to give back: it runs, and finds the error."""
    errors: list[BaseException | None] = []

    def fail() -> None:
        raise ValueError("no")

    workers = Workers(1, "test")
    with pytest.raises(ValueError, match="no"), workers:
        workers.submit(fail)
        workers.submit(lambda: errors.append(workers.error))
    assert [str(error) for error in errors] == ["no"]


def test_interrupted_wait_still_waits() -> None:
    """Ctrl-C during a load doesn't return while a thread goes on writing into tensors."""
    done = threading.Event()

    def job() -> None:
        time.sleep(0.2)
        done.set()

    real = threading.Thread.join
    interrupted = mock.Mock(side_effect=[KeyboardInterrupt])

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        if not interrupted.called:
            interrupted()
        real(thread, timeout)

    workers = Workers(2, "test")
    with mock.patch.object(threading.Thread, "join", join), pytest.raises(KeyboardInterrupt), workers:
        workers.submit(job)
    assert done.is_set()


def test_threads_that_cannot_start_leave_none_behind() -> None:
    """At the limit of threads a save fails, and the process can still end."""
    real = threading.Thread.start
    started: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    with (
        mock.patch.object(threading.Thread, "start", start),
        pytest.raises(RuntimeError, match="can't start"),
        Workers(3, "test"),
    ):
        pass
    assert len(started) == 2
    assert not any(thread.is_alive() for thread in started)
