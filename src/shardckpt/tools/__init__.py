"""What the command line does, for Python too: look at checkpoints, compare, copy, convert and tidy them up.

By one process, and nothing here unpickles anything unless it is told to. What goes through tensors does so in bounded
memory.
"""

from shardckpt.tools.comparison import Comparison, TensorDifference, diff
from shardckpt.tools.conversion import ConvertReport, convert
from shardckpt.tools.copying import CopyReport, copy
from shardckpt.tools.inspection import Inspection, inspect
from shardckpt.tools.listing import Listed, age, ls
from shardckpt.tools.pruning import Pruned, prune
from shardckpt.tools.statistics import TensorStats, stats
from shardckpt.tools.tree import Node, text_of, walk
from shardckpt.tools.verification import verify

__all__ = [
    "Comparison",
    "ConvertReport",
    "CopyReport",
    "Inspection",
    "Listed",
    "Node",
    "Pruned",
    "TensorDifference",
    "TensorStats",
    "age",
    "convert",
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
