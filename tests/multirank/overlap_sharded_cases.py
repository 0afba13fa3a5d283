"""Saves that copy beside training where parameters and optimizer state are DTensors: FSDP2 and tensor parallel."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardckpt
from gates import SECONDS, beside, gate, same
from shardckpt import Checkpointer


class Trained:
    """A sharded model whose optimizer has state, and a save of it that stands for what it was at the call."""

    def __init__(self, layout: str, folder: str, **options: Any) -> None:
        torch.manual_seed(3)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.net = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 6))
        if layout == "fsdp2":
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        else:
            parallelize_module(self.net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        self.layout = layout
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.1, **options)
        self.backward(1)
        self.optimizer.step()
        self.state = {"net": self.net, "optimizer": self.optimizer}
        self.folder = f"{folder}/{layout}"
        self.engine = Checkpointer(timeout=30, commit_timeout=60, overlap="step")
        self.engine.save(self.state, f"{self.folder}/reference")

    def backward(self, number: int) -> None:
        scale = number + (dist.get_rank() if self.layout == "fsdp2" else 0)
        self.net(torch.arange(32.0).view(4, 8) * scale / 32).square().sum().backward()

    def is_right(self, name: str) -> bool:
        return same(*(shardckpt.load(f"{self.folder}/{n}") for n in ("reference", name)))

    def changed(self) -> bool:
        """Whether the live state is another than what was saved."""
        self.engine.save(self.state, f"{self.folder}/after")
        return not self.is_right("after")


def _step(trained: Trained, how: str) -> None:
    """What follows upon the save, up to the step."""
    if how == "accumulated":
        for number in range(2, 5):
            trained.backward(number)
    else:
        trained.backward(2)
    trained.optimizer.step()
    trained.optimizer.zero_grad()


def _skipped(trained: Trained) -> None:
    """What a scaler does that has found an infinite gradient: no step; and then one."""
    trained.backward(2)
    trained.optimizer.zero_grad()
    _step(trained, "plain")


def step_while_copying(rank: int, folder: str, layout: str, how: str) -> dict[str, Any]:
    """A save with training going on directly after it, while its copy waits until a step asks for it."""
    options = {"foreach": {"foreach": True}, "fused": {"fused": True}}.get(how, {})
    trained = Trained(layout, f"{folder}/{how}", **options)
    train: Callable[[], None] = (lambda: _skipped(trained)) if how == "skipped" else (lambda: _step(trained, how))
    with gate() as held:
        pending = trained.engine.async_save(trained.state, f"{trained.folder}/ck")
        told: dict[str, Any] = {"staged": pending.staged}
        errors: list[BaseException] = []

        def guarded() -> None:
            try:
                train()
            except BaseException as error:  # noqa: BLE001 - a test is to see it
                errors.append(error)

        thread = beside(guarded)
        told["asked"] = held.asked.wait(SECONDS)
        held.open.set()
        thread.join()
    pending.result(SECONDS)
    told |= {"errors": errors, "same": trained.is_right("ck"), "changed": trained.changed()}
    trained.engine.close()
    return told


def change_while_copying(rank: int, folder: str, layout: str, what: str) -> str:
    """What is told of a save during which rank 0 changed its part of a parameter other than by a step."""
    trained = Trained(layout, f"{folder}/{what}")
    weight: Any = trained.net[0].weight
    with gate() as held:
        pending = trained.engine.async_save(trained.state, f"{trained.folder}/ck")
        with torch.no_grad():
            match what:
                case "local" if rank == 0:
                    weight.to_local().mul_(2)
                case "state":
                    trained.optimizer.state[weight]["exp_avg"].zero_()
                case "parameter":
                    weight.mul_(2)
        held.open.set()
    try:
        pending.result(SECONDS)
    except shardckpt.SaveFailedError as error:
        return str(error)
    return "right" if trained.is_right("ck") else "wrong"
