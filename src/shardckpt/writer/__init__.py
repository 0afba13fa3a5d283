"""From staged blocks to a durable shard."""

from shardckpt.writer.shard import ShardWriter, WrittenShard

__all__ = ["ShardWriter", "WrittenShard"]
