"""The examples of the documentation that are for several ranks. Runs in the processes of `ranks`."""

import os
import random

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import shardckpt
from pages import blocks, run_python


class Net(nn.Linear):
    """The reader's."""

    def __init__(self) -> None:
        super().__init__(6, 4)


class Callback:
    """Lightning's, as far as the example goes."""


def run_page(rank: int, page: str, path: str) -> None:
    names = (Net, Callback, DistributedDataParallel, fully_shard)
    state, numbers = torch.get_rng_state(), random.getstate()
    run_python(page, {"torch": torch, "shardckpt": shardckpt, "path": path} | {name.__name__: name for name in names})
    torch.set_rng_state(state)
    random.setstate(numbers)


def quick_start(rank: int, folder: str) -> int:
    """Run the loop; returns the step that it has come to."""
    os.chdir(folder)
    (block,) = [block for block in blocks("quickstart.md", "python") if "CheckpointManager" in block]
    names: dict[str, object] = {"root": "root"}
    exec(compile(block, "quickstart.md", "exec"), names)
    state = names["state"]
    assert isinstance(state, dict)
    return int(state["step"])
