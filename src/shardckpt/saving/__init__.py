"""One save, from a flattened state to the commit: what is said between ranks, and what the background does."""

from shardckpt.saving.halves import write
from shardckpt.saving.jobs import AliasJob, Job, Order, SaveJob
from shardckpt.saving.overlap import wait_for_copies
from shardckpt.saving.own import Own, describe, own_sources
from shardckpt.saving.structure import (
    Opening,
    Structure,
    bytes_to_stage,
    exchange,
    may_share,
    plan,
    speaks,
    structure_key,
)

__all__ = [
    "AliasJob",
    "Job",
    "Opening",
    "Order",
    "Own",
    "SaveJob",
    "Structure",
    "bytes_to_stage",
    "describe",
    "exchange",
    "may_share",
    "own_sources",
    "plan",
    "speaks",
    "structure_key",
    "wait_for_copies",
    "write",
]
