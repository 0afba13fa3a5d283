"""What ranks do in the tests of sharded models on the meta device."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shardckpt
from states import TinyNet, digest_of


def _sharded(kind: Any, *args: Any, parts: tuple[str, ...] = ()) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model: nn.Module = kind(*args)
    for part in parts:
        fully_shard(model.get_submodule(part), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(12).reshape(3, 4)).square().sum().backward()
    optimizer.step()


def load_meta_fsdp(rank: int, path: str, model_first: bool) -> dict[str, Any]:
    """A meta model under fully_shard, and an optimizer over it, filled, then trained a step."""
    model = _sharded(TinyNet, parts=("hidden",))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    state = {"model": model, "optimizer": optimizer} if model_first else {"optimizer": optimizer, "model": model}
    report = shardckpt.load(path, state)
    filled = digest_of(state)
    same = all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    tied = model.head.weight is model.embed.weight
    sharded = all(isinstance(p, DTensor) and p.device.type == "cpu" and p.requires_grad for p in parameters)
    _step(model, optimizer)
    return {
        "digest": filled,
        "stepped": digest_of(state),
        "same": same and tied and sharded,
        "left": report.left_on_meta,
    }


def load_and_step(rank: int, path: str) -> dict[str, Any]:
    """The same with a model that had memory from the start, and is not sharded."""
    model = TinyNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    shardckpt.load(path, state)
    filled = digest_of(state)
    _step(model, optimizer)
    return {"digest": filled, "weights": [p.detach().clone() for p in model.parameters()]}


def weights_after_a_step(rank: int, path: str) -> list[torch.Tensor]:
    """The whole weights of a meta model under fully_shard, filled and trained a step."""
    model = _sharded(TinyNet)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shardckpt.load(path, {"model": model, "optimizer": optimizer})
    _step(model, optimizer)
    return [p.full_tensor().detach() for p in model.parameters()]


def reads_its_own_rows(rank: int, path: str, rows: int) -> tuple[int, bool]:
    """Bytes that this rank read of a big matrix for its shard of a meta model, and whether they are right."""
    full = torch.arange(rows * 1024, dtype=torch.float32).reshape(rows, 1024)
    shardckpt.save({"model": {"weight": full}}, path, replicated=True)
    model = _sharded(nn.Linear, 1024, rows, False)
    report = shardckpt.load(path, {"model": model})
    mesh = model.weight.device_mesh
    expected = distribute_tensor(full, mesh, [Shard(0)]).to_local()
    return report.bytes_read, torch.equal(model.weight.to_local(), expected)


def missing_on_one_rank(rank: int, path: str) -> str:
    """Rank 1 has a module more, which the checkpoint lacks: every rank refuses, and stays on meta."""
    model = _sharded(TinyNet)
    state: dict[str, Any] = {"model": model}
    if rank == 1:
        state["extra"] = nn.Linear(2, 2, device="meta")
    try:
        shardckpt.load(path, state)
    except shardckpt.StateMismatchError as error:
        assert all(p.is_meta for p in model.parameters())
        return str(error)
    return "loaded"
