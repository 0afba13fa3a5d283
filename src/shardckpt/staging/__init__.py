"""From live tensors to blocks of reused host memory, under a budget."""

from shardckpt.staging.copying import Source, copyable, side_stream, stage
from shardckpt.staging.memory import Block, Budget, StagingPool, blocks_for, copy_memory

__all__ = ["Block", "Budget", "Source", "StagingPool", "blocks_for", "copy_memory", "copyable", "side_stream", "stage"]
