"""What a module's own loading code would say of a state dict, found out on a twin without data."""

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from shardckpt.state.leaves import is_uninitialised


class Verdict(NamedTuple):
    """What ``load_state_dict`` would say."""

    missing: list[str]
    unexpected: list[str]
    errors: list[str]


def rehearse(module: nn.Module, state_dict: dict[str, Any]) -> Verdict | None:
    """Load a state dict into a twin of ``module`` on the meta device; None where that cannot be done.

    Of what has a ``shape``, only that counts: the twin gets tensors without data. ``state_dict`` is used up.

    Loading code that renames keys is known only by running it, and run on the module itself it would change it before
    it finds what is amiss.
    """
    errors: list[list[str]] = []
    try:
        twin = copy.deepcopy(module, _without_data(module))
        for name, value in state_dict.items():
            if (shape := getattr(value, "shape", None)) is not None:
                state_dict[name] = torch.empty(tuple(shape), device="meta")
        # A hook is handed the list of errors that all of the load adds to.
        twin.register_load_state_dict_pre_hook(lambda *args: errors.append(args[7]))  # type: ignore[no-untyped-call]
        loaded = twin.load_state_dict(state_dict, strict=False)
    except Exception:  # noqa: BLE001 - the module's code need not cope with a twin, nor with tensors without data
        return Verdict([], [], errors[0]) if errors and errors[0] else None
    return Verdict(list(loaded.missing_keys), list(loaded.unexpected_keys), [])


def _without_data(module: nn.Module) -> dict[int, Any]:
    """For ``copy.deepcopy``: in place of each parameter and buffer one on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        if not is_uninitialised(parameter):
            twin = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            memo[id(parameter)] = nn.Parameter(twin, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        if not is_uninitialised(buffer):
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    return memo
