"""From live tensors to blocks of reused host memory, under a budget."""

from shardckpt.staging.copying import Early, Source, blocks_of, place_early, side_stream, stage
from shardckpt.staging.filling import copyable
from shardckpt.staging.memory import Block, Budget, StagingPool, blocks_for, copy_memory

__all__ = [
    "Block",
    "Budget",
    "Early",
    "Source",
    "StagingPool",
    "blocks_for",
    "blocks_of",
    "copy_memory",
    "copyable",
    "place_early",
    "side_stream",
    "stage",
]
