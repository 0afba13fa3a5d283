"""Live tensors on the meta device: a load gives them memory, and each stays the object that it was.

So an optimizer that was made over a model without data refers to the parameters that the load has filled.
"""
# ruff: noqa: SLF001 - torch offers no public way to ask who refers to a tensor, nor to make one of another class

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shardckpt.state import names
from shardckpt.state.distributed import is_dtensor
from shardckpt.state.leaves import is_meta
from shardckpt.state.skeleton import MAX_DEPTH


def why_not(live: Tensor) -> str | None:
    """Why a meta tensor cannot become one with data while it stays the same object; None where it can.

    The reasons are those of ``torch.utils.swap_tensors``, known before anything is changed.
    """
    if not is_dtensor(live) and type(live).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(live).__name__} on the meta device"
    if weakref.getweakrefs(live):
        return "on the meta device, and something holds a weak reference to it"
    has_hooks = bool(live._backward_hooks or getattr(live, "_post_accumulate_grad_hooks", None))
    if has_hooks or live._use_count() > 1:  # type: ignore[attr-defined]
        return "on the meta device, and autograd refers to it (a hook, or a graph that has been recorded)"
    return None


def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a tensor like ``tensor``, which for one on the meta device is on its mesh's devices or the CPU."""
    if not is_meta(tensor):  # a ShardedTensor has no choice of device
        return torch.empty_like(tensor.detach(), dtype=dtype)
    return torch.empty_like(tensor.detach(), dtype=dtype, device=host_of(tensor))


def host_of(tensor: Tensor) -> torch.device | str:
    """The device where what belongs to ``tensor`` is read to."""
    if not is_meta(tensor):
        return tensor.device
    return tensor.device_mesh.device_type if is_dtensor(tensor) else "cpu"


def install(live: Tensor, filled: Tensor) -> None:
    """Give a meta tensor the memory of ``filled``, with its own class, attributes and ``requires_grad``."""
    if type(filled) is not type(live):
        filled = torch.Tensor._make_subclass(type(live), filled)  # as nn.Parameter does
    filled.requires_grad_(live.requires_grad)
    filled.__dict__.update(live.__dict__)
    torch.utils.swap_tensors(live, filled)


def meta_tensors(state: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state that is on the meta device, under each of its names; buffers that are not saved too."""
    if depth > MAX_DEPTH:
        return
    if isinstance(state, Tensor):
        if is_meta(state):
            yield path, state
    elif names.is_module(state):
        module = names.module_of(state)
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        cleaned = names.clean_names(module, [raw for raw, _ in tensors])
        yield from ((names.child_path(path, cleaned[raw]), tensor) for raw, tensor in tensors if is_meta(tensor))
    elif isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from meta_tensors(value, names.child_path(path, key), depth + 1)
