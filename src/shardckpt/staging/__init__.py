"""From live tensors to blocks of reused host memory, under a budget."""

from shardckpt.staging.copying import Source, copyable, stage
from shardckpt.staging.memory import Block, Budget, StagingPool, copy_memory

__all__ = ["Block", "Budget", "Source", "StagingPool", "copy_memory", "copyable", "stage"]
