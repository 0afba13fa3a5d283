"""From the files of a checkpoint to filled tensors."""

from shardckpt.reader.objects import read_bytes, read_object
from shardckpt.reader.place import Target
from shardckpt.reader.plan import ReadPlan
from shardckpt.reader.targets import Reading, ReadStats
from shardckpt.reader.together import opening, read_together

__all__ = [
    "ReadPlan",
    "ReadStats",
    "Reading",
    "Target",
    "opening",
    "read_bytes",
    "read_object",
    "read_together",
]
