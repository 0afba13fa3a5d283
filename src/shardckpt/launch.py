"""How this process was started, as far as it tells of others."""

import os
from typing import Final

import torch.distributed as dist

from shardckpt.errors import UsageError

_RANKS_HERE: Final = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")
"""Where launchers say how many ranks they have started on this host: torchrun, and Slurm."""


def cores_per_rank(world_size: int) -> int:
    """How many cores each rank of this host may keep busy, at least one.

    Where nobody says how many ranks are on this host, all are taken to be: rather too few threads than too many. A
    launcher that binds each rank to its own cores has them counted once too often, which is as harmless.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = (os.environ.get(name, "") for name in _RANKS_HERE)
    ranks = next((int(text) for text in said if text.isdecimal() and int(text)), world_size)
    return max(1, cores // ranks)


def siblings() -> tuple[int, int] | None:
    """Which of how many processes of one job this is, those of this host if that is known; None for the only one."""
    if dist.is_available() and dist.is_initialized():
        own, count = dist.get_rank(), dist.get_world_size()
    else:
        own, count = 0, 1
    if (rank := os.environ.get("LOCAL_RANK", "")).isdecimal() and (
        size := os.environ.get("LOCAL_WORLD_SIZE", "")
    ).isdecimal():
        own, count = int(rank), int(size)
    return (own, count) if own < count and count > 1 else None


def check_group(call: str) -> None:
    """Raise UsageError in one of several processes that torchrun has started, if there is no process group.

    Each would take itself for all there is, and the last to save would win. torchrun's agent sets TORCHELASTIC_RUN_ID:
    ``torch.distributed.is_torchelastic_launched`` goes by it too.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    count = os.environ.get("WORLD_SIZE", "")
    if count.isdecimal() and int(count) > 1:
        raise UsageError(
            f"{call}: torchrun has started {count} processes, but there is no process group, so they know nothing of"
            " each other. Call torch.distributed.init_process_group first; or, to save or load from this process alone,"
            " use Checkpointer(alone=True)."
        )
