"""What the ranks do in the test of wrappers: one model under every name that wrappers give its parts."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardckpt
from multirank.matrix import images, spoil
from shardckpt.state import parameter_names


class Two(nn.Module):
    """Two layers, the inner one below another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.rest = nn.Sequential(nn.Linear(6, 4), nn.Dropout())


def _checkpointed(model: nn.Module) -> nn.Module:
    model.first = checkpoint_wrapper(model.first)
    model.rest[0] = checkpoint_wrapper(model.rest[0])
    return model


def _compiled_inside(model: nn.Module) -> nn.Module:
    model.first = torch.compile(model.first)
    return model


def _sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.rest, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
    "DDP": nn.parallel.DistributedDataParallel,
    "compiled DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
    "DDP of compiled": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
    "checkpointed FSDP2": lambda model: _sharded(_checkpointed(model)),
    "compiled, checkpointed FSDP2": lambda model: torch.compile(_sharded(_compiled_inside(_checkpointed(model)))),
}


def make(wrapper: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = WRAPPERS[wrapper](Two())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"momentum_buffer": parameter.detach() * 2}
    return model, optimizer


def every_wrapper_into_every_other(rank: int, root: str) -> set[str]:
    """Save under each wrapper, restore under each; returns the names that they gave the parameters."""
    found: set[str] = set()
    for source in WRAPPERS:
        model, optimizer = make(source, seed=1)
        found.add(" ".join(sorted(parameter_names({"model": model}).values())))
        shardckpt.save({"model": model, "optimizer": optimizer}, f"{root}/{source}")
    for target in WRAPPERS:
        model, optimizer = make(target, seed=1)
        expected = images(model, {"": optimizer})
        for source in WRAPPERS:
            spoil(model, {"": optimizer})
            shardckpt.load(f"{root}/{source}", {"model": model, "optimizer": optimizer})
            assert images(model, {"": optimizer}) == expected, (source, target)
    return found
