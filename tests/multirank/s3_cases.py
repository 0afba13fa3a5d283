"""What the ranks do in the multi-rank tests on S3."""

import os
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from s3fs import S3FileSystem

import shardckpt
from shardckpt import Checkpointer
from states import digest_of, train


def whole_life(
    rank: int, root: str, storage_options: dict[str, Any] | None, environment: dict[str, str], compression: str | None
) -> dict[str, Any]:
    """Save, overwrite, share, restore, read and remove; what each step showed this rank."""
    S3FileSystem.clear_instance_cache()  # which knows of other environments, in this process, and other servers
    with mock.patch.dict(os.environ, environment):
        engine = Checkpointer(storage_options=storage_options, compression=compression, timeout=60, commit_timeout=60)
        model, optimizer = train(seed=7, steps=2, ddp=True)
        state = {"model": model, "optimizer": optimizer, "step": 2, "big": torch.full((5 << 20,), float(rank))}
        told: dict[str, Any] = {"digest": digest_of(state)}
        engine.save(state | {"step": 1, "model": torch.nn.Linear(2, 2)}, f"{root}/a")
        pending = engine.async_save(state, f"{root}/a", state_version=2)
        shared = engine.async_save(state | {"step": 3}, f"{root}/b", state_version=2)
        told["reports"] = [(report.alias, report.nbytes) for report in (pending.result(60), shared.result(60))]
        dist.barrier()
        told["latest"] = shardckpt.latest(root, storage_options)
        if rank == 0:
            engine.remove(f"{root}/a")
        dist.barrier()
        told["left"] = [shardckpt.is_checkpoint(f"{root}/{name}", storage_options) for name in "ab"]
        other, others = train(seed=100 + rank, steps=0, ddp=False)
        target = {"model": other, "optimizer": others, "step": 0}
        report = engine.load(f"{root}/b", target)
        told["restored"] = digest_of(target)
        told["step"] = target["step"]
        told["skipped"] = report.skipped
        big = shardckpt.read_tensor(f"{root}/b", "big", storage_options=storage_options)
        told["big"] = (big.numel(), big.sum().item())
        dist.barrier()
        engine.close()
        return told


def failing_upload(rank: int, root: str, storage_options: dict[str, Any]) -> str:
    """Rank 1's bucket is gone in mid-save: what this rank is told, and whether the checkpoint before is still there."""
    from shardckpt import checkpointer as module
    from storage.wrappers import FaultyStorage

    engine = Checkpointer(storage_options=storage_options, timeout=60, commit_timeout=60)
    engine.save({"w": torch.ones(9)}, f"{root}/ck")
    original = module.open_storage
    error = shardckpt.ObjectNotFoundError("NoSuchBucket")
    if rank == 1:
        module.open_storage = lambda *a: FaultyStorage(original(*a), "writer.commit", error)
    try:
        pending = engine.async_save({"w": torch.zeros(9)}, f"{root}/ck")
    finally:
        module.open_storage = original
    try:
        pending.result(60)
    except shardckpt.SaveFailedError as failed:
        dist.barrier()
        total = engine.load(f"{root}/ck")["w"].sum().item()
        dist.barrier()
        return f"{total}: {failed}"
    return "committed"


def replicas(rank: int, root: str, storage_options: dict[str, Any]) -> list[tuple[bool, int, int]]:
    """Load what all ranks want alike in each way of sharing: whether it is right, bytes read and bytes received."""
    state = {"w": torch.arange(3 << 20, dtype=torch.float32)}
    Checkpointer(storage_options=storage_options, timeout=60, replicated=True).save(state, f"{root}/ck")
    dist.barrier()
    told = []
    for share in (True, False, "auto"):
        live = {"w": torch.zeros(3 << 20)}
        engine = Checkpointer(storage_options=storage_options, timeout=60, share_reads=share)
        report = engine.load(f"{root}/ck", live)
        told.append((torch.equal(live["w"], state["w"]), report.bytes_read, report.bytes_received))
        dist.barrier()
        engine.close()
    return told
