"""From staged blocks to a durable shard."""

from shardckpt.writer.shard import ShardWriter, WrittenShard
from shardckpt.writer.streams import listed_of

__all__ = ["ShardWriter", "WrittenShard", "listed_of"]
