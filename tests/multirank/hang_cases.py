"""Ranks that do not do what the others do, or stop doing it. Runs in the processes of `ranks`."""

import os
import signal
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import shardckpt
from shardckpt import Checkpointer, CheckpointManager, commit, errors, loading
from shardckpt.coordinator import ranks as coordinated
from shardckpt.reader import targets
from shardckpt.saving import series

LONG = 300.0
"""Seconds: who waits for a timeout waits for longer than the test."""


def told(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, str(error)


def in_step(path: str) -> None:
    """Whatever happened, the ranks' next calls meet."""
    dist.barrier()
    state = {"t": torch.arange(3.0)}
    Checkpointer(timeout=30, commit_timeout=30).save(state, path)
    state["t"].zero_()
    Checkpointer(timeout=30).load(path, state)
    assert state["t"].tolist() == [0, 1, 2]
    dist.barrier()


def save_and_load(rank: int, path: str, saver: int) -> tuple[str, str]:
    """One rank saves, again, while the other loads."""
    engine = Checkpointer(timeout=LONG)
    state = {"t": torch.zeros(3)}
    engine.save(state, path)
    try:
        engine.save(state, path) if rank == saver else engine.load(path, state)
    except shardckpt.ShardckptError as error:
        found = told(error)
    in_step(path)
    return found


class Interrupted(nn.Linear):
    """Ctrl-C comes while one rank's module takes its values."""

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        if dist.get_rank() == 1:
            raise KeyboardInterrupt
        super()._load_from_state_dict(*args, **options)


def interrupted_load(rank: int, path: str) -> tuple[str, str]:
    engine = Checkpointer(timeout=LONG, commit_timeout=LONG)
    module = Interrupted(3, 3)
    engine.save({"module": module}, path)
    try:
        engine.load(path, {"module": module})
    except BaseException as error:  # noqa: BLE001 - it is what the test asks for
        found = told(error)
    in_step(path + "-next")
    return found


def interrupted_between_turns(rank: int, path: str) -> tuple[str, str]:
    """Ctrl-C on rank 0 after one agreement and before the next, for which the others wait."""
    engine = Checkpointer(timeout=LONG, commit_timeout=LONG)
    state = {"t": torch.zeros(3)}
    engine.save(state, path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with impatient():
        try:
            with mock.patch("shardckpt.loading.together", interrupt if rank == 0 else loading.together):
                engine.load(path, state)
        except BaseException as error:  # noqa: BLE001 - it is what the test asks for
            found = told(error)
    in_step(path)
    return found


@contextmanager
def impatient() -> Any:
    """Ranks hear of an interrupt sooner than they would."""
    with mock.patch.object(coordinated, "_PATIENT_SECONDS", 0.2), mock.patch.object(coordinated, "_PAUSE_SECONDS", 0.1):
        yield


def interrupted_wait(rank: int, path: str) -> tuple[str, str]:
    """SIGINT reaches rank 1 while it waits for rank 0, which is busy; both have a place for the save by then."""
    engine = Checkpointer(timeout=LONG, commit_timeout=LONG)
    engine.save({"t": torch.ones(3)}, f"{path}-before")  # the ranks have met in this folder
    gone = Path(f"{path}.gone")
    open_place, hear = series.commit.open_place, coordinated.StoreOperation.hear

    def slowly(*args: Any, **options: Any) -> Any:
        while not gone.exists():
            threading.Event().wait(0.01)
        return open_place(*args, **options)

    def hearing(self: Any, point: str, *args: Any, **options: Any) -> bytes:
        if point == "place":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return hear(self, point, *args, **options)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with impatient():
            if rank == 0:
                with mock.patch.object(series.commit, "open_place", slowly):
                    engine.save({"t": torch.ones(3)}, path)
            else:
                with mock.patch.object(coordinated.StoreOperation, "hear", hearing):
                    engine.save({"t": torch.ones(3)}, path)
    except BaseException as error:  # noqa: BLE001 - it is what the test asks for
        gone.touch()
        found = told(error)
    finally:
        signal.signal(signal.SIGINT, before)
    in_step(path)
    return found


def different_errors(rank: int, path: str) -> int | str | None:
    """Both ranks fail to read the newest checkpoint, each of its own: one way on for both."""
    engine = Checkpointer(timeout=LONG, commit_timeout=LONG)
    everything = targets.Reading.everything
    failed = []

    def fail_once(self: targets.Reading, *args: Any) -> None:
        if self.targets and not failed:
            failed.append(True)
            raise errors.CorruptCheckpointError("damaged") if rank == 0 else errors.StorageError("EIO")
        everything(self, *args)

    with CheckpointManager(path, checkpointer=engine) as manager:
        state = {"t": torch.ones(1000)}
        for step in (1, 2):
            manager.save(step, state)
        manager.wait()
        with mock.patch.object(targets.Reading, "everything", fail_once):
            try:
                return manager.restore(state)
            except shardckpt.ShardckptError as error:
                return type(error).__name__


def manager_of_one(rank: int, path: str) -> list[int]:
    """One rank keeps checkpoints of its own."""
    if rank == 0:
        return []
    with CheckpointManager(path, checkpointer=Checkpointer(alone=True, timeout=LONG), timeout=LONG) as manager:
        manager.save(1, {"t": torch.ones(3)})
        return manager.steps()


def overwritten_load(rank: int, path: str, at: str, share: bool) -> float:
    """Rank 1 overwrites a checkpoint alone, while both load it; the value that this rank ends with."""
    engine = Checkpointer(timeout=30, commit_timeout=30, share_reads=share)
    live = {"t": torch.zeros(1 << 20)}
    engine.save({"t": torch.ones(1 << 20)}, path)
    left = [2.0]

    def overwriting(call: Any) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            found = call(*args, **options) if at == "manifest" else None
            while left:
                Checkpointer(alone=True).save({"t": torch.full((1 << 20,), left.pop())}, path)
            return found if at == "manifest" else call(*args, **options)

        return called

    owner, name = (commit, "read_for_all") if at == "manifest" else (loading, "read_together")
    with mock.patch.object(owner, name, (overwriting if rank == 1 else lambda call: call)(getattr(owner, name))):
        engine.load(path, live)
    (value,) = live["t"].unique().tolist()
    dist.barrier()
    return value


def owed_in_a_fork(rank: int, path: str) -> tuple[int, int]:
    """How much this rank has said that others may not have heard, and what a child that it forks has of that."""
    Checkpointer(timeout=30).save({"t": torch.zeros(3)}, path)
    owed = sum(map(len, coordinated._unheard.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it has threads, and the child does nothing with them
        child = os.fork()
    if child == 0:
        os._exit(sum(map(len, coordinated._unheard.values())))
    return owed, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
