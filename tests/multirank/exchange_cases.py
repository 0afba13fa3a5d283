"""What the ranks do in the tests of loads that share their reads. Runs in the processes of `ranks`."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import shardckpt
from shardckpt import Checkpointer, codecs
from shardckpt.commit import reading
from shardckpt.reader import common, exchange, fetch, gains, group, rounds, shards, targets, together, wants
from shardckpt.storage import Storage
from shardckpt.writer import cells, output, streams
from storage.wrappers import CountingStorage, FaultyStorage, WrapperStorage

CELL = 64 << 10
TENSORS = {
    "big": ((4099, 512), torch.float32),
    "half": ((1031, 514), torch.bfloat16),
    "cube": ((66, 48, 36), torch.float64),
    "bytes": ((1 << 20,), torch.uint8),
    "empty": ((0, 4), torch.float32),
    "scalar": ((), torch.float32),
    **{f"small.{number}": ((5, 7), torch.float32) for number in range(40)},
}
NBYTES = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in TENSORS.values())


@contextmanager
def small_scale() -> Iterator[None]:
    """Cells, rounds and thresholds of a sixteenth, so that a few MiB are shared as hundreds are."""
    small = {"DIGEST_BLOCK": CELL, "LIMIT": 1 << 20, "MIN_RANGE": CELL, "_GAIN_BYTES": 1 << 20}
    small |= {"_TRIAL_ROUND_BYTES": 6 * CELL, "_SLACK": CELL, "_SMALL": CELL, "_GAIN_BYTES_PER_PART": 1 << 10}
    small |= {"_APART": CELL}
    with ExitStack() as stack:
        for module in (
            codecs,
            cells,
            common,
            output,
            streams,
            fetch,
            shards,
            targets,
            wants,
            gains,
            exchange,
            rounds,
            together,
        ):
            for name, value in small.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        yield


@contextmanager
def storage_made(wrap: Callable[[Storage], Storage]) -> Iterator[None]:
    """Loads read through what ``wrap`` makes of their storage."""
    original = reading.open_storage
    with mock.patch.object(reading, "open_storage", lambda *a, **k: wrap(original(*a, **k))):
        yield


@cache
def full(name: str) -> Tensor:
    shape, dtype = TENSORS[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    count = torch.Size(shape).numel() * dtype.itemsize
    # Small numbers, so that compression has something to do and every dtype has each of them.
    raw = torch.randint(100, (count // dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.to(dtype).view(shape)


def placed(tensor: Tensor, kind: str, mesh: DeviceMesh) -> Any:
    """A tensor as one rank holds it, cut without communication."""
    placement: Placement = Replicate()
    if kind == "rows" and tensor.ndim:
        placement = Shard(0)
    elif kind == "columns" and tensor.ndim:
        placement = Shard(tensor.ndim - 1)
    elif kind == "strided" and tensor.ndim:
        placement = _StridedShard(0, split_factor=2)
    elif kind == "plain":
        return tensor.clone()
    if isinstance(placement, Replicate):
        return DTensor.from_local(tensor.clone(), mesh, [placement], run_check=False)
    parts, _ = placement._split_tensor(tensor, mesh.size(), with_padding=False)
    local = parts[mesh.get_local_rank()].clone()
    return DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=tensor.shape, stride=tensor.contiguous().stride()
    )


def state(kind: str, *, fill: bool, dtype: torch.dtype | None = None) -> dict[str, Any]:
    found = {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in TENSORS:
        tensor = full(name)
        tensor = tensor if dtype is None or name == "bytes" else tensor.to(dtype)
        found[name] = placed(tensor if fill else torch.zeros_like(tensor), kind, mesh)
    return found


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def clock(counting: list[CountingStorage], slow: str | None) -> Iterator[None]:
    """Replace the clock of trials by one that only reading moves, or only passing on, however busy the machine is."""
    if slow is None:
        yield
        return
    swaps = 0
    transfer = rounds.transfer

    def counted(*args: Any) -> None:
        nonlocal swaps
        transfer(*args)
        swaps += 1

    def now() -> float:
        return sum(sum(storage.bytes_read.values()) for storage in counting) / 1e6 if slow == "storage" else swaps

    fake = mock.Mock(perf_counter=now)
    patches = (mock.patch.object(module, "time", fake) for module in (rounds, together))
    with mock.patch.object(rounds, "transfer", counted), ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def save(rank: int, path: str, compression: str | None = None) -> None:
    with small_scale():
        Checkpointer(timeout=60, compression=compression).save(state("rows", fill=True), path)


def load(
    rank: int,
    path: str,
    kind: str,
    share: Any = True,
    *,
    dtype: torch.dtype | None = None,
    slow: str | None = None,
    only: int | None = None,
    one_host: bool = False,
) -> dict[str, Any]:
    """Load in place as ``kind``; what this rank read and received.

    ``slow`` is what takes time by the clock of the trial, "storage" or "network". ``only``: all others want nothing.
    ``one_host``: ranks share a page cache, as they really do, and not as on hosts of their own.
    """
    counting: list[CountingStorage] = []

    def wrap(storage: Storage) -> Storage:
        counting.append(CountingStorage(storage))
        if one_host:
            counting[-1].read_cache = storage.read_cache
        return counting[-1]

    live = state(kind, fill=False, dtype=dtype) if only in (None, rank) else {}
    pointers = {name: local(tensor).data_ptr() for name, tensor in live.items()}
    with small_scale(), storage_made(wrap), clock(counting, slow):
        report = Checkpointer(timeout=60, commit_timeout=60, share_reads=share).load(
            path, live, convert_dtype=dtype is not None
        )
    expected = state(kind, fill=True, dtype=dtype)
    for name, tensor in live.items():
        assert torch.equal(local(tensor), local(expected[name])), name
        assert local(tensor).data_ptr() == pointers[name]
    read = {name: n for storage in counting for name, n in storage.bytes_read.items() if name != "manifest.json"}
    # The manifest is what every load reads; the report counts what it reads for tensors.
    assert report.bytes_read == sum(read.values())
    assert report.bytes_received == 0 or "received" in repr(report)
    return {
        "read": read,
        "received": report.bytes_received,
        "wanted": sum(local(tensor).numel() * TENSORS[name][1].itemsize for name, tensor in live.items()),
    }


def several(rank: int, path: str, kinds: list[tuple[str, Any]], **options: Any) -> list[dict[str, Any]]:
    return [load(rank, path, kind, share, **options) for kind, share in kinds]


def load_differently(rank: int, path: str) -> dict[str, Any]:
    """Rank 0 is told never to share, the others always."""
    return load(rank, path, "plain", rank != 0)


def in_new_groups(rank: int, path: str) -> list[dict[str, Any]]:
    """The default group is destroyed and made again between two loads."""
    first = load(rank, path, "plain")
    store = dist.distributed_c10d._get_default_store()
    size = dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo", rank=rank, world_size=size, store=dist.PrefixStore("again", store))
    return [first, load(rank, path, "columns")]


def fail(rank: int, path: str, share: Any, at: int) -> str:
    """Rank 1's storage fails at its read number ``at``; what this rank is told, and whether the next load works."""

    def wrap(storage: Storage) -> Storage:
        if rank != 1:
            return storage
        error = shardckpt.StorageError("the cable is out")
        return FaultyStorage(storage, "read_into", error, first=at, last=10**6)

    live = state("plain", fill=False)
    try:
        with small_scale(), storage_made(wrap):
            Checkpointer(timeout=60, commit_timeout=60, share_reads=share).load(path, live)
    except shardckpt.StorageError as error:
        load(rank, path, "columns", share)
        return str(error)
    return "loaded"


def without_memory(rank: int, path: str) -> str:
    """Rank 1 has no memory to exchange through; what this rank is told."""

    def room(nbytes: int) -> Tensor:
        raise MemoryError("not another byte")

    live = state("plain", fill=False)
    group.leave_group()  # it is in making the first that others would wait
    try:
        with small_scale(), ExitStack() as stack:
            if rank == 1:
                stack.enter_context(mock.patch.object(rounds, "_room", room))
            Checkpointer(timeout=20, commit_timeout=20, share_reads=True).load(path, live)
    except shardckpt.ShardckptError as error:
        return str(error)
    return "loaded"


def after_an_interruption(rank: int, path: str) -> list[dict[str, Any]]:
    """Between two loads rank 0 alone closes its group, as when it is interrupted in the middle of an exchange."""
    first = load(rank, path, "plain")
    if rank == 0:
        group.leave_group()
    return [first, load(rank, path, "columns")]


def damaged(rank: int, path: str, share: Any) -> str:
    live = state("columns", fill=False)
    try:
        with small_scale():
            Checkpointer(timeout=60, commit_timeout=60, share_reads=share).load(path, live)
    except shardckpt.CorruptCheckpointError as error:
        return str(error)
    return "loaded"


class _Noting(WrapperStorage):
    """Notes how the long reads are done, on a host whose cache has nothing yet."""

    def __init__(self, inner: Storage, cache: str) -> None:
        super().__init__(inner)
        self.read_cache = cache
        self.cached: set[bool] = set()

    def read_into(self, name: str, offset: int, into: memoryview, *, cached: bool = True) -> None:
        if len(into) >= CELL:
            self.cached.add(cached)
        super().read_into(name, offset, into, cached=cached)


def ways(rank: int, path: str, kind: str, hosts: int) -> set[bool]:
    """Whether reads go through the page cache, where the ranks are spread over some hosts."""
    storages: list[_Noting] = []

    def noting(storage: Storage) -> Storage:
        storages.append(_Noting(storage, f"host {rank % hosts}"))
        return storages[-1]

    live = state(kind, fill=False)
    with small_scale(), storage_made(noting):
        Checkpointer(timeout=60, share_reads=False).load(path, live)
    assert all(torch.equal(local(live[name]), local(tensor)) for name, tensor in state(kind, fill=True).items())
    return storages[-1].cached


class _Deadly(WrapperStorage):
    def __init__(self, inner: Storage, at: int) -> None:
        super().__init__(inner)
        self.left = at

    def called(self, method: str, name: str, nbytes: int) -> None:
        self.left -= method == "read_into"
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(rank: int, path: str, victim: int, at: int) -> str:
    """One rank is killed in mid-load; what the others are told."""
    live = state("plain", fill=False)
    try:
        with small_scale(), storage_made(lambda storage: _Deadly(storage, at) if rank == victim else storage):
            Checkpointer(timeout=60, commit_timeout=60, share_reads=True).load(path, live)
    except shardckpt.RankTimeoutError as error:
        return str(error)
    return "loaded"


def interrupted(rank: int, path: str, who: int) -> str:
    """Ctrl-C on one rank between two steps of an exchange; what this rank is told, and whether the next load works."""

    def interrupt() -> float:
        raise KeyboardInterrupt

    live, told = state("plain", fill=False), "loaded"
    group.leave_group()
    try:
        with small_scale(), ExitStack() as stack:
            if rank == who:
                stack.enter_context(mock.patch.object(rounds, "time", mock.Mock(perf_counter=interrupt)))
            Checkpointer(timeout=600, commit_timeout=600, share_reads=True).load(path, live)
    except shardckpt.ShardckptError as error:
        told = str(error)
    except KeyboardInterrupt:
        told = "KeyboardInterrupt"
    load(rank, path, "columns", True)
    return told


def standing_still(rank: int, death: Any, path: str, who: int) -> str:
    """One rank stops in the middle of reading, and is as good as dead; what the others are told."""

    class Still(WrapperStorage):
        left = 3

        def called(self, method: str, name: str, nbytes: int) -> None:
            self.left -= method == "read_into"
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGSTOP)

    live = state("plain", fill=False)
    try:
        with small_scale(), storage_made(lambda storage: Still(storage) if rank == who else storage):
            Checkpointer(timeout=30, commit_timeout=2, share_reads=True).load(path, live)
    except shardckpt.RankTimeoutError as error:
        return str(error)
    return "loaded"


ROWS, COLUMNS = 40_003, 1025
"""156 MiB of float32, in pieces of more than 40 MiB on 2 and 3 ranks and 39.1 on 4, that no block size divides."""


def _rows(rank: int, fill: float) -> DTensor:
    size = dist.get_world_size()
    step = -(-ROWS // size)
    start, stop = min(rank * step, ROWS), min((rank + 1) * step, ROWS)
    tensor = torch.arange(start, stop, dtype=torch.float32)[:, None].expand(-1, COLUMNS) * fill
    mesh = init_device_mesh("cpu", (size,))
    shape = torch.Size((ROWS, COLUMNS))
    return DTensor.from_local(tensor.contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=(COLUMNS, 1))


def save_large(rank: int, path: str) -> None:
    Checkpointer(timeout=60).save({"w": _rows(rank, 1.0)}, path)


def load_large(rank: int, path: str) -> dict[str, Any]:
    """Along the saved dimension with everything at its default; bytes read by file, and bytes wanted."""
    live = _rows(rank, 0.0)
    counting: list[CountingStorage] = []

    def wrap(storage: Storage) -> Storage:
        counting.append(CountingStorage(storage))
        return counting[-1]

    with storage_made(wrap):
        shardckpt.load(path, {"w": live})
    assert torch.equal(live.to_local(), _rows(rank, 1.0).to_local())
    read = {Path(name).name: n for storage in counting for name, n in storage.bytes_read.items()}
    return {"read": read, "wanted": live.to_local().nbytes}
