"""How this process was started, as far as it tells of others."""

import os

import torch.distributed as dist

from shardckpt.errors import UsageError


def check_group(call: str) -> None:
    """Raise UsageError in one of several processes that torchrun has started, if there is no process group.

    Each would take itself for all there is, and the last to save would win. torchrun's agent sets TORCHELASTIC_RUN_ID:
    ``torch.distributed.is_torchelastic_launched`` goes by it too.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    count = os.environ.get("WORLD_SIZE", "")
    if count.isdigit() and int(count) > 1:
        raise UsageError(
            f"{call}: torchrun has started {count} processes, but there is no process group, so they know nothing of"
            " each other. Call torch.distributed.init_process_group first; or, to save or load from this process alone,"
            " use Checkpointer(alone=True)."
        )
