"""A few plain threads, and which calls into the kernel they have not come back from."""

from shardckpt.workers import under_way
from shardckpt.workers.threads import THREADS, Aside, Workers, for_each, read_aside

__all__ = ["THREADS", "Aside", "Workers", "for_each", "read_aside", "under_way"]
