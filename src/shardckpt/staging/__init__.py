"""From live tensors to blocks of reused host memory, under a budget."""

from shardckpt.staging.copying import Source, copyable, stage
from shardckpt.staging.memory import Block, Budget, StagingPool

__all__ = ["Block", "Budget", "Source", "StagingPool", "copyable", "stage"]
