"""What the ranks do in the tests of who writes what they all hold. Runs in the processes of `ranks`."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import shardckpt
from multirank.matrix_layouts import cut
from shardckpt import Checkpointer

MIB = 1 << 20


def filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(float(parameter.numel())).view(parameter.shape) + number)
    return model


def big() -> nn.Module:
    """About 14 MiB in tensors of very different sizes."""
    return filled(nn.Sequential(nn.Linear(1024, 2048), nn.Linear(3, 5), nn.Linear(1024, 1500)))


def write_replicated(rank: int, path: str, shape: tuple[int, ...] | None) -> dict[str, int]:
    """Save a model that is DDP's, or sharded over the last of a mesh's dimensions and replicated over the first."""
    if shape is None:
        model: nn.Module = nn.parallel.DistributedDataParallel(big())
    else:
        model = fully_shard(big(), mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"momentum_buffer": parameter.detach() * 2}
    report = Checkpointer(timeout=60).save({"model": model, "optimizer": optimizer}, path)
    return {"written": report.rank_nbytes, "all": report.nbytes}


def whole_is(path: str) -> bool:
    """Whether a checkpoint of `write_replicated` has every value."""
    loaded, model = shardckpt.load(path), big()
    state = loaded["optimizer"]["state"]
    return all(
        torch.equal(loaded["model"][name], parameter) and torch.equal(state[index]["momentum_buffer"], parameter * 2)
        for index, (name, parameter) in enumerate(model.named_parameters())
    )


class Buffered(nn.Module):
    """A parameter, and a buffer long enough to be worth splitting."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("seen", torch.full((3 * MIB // 4,), float(rank)))
        self.norm = nn.BatchNorm1d(4)
        self.norm.running_mean.fill_(rank)


def buffers_that_differ(rank: int, path: str, kind: str) -> dict[str, list[float]]:
    """Which values of a buffer that each rank fills with its own number get into the checkpoint."""
    model: Any = Buffered(rank)
    options: dict[str, Any] = {}
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, init_sync=False)
    elif kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    elif kind == "not on rank 0":
        if rank == 0:
            model = nn.ReLU()
    elif kind == "declared":
        options["replicated"] = ["*.seen"]
    Checkpointer(timeout=60, **options).save({"model": model}, path)
    dist.barrier()
    loaded = shardckpt.load(path)["model"]
    dist.barrier()
    return {name: sorted(set(loaded[name].tolist())) for name in ("seen", "norm.running_mean")}


# -- optimizers that work on local tensors ----------------------------------------------------------------------------


class Local(torch.optim.Optimizer):
    """Keeps plain state for the local part of a DTensor, different on each rank: nothing says that it is a part."""

    def __init__(self, parameters: Any, *, factored: bool = False) -> None:
        super().__init__(parameters, {"lr": 1.0})
        self.factored = factored

    def fill(self, full: Tensor) -> None:
        """State as if from ``full``, for every parameter."""
        for parameter in self.param_groups[0]["params"]:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            layout = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
            part = full.clone() if layout is None else cut(full, *layout).to_local()
            self.state[parameter] = {"step": torch.tensor(3.0), "average": part}
            if self.factored:
                self.state[parameter]["column"] = part.sum(0)
            assert part.shape == local.shape


def local_state(rank: int, path: str, rows: int, columns: int) -> bool:
    """Local state is a shard like its parameter's: it comes back to another layout, whole, and in place."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = torch.arange(float(rows * columns)).view(rows, columns)

    def make(dim: int, value: Tensor) -> tuple[nn.Parameter, Local]:
        parameter = nn.Parameter(cut(torch.zeros(rows, columns), mesh, (Shard(dim),)))
        optimizer = Local([parameter])
        optimizer.fill(value)
        return parameter, optimizer

    parameter, optimizer = make(0, full)
    shardckpt.save({"w": parameter, "optimizer": optimizer}, path)
    dist.barrier()
    whole = shardckpt.load(path)["optimizer"]["state"][0]
    assert torch.equal(whole["average"], full)
    assert whole["step"] == 3
    other, restored = make(1, torch.zeros(rows, columns))
    average = restored.state[other]["average"]
    shardckpt.load(path, {"w": other, "optimizer": restored})
    assert restored.state[other]["average"] is average
    assert torch.equal(average, cut(full, mesh, (Shard(1),)).to_local())
    plain = nn.Parameter(torch.zeros(rows, columns))
    bare = torch.optim.SGD([plain])
    shardckpt.load(path, {"w": plain, "optimizer": bare})
    return torch.equal(bare.state[plain]["average"], full)


def unknown_state(rank: int, path: str, **options: Any) -> list[float]:
    """Plain state of a sharded parameter that is no part of anything: refused, unless it is declared equal."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameter = nn.Parameter(cut(torch.zeros(8, 6), mesh, (Shard(0),)))
    optimizer = Local([parameter], factored=True)
    optimizer.fill(torch.ones(8, 6))
    Checkpointer(timeout=60, **options).save({"w": parameter, "optimizer": optimizer}, path)
    dist.barrier()
    return shardckpt.load(path)["optimizer"]["state"][0]["column"].tolist()


def sparse_parts(rank: int, path: str, entries: list[int]) -> list[list[float]]:
    """A sparse tensor of which each rank has other entries, or another number of them."""
    count = entries[rank]
    indices = torch.stack([torch.arange(count), torch.full((count,), rank)])
    value = torch.sparse_coo_tensor(indices, torch.full((count,), float(rank + 1)), (4, 4), is_coalesced=True)
    Checkpointer(timeout=60).save({"table": value}, path)
    dist.barrier()
    loaded = shardckpt.load(path)["table"].to_dense().tolist()
    dist.barrier()
    return loaded
