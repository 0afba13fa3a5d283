"""Where tensors go that have no live counterpart: what ``map_location`` of ``torch.load`` means."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardckpt.errors import LoadFailedError, ShardckptError, UsageError

MapLocation = Any
"""What ``torch.load`` takes: None, a device, a string, a dict of location tags, or a callable."""


def relocation(map_location: MapLocation) -> Callable[[Tensor, str], Tensor]:
    """How a tensor that was read on the CPU gets to where ``map_location`` says, by its location tag.

    The meaning is that of ``torch.load``: https://docs.pytorch.org/docs/stable/generated/torch.load.html. Raises
    UsageError for what is no map_location; what is returned raises LoadFailedError where a tensor cannot go there, for
    instance to a device that this machine lacks.
    """
    locate = _locator(map_location)

    def relocate(tensor: Tensor, tag: str) -> Tensor:
        storage = tensor.untyped_storage()
        try:
            placed = locate(storage, tag)
            if placed is storage or (placed.device == storage.device and placed.data_ptr() == storage.data_ptr()):
                return tensor
            moved = torch.empty(0, dtype=tensor.dtype, device=placed.device)
            return moved.set_(placed, 0, tensor.shape, tensor.stride())
        except ShardckptError:
            raise
        except Exception as error:  # a map_location may be code of the caller's
            raise LoadFailedError(
                f"a tensor saved on {tag!r} cannot go where map_location={map_location!r} puts it: {error}"
            ) from error

    return relocate


def _locator(map_location: MapLocation) -> Callable[[torch.UntypedStorage, str], torch.UntypedStorage]:
    default: Callable[[Any, str], torch.UntypedStorage] = torch.serialization.default_restore_location
    match map_location:
        case None:
            return default
        case dict():
            return lambda storage, tag: default(storage, map_location.get(tag, tag))
        case str() | torch.device():
            return lambda storage, _: default(storage, str(map_location))
    if not callable(map_location):
        raise UsageError(f"map_location is None, a device, a string, a dict or a callable, not {map_location!r}")

    def locate(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        placed = map_location(storage, tag)
        if placed is None:
            return default(storage, tag)
        if not isinstance(placed, torch.UntypedStorage):
            raise UsageError(f"map_location must return a storage or None, not a {type(placed).__name__}")
        return placed

    return locate
