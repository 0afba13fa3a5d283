"""The adapter for PyTorch Lightning: ``Trainer(plugins=[ShardedCheckpointIO()])``, and the same for Fabric.

Importing this makes ``MyModel.load_from_checkpoint(path)`` read sharded checkpoints too.
"""

from typing import TYPE_CHECKING, Any

from shardckpt.lightning import fabric, flavours, from_checkpoint, model_checkpoint
from shardckpt.lightning.plugin import ShardedCheckpointIO

if TYPE_CHECKING:
    ShardedDDPStrategy: Any
    ShardedFSDPStrategy: Any
    ShardedModelParallelStrategy: Any
    ShardedSingleDeviceStrategy: Any

__all__ = [
    "ShardedCheckpointIO",
    "ShardedDDPStrategy",
    "ShardedFSDPStrategy",
    "ShardedModelParallelStrategy",
    "ShardedSingleDeviceStrategy",
    "sharded",
]

from_checkpoint.install()
model_checkpoint.install()


def sharded(strategy_class: Any) -> Any:
    """The bound subclass of a strategy class, for those who pass the Trainer or Fabric its strategy themselves.

    Raises:
        UsageError: that strategy reads and writes its checkpoints in a way that is not known here.
    """
    from shardckpt.errors import UsageError
    from shardckpt.lightning import strategies

    if strategies.is_bound(strategy_class):
        return strategy_class
    if fabric.can_bind(strategy_class):
        return fabric.sharded(strategy_class)
    flavours.refuse_deepspeed(strategy_class)
    if not strategies.can_bind(strategy_class):
        raise UsageError(
            f"{strategy_class.__name__} reads and writes its checkpoints in its own way and cannot be bound."
        )
    return strategies.sharded(strategy_class)


def __getattr__(name: str) -> Any:
    # Looked up late: the strategies of a flavour are a large import, and most users need no class of ours.
    if name in __all__ and name.endswith("Strategy"):
        return sharded(flavours.attribute(flavours.main(), "strategies", name.removeprefix("Sharded")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
