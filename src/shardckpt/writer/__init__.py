"""From staged blocks to a durable shard."""

from shardckpt.writer.shard import ShardWriter
from shardckpt.writer.streams import listed_of

__all__ = ["ShardWriter", "listed_of"]
