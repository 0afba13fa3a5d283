"""Distributed tensors, told apart without importing what makes them, which takes most of a second.

Where nobody has imported a class, there is no tensor of it. So `import shardckpt` costs a script little that has none.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: Any) -> TypeGuard["DTensor"]:
    """Whether a value is a DTensor."""
    return isinstance(value, _class("torch.distributed.tensor", "DTensor"))


def is_sharded_tensor(value: Any) -> bool:
    """Whether a value is a ShardedTensor, as FSDP1 has them."""
    return isinstance(value, _class("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"))


def _class(module: str, name: str) -> Any:
    # A module that is still being imported, in another thread, may lack it.
    return getattr(sys.modules.get(module), name, ())
