"""What the ranks do in the tests of `CheckpointManager`. Runs in the processes of `ranks`."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardckpt import CheckpointManager


def state_of(step: int) -> dict[str, Any]:
    return {"weight": torch.full((5,), float(step)), "step": step}


def keep_and_restore(rank: int, root: str) -> tuple[Any, ...]:
    """A run in which the newest checkpoint is damaged by the time it is restored."""
    with CheckpointManager(root, keep_last=2, metric="loss") as manager:
        # Ranks may measure differently; rank 0's word counts.
        for step in (1, 2, 3, 4):
            manager.save(step, state_of(step), {"loss": step if rank == 0 else -step})
        manager.wait()
        steps, best = manager.steps(), manager.best()
        dist.barrier()
        if rank == 0:
            for shard in Path(manager.path(4)).glob("*.safetensors"):
                shard.write_bytes(b"")
        dist.barrier()
        state = state_of(0)
        return steps, best, manager.restore(state), state["step"], state["weight"].tolist()
