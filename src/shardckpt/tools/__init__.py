"""What the command line does, for Python too: look at checkpoints, compare, copy and tidy them up, by one process.

Nothing here unpickles anything, and what goes through tensors does so in bounded memory.
"""

from shardckpt.tools.comparison import Comparison, TensorDifference, diff
from shardckpt.tools.copying import CopyReport, copy
from shardckpt.tools.inspection import Inspection, inspect
from shardckpt.tools.listing import Listed, age, ls
from shardckpt.tools.pruning import Pruned, prune
from shardckpt.tools.statistics import TensorStats, stats
from shardckpt.tools.tree import Node, text_of, walk
from shardckpt.tools.verification import verify

__all__ = [
    "Comparison",
    "CopyReport",
    "Inspection",
    "Listed",
    "Node",
    "Pruned",
    "TensorDifference",
    "TensorStats",
    "age",
    "copy",
    "diff",
    "inspect",
    "ls",
    "prune",
    "stats",
    "text_of",
    "verify",
    "walk",
]
