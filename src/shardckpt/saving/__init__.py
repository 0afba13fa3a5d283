"""One save after the other, from the call to the commit: what is said between ranks, and what the background does."""

from shardckpt.saving.halves import bytes_to_hold
from shardckpt.saving.overlap import wait_for_copies
from shardckpt.saving.series import Request, Series, flatten_selected
from shardckpt.saving.structure import bytes_to_stage

__all__ = ["Request", "Series", "bytes_to_hold", "bytes_to_stage", "flatten_selected", "wait_for_copies"]
