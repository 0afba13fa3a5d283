"""A rank whose disk hangs or fails. Runs in the processes of `ranks`."""

import errno

import torch
import torch.distributed as dist

import faults
import shardckpt
from shardckpt import Checkpointer


def one_is_stuck(rank: int, path: str, stuck: int) -> tuple[str, str]:
    """All save; the shard of one is never written. Then all save again."""
    engine = Checkpointer(timeout=60, commit_timeout=4)
    state = {"t": torch.full((3,), float(rank)), "own": shardckpt.PerRank(torch.full((7,), float(rank)))}
    stall = faults.Stall()
    with faults.broken() as disk:
        if rank == stuck:
            disk.add("pwrite", stall, matching=lambda path: path.endswith(".safetensors"))
        pending = engine.async_save(state, path)
        try:
            pending.result(60)
            found = ("none", "")
        except shardckpt.ShardckptError as error:
            found = (type(error).__name__, str(error))
        dist.barrier()
        engine.save(state, path)
        engine.load(path, state)
        stall.over.set()
    dist.barrier()
    return found


def one_cannot_look(rank: int, path: str) -> tuple[str, str, int]:
    """Rank 1 cannot look at its place, where its shard would go; it has more to write than memory to hold it in."""
    engine = Checkpointer(timeout=60, commit_timeout=30, staging_limit=8 << 20)
    state = {"own": shardckpt.PerRank(torch.full((5 << 20,), float(rank)))}
    found = ("none", "")
    with faults.broken() as disk:
        if rank == 1:
            disk.add("scandir", faults.fails(errno.ESTALE), last=None)
        try:
            engine.async_save(state, path).result(60)
        except shardckpt.ShardckptError as error:
            found = (type(error).__name__, str(error))
    dist.barrier()
    pool = engine._pool
    return (*found, pool._touched - len(pool._free))
