"""Names: what the parameters of a state are called, whichever wrapper is around them.

A parameter's fully qualified name (FQN) is the place of its module in the state, then its name in the module, without
the prefixes that wrappers add. Optimizer state is keyed by that name, so it finds its parameter again under any
sharding, any order of param groups and any number of processes.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn

from shardckpt.errors import UsageError

_WRAPPER_SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes under which torch.compile, FSDP1 and activation checkpointing keep the module they wrap."""


class ModuleState(NamedTuple):
    """A module whose state dict somebody has taken already: saved as that dict says, restored into the module."""

    module: nn.Module
    state_dict: Mapping[str, Any]


class OptimizerState(NamedTuple):
    """An optimizer whose state dict (torch's, index-keyed) somebody has taken already."""

    optimizer: torch.optim.Optimizer
    state_dict: Mapping[str, Any]
    modules: Mapping[str, nn.Module] = {}
    """Modules by their place in a state, which name its parameters where the state at hand lacks them."""


def is_module(value: Any) -> TypeGuard[nn.Module | ModuleState]:
    return isinstance(value, (nn.Module, ModuleState))


def is_optimizer(value: Any) -> TypeGuard[torch.optim.Optimizer | OptimizerState]:
    return isinstance(value, (torch.optim.Optimizer, OptimizerState))


def is_stateful(value: Any) -> bool:
    """Whether a value is saved through its own ``state_dict()``: a scheduler, a scaler, a data loader."""
    return (
        not isinstance(value, type)
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )


def module_of(value: nn.Module | ModuleState) -> nn.Module:
    return value.module if isinstance(value, ModuleState) else value


def optimizer_of(value: torch.optim.Optimizer | OptimizerState) -> torch.optim.Optimizer:
    return value.optimizer if isinstance(value, OptimizerState) else value


def child_path(path: str, key: Any) -> str:
    """The name of what lies under ``key`` of the container named ``path``."""
    name = key if isinstance(key, str) else str(key)
    return f"{path}.{name}" if path else name


def iter_modules(state: Any, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of a state with its place, in the order in which the state lists them."""
    if is_module(state):
        yield path, module_of(state)
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from iter_modules(value, child_path(path, key))
    elif type(state) in (list, tuple):
        for index, value in enumerate(state):
            yield from iter_modules(value, child_path(path, index))


def clean_names(module: nn.Module, names: list[str]) -> dict[str, str]:
    """Each raw state-dict key of ``module`` without wrapper prefixes; raises UsageError where two become one."""
    prefixes = sorted(_wrapper_prefixes(module), key=len, reverse=True)
    cleaned: dict[str, str] = {}
    taken: dict[str, str] = {}
    for raw in names:
        name = raw
        for prefix in prefixes:
            if name.startswith(prefix):
                parent = prefix[:-1].rpartition(".")[0]
                name = (parent + "." if parent else "") + name[len(prefix) :]
        if name in taken:
            raise UsageError(
                f"{taken[name]!r} and {raw!r} of {type(module).__name__} are both called {name!r} once wrapper"
                " prefixes are removed. Rename one of them, or save the two modules under different keys of the"
                " state."
            )
        taken[name] = raw
        cleaned[raw] = name
    return cleaned


def _wrapper_prefixes(module: nn.Module) -> Iterator[str]:
    for path, child in module.named_modules(remove_duplicate=False):
        head = path + "." if path else ""
        if isinstance(child, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            yield head + "module."
        if path and path.rpartition(".")[2] in _WRAPPER_SEGMENTS:
            yield head


def parameter_names(state: Any) -> dict[int, str]:
    """The FQN of every parameter of every module in ``state``, by ``id``; the first name of a tied one counts."""
    found: dict[int, str] = {}
    for path, module in iter_modules(state):
        parameters = list(module.named_parameters(remove_duplicate=False))
        cleaned = clean_names(module, [raw for raw, _ in parameters])
        for raw, parameter in parameters:
            found.setdefault(id(parameter), child_path(path, cleaned[raw]))
    return found


def optimizer_parameter_names(
    value: torch.optim.Optimizer | OptimizerState, names: Mapping[int, str]
) -> list[list[str]]:
    """The FQN of each parameter, param group by param group; ``names`` are those of the state's modules.

    A parameter outside every module is called by its place: ``param_groups.<group>.<index>``.
    """
    if isinstance(value, OptimizerState):
        names = dict(names) | parameter_names(dict(value.modules))
    return [
        [names.get(id(parameter), f"param_groups.{g}.{i}") for i, parameter in enumerate(group["params"])]
        for g, group in enumerate(optimizer_of(value).param_groups)
    ]


def is_torch_format(state_dict: Any) -> bool:
    """Whether an optimizer's state dict is torch's: ``state`` by index and ``param_groups`` that list the indices."""
    return (
        isinstance(state_dict, Mapping)
        and isinstance(state_dict.get("state"), Mapping)
        and isinstance(state_dict.get("param_groups"), list)
        and all(isinstance(group, Mapping) and "params" in group for group in state_dict["param_groups"])
    )
