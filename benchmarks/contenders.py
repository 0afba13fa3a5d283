"""Those who save and load, each with the best settings that its documentation offers."""

import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader

import shardckpt
from benchmarks import peers
from benchmarks.states import State


class Pending(Protocol):
    """A save under way."""

    def done(self) -> bool: ...

    def result(self, timeout: float | None = None) -> Any: ...


class Contender(Protocol):
    """Saves what is durable on return, and loads it into the live state."""

    def save(self, state: State, place: str) -> Any: ...

    def load(self, state: State, place: str) -> Any: ...


class AsyncContender(Protocol):
    """Starts a save and returns when the state may change."""

    def start(self, state: State, place: str) -> Pending: ...

    def close(self) -> None: ...


class Shardckpt:
    """What all this is about; ``options`` are those of its Checkpointer."""

    def __init__(self, **options: Any) -> None:
        self.checkpointer = shardckpt.Checkpointer(replicated=True, **options)

    def save(self, state: State, place: str) -> Any:
        return self.checkpointer.save(state.live, place)

    def load(self, state: State, place: str) -> Any:
        return self.checkpointer.load(place, state.live)

    def start(self, state: State, place: str) -> Pending:
        return self.checkpointer.async_save(state.live, place)

    def close(self) -> None:
        self.checkpointer.close()


class PreparedShardckpt(Shardckpt):
    """The same, told before training what it will save. Training goes on meanwhile: the wait is in no measurement."""

    def prepare(self, state: State) -> None:
        self.checkpointer.prepare(state.live)
        time.sleep(1 + state.held_bytes() / 0.5e9)  # memory is touched for the first time at 0.5 GB/s and more


class Dcp:
    """torch.distributed.checkpoint: ``sync_files`` is its default, the threads are for the caller to find.

    Its plans are cached, as ours are.
    """

    def __init__(self, group: dist.ProcessGroup, threads: int) -> None:
        self.group, self.threads = group, threads

    def save(self, state: State, place: str) -> Any:
        dcp_save(state.for_dcp(), storage_writer=self.writer(place), planner=self.planner(), process_group=self.group)

    def load(self, state: State, place: str) -> Any:
        loaded = state.for_dcp()
        reader: StorageReader = FsspecReader(place) if "://" in place else FileSystemReader(place)
        dcp_load(loaded, storage_reader=reader, process_group=self.group)
        state.take(loaded)

    def planner(self) -> DefaultSavePlanner:
        return DefaultSavePlanner(enable_plan_caching=True)

    def writer(self, place: str) -> FileSystemWriter:
        if "://" in place:  # nothing to sync there, and it would sync the local disks instead
            return FsspecWriter(place, thread_count=self.threads, sync_files=False)
        return FileSystemWriter(place, thread_count=self.threads)


class AsyncDcp:
    """Its ``async_save`` in a thread or a process.

    ``keep`` uses one stager for all saves, which then reuses its memory: pinned where there is CUDA, and shared where
    another process is to read it. Otherwise it is the stager that DCP makes by itself for each save.
    """

    def __init__(self, group: dist.ProcessGroup, *, process: bool, keep: bool) -> None:
        self.dcp = Dcp(group, threads=1)
        self.kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        cuda = torch.cuda.is_available()
        self.stager = DefaultStager(StagingOptions(cuda, process, cuda, cuda)) if keep else None

    def start(self, state: State, place: str) -> Pending:
        pending = dcp_async_save(
            state.for_dcp(),
            storage_writer=self.dcp.writer(place),
            planner=self.dcp.planner(),
            process_group=self.dcp.group,
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
        )
        if isinstance(pending, AsyncSaveResponse):
            staged: Future[Any] = pending.staging_completion
            staged.result()  # before that the state may not change
            return pending.upload_completion
        return pending

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class TorchSave:
    """torch.save of the whole state by rank 0, and torch.load of it by all."""

    def save(self, state: State, place: str) -> Any:
        whole = state.whole()
        if dist.get_rank() == 0:
            Path(place).mkdir(exist_ok=True)
            with (Path(place) / "rank0.pt").open("wb") as file:
                torch.save(whole, file)
                file.flush()
                os.fsync(file.fileno())

    def load(self, state: State, place: str) -> Any:
        # Mapped, so that a rank reads what it takes, and no rank holds the whole a second time.
        state.take_whole(torch.load(Path(place) / "rank0.pt", map_location="cpu", weights_only=True, mmap=True))


class Safetensors:
    """A file of what each rank holds; where all hold the same, one file by rank 0."""

    def save(self, state: State, place: str) -> Any:
        Path(place).mkdir(exist_ok=True)
        if dist.get_rank() == 0 or not state.replicated:
            path = self.file(state, place)
            save_file(dict(state.tensors()), path)
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def load(self, state: State, place: str) -> Any:
        # Tensor by tensor: load_file would hold all of them a second time.
        with safe_open(self.file(state, place), framework="pt") as stored:
            for name, tensor in state.tensors():
                tensor.copy_(stored.get_tensor(name))

    def file(self, state: State, place: str) -> Path:
        return Path(place) / f"{0 if state.replicated else dist.get_rank()}.safetensors"


def savers(group: dist.ProcessGroup, storage: str) -> dict[str, Contender]:
    """Who can save to a storage, by name. DCP's writer takes part with each number of threads."""
    found: dict[str, Contender] = {"shardckpt": Shardckpt()}
    for threads in (1, 2, 4):
        found[f"DCP, {threads} thread{'s' * (threads > 1)}"] = Dcp(group, threads)
    if storage == "local":
        found |= {"torch.save": TorchSave(), "safetensors": Safetensors(), **peers.peers(group)}
    return found


def loaders(group: dist.ProcessGroup, storage: str) -> dict[str, Contender]:
    """Who can load. DCP reads with one thread, however many wrote."""
    found: dict[str, Contender] = {"shardckpt": Shardckpt(), "DCP": Dcp(group, 1)}
    if storage == "local":
        found |= {"torch.load": TorchSave(), "safetensors": Safetensors(), **peers.peers(group)}
    return found


OVERLAP = "shardckpt, overlap='step'"
ASYNC = (
    "shardckpt",
    "shardckpt, prepared",
    OVERLAP,
    "DCP, thread",
    "DCP, thread, kept stager",
    "DCP, process, kept stager",
    *peers.installed(),
)


def async_contender(name: str, group: dist.ProcessGroup) -> AsyncContender:
    """One of `ASYNC`."""
    if name in peers.installed():
        return peers.asynchronous(name, group)
    match name:
        case "shardckpt":
            return Shardckpt()
        case "shardckpt, prepared":
            return PreparedShardckpt()
        case name if name == OVERLAP:
            return Shardckpt(overlap="step")
    return AsyncDcp(group, process="process" in name, keep="kept" in name)
