"""From the files of a checkpoint to filled tensors."""

from shardckpt.reader.place import Target
from shardckpt.reader.targets import READ_MEMORY, ReadStats, check_files, read_bytes, read_targets
from shardckpt.reader.together import read_together

__all__ = ["READ_MEMORY", "ReadStats", "Target", "check_files", "read_bytes", "read_targets", "read_together"]
