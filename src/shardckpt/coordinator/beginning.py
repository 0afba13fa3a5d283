"""How an operation begins: with all ranks of the default process group, or alone."""

import torch.distributed as dist

from shardckpt import launch
from shardckpt.coordinator.operation import Operation, SoloOperation
from shardckpt.coordinator.ranks import StoreOperation, next_number
from shardckpt.wordstore import WordStore


def begin(call: str, *, timeout: float) -> Operation:
    """Start an operation named ``call`` with all ranks of the default process group, or alone without one.

    Raises UsageError where there should be one: torchrun has started several processes.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - there is no public way to it
        words = WordStore(store, store, call)
        return StoreOperation(words, next_number(store), call, dist.get_rank(), dist.get_world_size(), timeout)
    launch.check_group(call)
    return SoloOperation()


def begin_alone() -> Operation:
    """An operation of this process only, whatever process group there is."""
    return SoloOperation()


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
