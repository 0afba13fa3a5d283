"""Those from outside torch who save and load states of several ranks. They take part where they are installed."""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.environment import PEERS
from benchmarks.states import State

SNAPSHOT, CHECKPOINTING = PEERS


class TorchSnapshot:
    """Each rank's tensors as its own; what all ranks hold alike is declared replicated, and they share the writing."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._api: Any = import_module(SNAPSHOT)

    def save(self, state: State, place: str) -> None:
        self._api.Snapshot.take(place, self._of(state), pg=self._group, replicated=self._alike(state))
        sync(place)

    def load(self, state: State, place: str) -> None:
        self._api.Snapshot(place, pg=self._group).restore(self._of(state))  # into the tensors that it is given

    def start(self, state: State, place: str) -> "Synced":
        pending = self._api.Snapshot.async_take(place, self._of(state), pg=self._group, replicated=self._alike(state))
        return Synced(pending.wait, pending.done, place)

    def close(self) -> None: ...

    def _of(self, state: State) -> dict[str, Any]:
        return {"state": self._api.StateDict(**dict(state.tensors()))}

    def _alike(self, state: State) -> list[str]:
        return ["**"] if state.replicated else []


class TorchCheckpointing:
    """Its manager, with a thread for each item's file, and no resharder: each rank reads the files that it wrote.

    Without direct I/O, its default, which fails on ext4 (EINVAL) as soon as a tensor is not in whole pages of the file.
    """

    def __init__(self, *, asynchronous: bool = False) -> None:
        api: Any = import_module(CHECKPOINTING)
        writer = api.CheckpointWriterConfig(file_write_max_threads=4)
        config = (api.AsyncCheckpointSaverConfig if asynchronous else api.SyncCheckpointSaverConfig)(
            writer_config=writer
        )
        disk = import_module(f"{CHECKPOINTING}.storage.filesystem").LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = api.CheckpointManager(api.CheckpointManager.Config(save=config, storage_config=disk))

    def save(self, state: State, place: str) -> None:
        self._manager.save(place, _items(state.for_dcp()))
        sync(place)

    def load(self, state: State, place: str) -> None:
        loaded = state.for_dcp()
        self._manager.load(place, into=_items(loaded))
        state.take(loaded)

    def start(self, state: State, place: str) -> "Synced":
        pending = self._manager.save(place, _items(state.for_dcp()))
        with self._manager.lock():  # as around the step of an optimizer, which has to wait for the copy
            return Synced(pending.result, pending.done, place)

    def close(self) -> None:
        self._manager.close()


class Synced:
    """A save under way whose files are synced in the end, which its library leaves out."""

    def __init__(self, wait: Callable[[], Any], done: Callable[[], bool], place: str) -> None:
        self._wait, self.done, self._place = wait, done, place

    def result(self, timeout: float | None = None) -> None:
        self._wait()
        sync(self._place)


def sync(place: str) -> None:
    """Make durable what all ranks have written at ``place``; each syncs a part of the files."""
    dist.barrier()
    files = sorted(path for path in Path(place).rglob("*") if path.is_file())
    for path in files[dist.get_rank() :: dist.get_world_size()]:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    dist.barrier()


def installed() -> list[str]:
    """Which of `PEERS` can take part."""
    return [name for name in PEERS if find_spec(name)]


def peers(group: dist.ProcessGroup) -> dict[str, TorchSnapshot | TorchCheckpointing]:
    """Those that are installed, by name."""
    found: dict[str, TorchSnapshot | TorchCheckpointing] = {}
    for name in installed():
        found[name] = TorchSnapshot(group) if name == SNAPSHOT else TorchCheckpointing()
    return found


def asynchronous(name: str, group: dist.ProcessGroup) -> TorchSnapshot | TorchCheckpointing:
    """The one of `installed` for asynchronous saves."""
    return TorchSnapshot(group) if name == SNAPSHOT else TorchCheckpointing(asynchronous=True)


def _items(state: dict[str, Any]) -> dict[str, Any]:
    """What goes into files of their own: names of files must do for its keys."""
    return state if all(isinstance(value, dict) for value in state.values()) else {"state": state}
