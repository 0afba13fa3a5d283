"""Optimizer state of a parameter that is a DTensor: what of it is sharded, though it does not say so itself.

Optimizers that work on DTensors have DTensors for state, and scalars. One that works on ``parameter.to_local()`` has
plain tensors instead, of which each rank holds other values: the part of a tensor that is shaped like the parameter,
where they have the shape of the parameter's local part, and otherwise nobody knows what.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

from torch import Tensor

from shardckpt.errors import UnserialisableError
from shardckpt.state import values
from shardckpt.state.distributed import is_dtensor
from shardckpt.state.leaves import is_raw_tensor
from shardckpt.state.names import child_path


def is_sharded(parameter: Any) -> bool:
    """Whether ranks hold different parts of a parameter."""
    return is_dtensor(parameter) and any(
        not placement.is_replicate() and parameter.device_mesh.size(dim) > 1
        for dim, placement in enumerate(parameter.placements)
    )


def as_part(value: Tensor, parameter: Tensor) -> Tensor:
    """Plain state that has the shape of the parameter's local part, as a DTensor in the same memory; else ``value``."""
    if (
        not is_dtensor(parameter)
        or is_dtensor(value)
        or not is_raw_tensor(value)
        or not is_sharded(parameter)
        or value.shape != parameter.to_local().shape
    ):
        return value
    from torch.distributed.tensor import DTensor  # there is one, so this has been imported

    return DTensor.from_local(
        value.detach(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def parts(value: Any, parameter: Tensor, path: str, is_equal: Callable[[str], bool]) -> Any:
    """``value``, the state of a parameter; if that is sharded, with its plain tensors as the parts that they are.

    ``is_equal`` tells by name what the user declares equal on all ranks. Raises UnserialisableError naming the tensor
    of which no one can tell whether ranks hold the same: storing one rank's would lose the others'.
    """
    if not is_sharded(parameter):
        return value
    if values.is_plain_dict(value):
        found = copy(value)
        for key, item in value.items():
            found[key] = parts(item, parameter, child_path(path, key), is_equal)
        return found
    if type(value) in (list, tuple):
        return type(value)(
            parts(item, parameter, child_path(path, index), is_equal) for index, item in enumerate(value)
        )
    if not isinstance(value, Tensor) or is_dtensor(value) or is_equal(path):
        return value
    part = as_part(value, parameter)  # that of a small parameter may have a single element
    if part is value and value.numel() != 1 and value.shape != parameter.shape:
        assert is_dtensor(parameter)
        raise UnserialisableError(
            f"optimizer state {path!r} is a plain tensor of shape {tuple(value.shape)} beside a DTensor of shape"
            f" {tuple(parameter.shape)}, of which this rank holds {tuple(parameter.to_local().shape)}: ranks may hold"
            " different values, and nothing says which part of what they are. Have the optimizer make it a DTensor; or,"
            " if it is equal on all ranks, say so with `replicated=` and a pattern of its name."
        )
    return part


def like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """New state that is not shaped like its parameter, as torch's own factories make it beside a DTensor: replicated.

    Scalars stay plain, since that is how optimizers count steps.
    """
    if not is_dtensor(parameter) or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor, Replicate  # there is one, so this has been imported

    mesh = parameter.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
