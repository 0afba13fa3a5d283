"""What the ranks do in the tests of saves that copy beside training."""

from typing import Any

import torch
from torch import nn

import shardckpt
from gates import SECONDS, beside, gate, same
from shardckpt import Checkpointer


def step_while_copying(rank: int, folder: str, failing: int | None) -> dict[str, Any]:
    """A save under DDP with a step directly after it; on rank ``failing`` the copy raises. What this rank saw."""
    torch.manual_seed(3)
    net = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 30), nn.BatchNorm1d(30), nn.Linear(30, 2)))
    optimizer = torch.optim.AdamW(net.parameters())

    def backward() -> None:
        net(torch.full((4, 8), 1.0 + rank) * torch.arange(4.0)[:, None]).square().sum().backward()

    backward()
    optimizer.step()
    state = {"net": net, "optimizer": optimizer}
    engine = Checkpointer(timeout=30, commit_timeout=60, overlap="step")
    engine.save(state, f"{folder}/reference")
    with gate() as held:
        pending = engine.async_save(state, f"{folder}/ck")
        told: dict[str, Any] = {"staged": pending.staged, "error": None}
        backward()
        if rank == failing:
            held.error = RuntimeError("the copy broke")
        thread = beside(optimizer.step)
        assert held.asked.wait(SECONDS)
        held.open.set()
        thread.join()
    try:
        told["stalled"] = pending.result(60).stall_seconds > 0
    except shardckpt.SaveFailedError as error:
        told["error"] = str(error)
        return told
    told["same"] = same(*(shardckpt.load(f"{folder}/{name}") for name in ("reference", "ck")))
    return told
