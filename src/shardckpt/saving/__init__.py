"""One save, from a flattened state to the commit: what is said between ranks, and what the background does."""

from shardckpt.saving.jobs import AliasJob, Job, Order, SaveJob
from shardckpt.saving.structure import (
    Opening,
    Structure,
    bytes_to_stage,
    exchange,
    may_share,
    plan,
    sources,
    speaks,
    structure_key,
)

__all__ = [
    "AliasJob",
    "Job",
    "Opening",
    "Order",
    "SaveJob",
    "Structure",
    "bytes_to_stage",
    "exchange",
    "may_share",
    "plan",
    "sources",
    "speaks",
    "structure_key",
]
