"""How this process was started, as far as it tells of others."""

import os
import re
from typing import Final

import torch.distributed as dist

from shardckpt.errors import UsageError

_SAID: Final = (
    ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"),  # torchrun
    # Open MPI's mpirun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_SIZE"),  # mpiexec of MPICH and Intel MPI
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"),  # srun
)
"""Where launchers say which rank this is, which of those on its host, how many these are, and how many in all.

One may have been started by another, so the order counts. Not Slurm's SLURM_NTASKS_PER_NODE: a batch script of one
process has it too.
"""
_TASKS: Final = re.compile(r"(\d{1,9})(?:\(x(\d{1,9})\))?")


def cores_per_rank(world_size: int) -> int:
    """How many cores each rank of this host may keep busy, at least one.

    Where nobody says how many ranks are on this host, all are taken to be: rather too few threads than too many. A
    launcher that binds each rank to its own cores has them counted once too often, which is as harmless.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = _ranks_here()
    return max(1, cores // (world_size if here is None else here[1]))


def siblings() -> tuple[int, int] | None:
    """Which of how many processes of one job this is, those of this host if that is known; None for the only one.

    No more than a hint: nothing may depend on its being right.
    """
    here = _ranks_here()
    if here is None and _has_group():
        here = dist.get_rank(), dist.get_world_size()
    return here if here is not None and here[1] > 1 else None


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _ranks_here() -> tuple[int, int] | None:
    """Which of how many ranks on this host this is, as the launcher says; None where none says, or it can't be so."""
    for names in _SAID:
        rank, position, size, total = (_number(os.environ.get(name, "")) for name in names)
        if position is None or size is None or position >= size:
            continue
        # A process that a rank has started has its environment, and may be another rank of another group. One that has
        # started the others itself may have its own rank in theirs by chance, so their number counts.
        if _has_group():
            world_size = dist.get_world_size()
            if size > world_size or total not in (None, world_size) or rank not in (None, dist.get_rank()):
                continue
        return position, size
    return None


def _number(text: str) -> int | None:
    """The number in a variable; where it is a list with one for each host, like ``4(x2),3``, the one for this host."""
    found = [_TASKS.fullmatch(item) for item in text.split(",")]
    if len(found) == 1 and found[0] is not None and found[0][2] is None:
        return int(found[0][1])
    node = os.environ.get("SLURM_NODEID", "")
    left = int(node) if node.isdecimal() and len(node) < 10 else 0
    for item in found:
        if item is None:
            return None
        repeated = int(item[2] or 1)
        if left < repeated:
            return int(item[1])
        left -= repeated
    return None


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
