"""Which threads a rank's collectives run in. Runs in the processes of `ranks`."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives, distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gates import SECONDS
from shardckpt import Checkpointer, commit

_VERBS = ("reduce", "gather", "scatter", "broadcast", "barrier", "all_to_all", "alltoall", "send", "recv", "new_group")


@contextmanager
def recording() -> Iterator[set[tuple[str, str]]]:
    """What calls of collectives are made in here, however they are reached from Python: each name, and its thread's."""
    seen: set[tuple[str, str]] = set()

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def called(*args: Any, **options: Any) -> Any:
            seen.add((name, threading.current_thread().name))
            return call(*args, **options)

        return called

    with ExitStack() as stack:
        for place in (dist, distributed_c10d, _functional_collectives, dist.ProcessGroup):
            names = [name for name in dir(place) if any(verb in name for verb in _VERBS) and not name.startswith("_")]
            for name in names:
                call = getattr(place, name)
                if callable(call) and not isinstance(call, type):
                    where = f"{place.__name__.rpartition('.')[2]}.{name}"
                    stack.enter_context(mock.patch.object(place, name, noting(where, call)))
        yield seen


def _model(layout: str) -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 6))
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if layout == "fsdp2":
        fully_shard(net[0], mesh=mesh)
        return fully_shard(net, mesh=mesh)
    return parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def training_beside_saves(rank: int, folder: str, layout: str) -> dict[str, Any]:
    """Steps of training while saves of each kind are in flight, and a load for which the ranks share their reads."""
    written, put = threading.Event(), commit.put_rank_manifest

    def put_late(*args: Any) -> Any:
        assert written.wait(SECONDS)  # until training has gone on for a while
        return put(*args)

    with recording() as seen, mock.patch.object(commit, "put_rank_manifest", put_late):
        net = _model(layout)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        state = {"net": net, "optimizer": optimizer, "loose": torch.arange(1000.0)}

        def train() -> None:
            net(torch.arange(32.0).view(4, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            dist.all_reduce(torch.ones(1))

        train()
        for overlap in (None, "step"):
            written.clear()
            with_overlap: Any = overlap
            made = Checkpointer(timeout=60, commit_timeout=60, overlap=with_overlap, share_reads=True)
            with closing(made) as engine:
                engine.prepare(state)
                saves = [engine.async_save(state, f"{folder}/{overlap}-{n}", state_version=1) for n in range(2)]
                for _ in range(3):
                    train()
                written.set()
                for save in saves:
                    save.result(SECONDS)
                received = engine.load(f"{folder}/{overlap}-1", state).bytes_received
    return {"seen": seen, "received": received}


def in_a_thread(rank: int) -> set[tuple[str, str]]:
    """What the recorder sees of collectives, in either way, that are no business of a thread."""

    def reduce() -> None:
        dist.all_reduce(torch.ones(1))
        group: Any = dist.group.WORLD
        _functional_collectives.all_reduce(torch.ones(1), "sum", group)
        group.allreduce([torch.ones(1)]).wait()

    with recording() as seen:
        thread = threading.Thread(target=reduce, name="bad")
        thread.start()
        thread.join()
    return seen
