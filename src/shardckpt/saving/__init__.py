"""One save, from a flattened state to the commit: what is said between ranks, and what the background does."""

from shardckpt.saving.jobs import AliasJob, Job, Order, SaveJob, Times
from shardckpt.saving.structure import (
    Opening,
    Structure,
    agree_on_structure,
    bytes_to_stage,
    may_share,
    sources,
    structure_key,
)

__all__ = [
    "AliasJob",
    "Job",
    "Opening",
    "Order",
    "SaveJob",
    "Structure",
    "Times",
    "agree_on_structure",
    "bytes_to_stage",
    "may_share",
    "sources",
    "structure_key",
]
