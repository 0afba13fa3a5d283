"""What a module's own loading code would say of a state dict, found out on a twin without data."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
    it finds what is amiss. FSDP1's loads through memory and collectives that a twin has no part in.
    """
    if any("_fsdp_wrapped_module" in part._modules for part in module.modules()):  # noqa: SLF001
        return None
    heard: list[Verdict] = []

    def listen(*args: Any) -> None:
        heard.append(Verdict(*args[5:8]))  # a hook is handed the lists that all of the load adds to

    try:
        twin = _twin(module)
        for name, value in state_dict.items():
            if (shape := getattr(value, "shape", None)) is not None:
                state_dict[name] = torch.empty(tuple(shape), device="meta")
        twin.register_load_state_dict_pre_hook(listen)
        with torch.device("meta"):  # what loading code makes up has no data either
            twin.load_state_dict(state_dict, strict=False)
    except Exception:  # noqa: BLE001 - the module's code need not cope with a twin, nor with tensors without data
        return heard[0] if heard and heard[0].errors else None
    return heard[0] if heard else None


def _twin(module: nn.Module) -> nn.Module:
    """A tree of modules like ``module``'s, whose parameters and buffers are on the meta device.

    Other attributes are shared, not copied: they may be anything, a data set or a process group. Hooks that are methods
    of a module become methods of its twin.
    """
    memo: dict[int, Any] = {id(part): object.__new__(type(part)) for part in module.modules()}
    for part in module.modules():
        tensors = {
            kind: {name: _without_data(tensor, memo) for name, tensor in part.__dict__[kind].items()}
            for kind in ("_parameters", "_buffers")
        }
        children = {name: None if child is None else memo[id(child)] for name, child in part._modules.items()}  # noqa: SLF001
        hooks = {
            name: copy.deepcopy(part.__dict__[name], memo)
            for name in ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
        }
        memo[id(part)].__dict__.update(part.__dict__ | tensors | hooks | {"_modules": children})
    twin: nn.Module = memo[id(module)]
    return twin


def _without_data(tensor: Tensor | None, memo: dict[int, Any]) -> Tensor | None:
    """A tensor's counterpart on the meta device; the same one for each name of a tied one."""
    if tensor is None:
        return None
    if id(tensor) not in memo:
        if is_uninitialised(tensor):
            memo[id(tensor)] = type(tensor)(device="meta")
        else:
            bare = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
            memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    found: Tensor = memo[id(tensor)]
    return found
