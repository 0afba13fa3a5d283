"""Sharded, asynchronous checkpoints for distributed PyTorch training that resume on any number of processes.

>>> import shardckpt
>>> shardckpt.save({"model": model, "optimizer": optimizer, "step": step}, path)     # every rank calls
>>> pending = shardckpt.async_save(state, path)                                      # returns once training may go on
>>> shardckpt.load(path, {"model": model, "optimizer": optimizer})                   # in place, any world size
"""

from typing import TYPE_CHECKING, Any

from shardckpt.api import async_save, load, read_tensor, save
from shardckpt.background import PendingSave
from shardckpt.checkpointer import Checkpointer
from shardckpt.commit import is_checkpoint, latest
from shardckpt.errors import (
    CheckpointNotFoundError,
    ConflictingStateError,
    CorruptCheckpointError,
    LoadFailedError,
    ObjectExistsError,
    ObjectNotFoundError,
    RankTimeoutError,
    RemoteError,
    SaveFailedError,
    ShardckptError,
    StateMismatchError,
    StorageAccessError,
    StorageError,
    StorageFullError,
    TensorIndexError,
    TensorNotFoundError,
    UncertainCommitError,
    UnsafeLoadError,
    UnserialisableError,
    UnsupportedFormatError,
    UsageError,
)
from shardckpt.manager import CheckpointManager
from shardckpt.reports import Fault, LoadReport, SaveReport, VerifyReport
from shardckpt.state import PerRank
from shardckpt.tools.verification import verify

if TYPE_CHECKING:
    from shardckpt.lightning import ShardedCheckpointIO

__version__ = "0.1.0"

__all__ = [
    "CheckpointManager",
    "CheckpointNotFoundError",
    "Checkpointer",
    "ConflictingStateError",
    "CorruptCheckpointError",
    "Fault",
    "LoadFailedError",
    "LoadReport",
    "ObjectExistsError",
    "ObjectNotFoundError",
    "PendingSave",
    "PerRank",
    "RankTimeoutError",
    "RemoteError",
    "SaveFailedError",
    "SaveReport",
    "ShardckptError",
    "ShardedCheckpointIO",
    "StateMismatchError",
    "StorageAccessError",
    "StorageError",
    "StorageFullError",
    "TensorIndexError",
    "TensorNotFoundError",
    "UncertainCommitError",
    "UnsafeLoadError",
    "UnserialisableError",
    "UnsupportedFormatError",
    "UsageError",
    "VerifyReport",
    "async_save",
    "is_checkpoint",
    "latest",
    "load",
    "read_tensor",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import, and a torchrun job may not have it.
    if name == "ShardedCheckpointIO":
        from shardckpt.lightning import ShardedCheckpointIO

        return ShardedCheckpointIO
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
