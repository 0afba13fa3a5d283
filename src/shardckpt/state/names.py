"""Names: what the parameters of a state are called, whichever wrapper is around them.

A parameter's fully qualified name (FQN) is the place of its module in the state, then its name in the module, without
the prefixes that wrappers add. Optimizer state is keyed by that name, so it finds its parameter again under any
sharding, any order of param groups and any number of processes.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from shardckpt.errors import UsageError
from shardckpt.state.skeleton import MAX_DEPTH

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
    names: list[list[str]] | None = None
    """What the parameters of ``state_dict`` are called, group by group, where those of the optimizer are others."""


class Share(dict[str, Any]):
    """What a rank adds to rank 0's state: tensors, and nothing else that rank 0 would not have.

    Its plain values and containers are not compared with rank 0's, and are not saved.
    """


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


def check_root(state: Any) -> None:
    """Raise UsageError for what cannot be a state."""
    if not (isinstance(state, dict) or is_module(state) or is_optimizer(state) or is_stateful(state)):
        raise UsageError(
            "a state is a dict, a module, an optimizer or an object with state_dict/load_state_dict, not "
            f"{type(state).__name__}."
        )


def child_path(path: str, key: Any) -> str:
    """The name of what lies under ``key`` of the container named ``path``. It is always valid Unicode."""
    name = str(key)
    if not name.isascii():
        name = name.encode("utf-8", "backslashreplace").decode()
    return f"{path}.{name}" if path else name


def unique(name: str, is_taken: Callable[[str], bool]) -> str:
    """``name``, or the first of ``name~2``, ``name~3``, ... that is not taken."""
    found, count = name, 1
    while is_taken(found):
        count += 1
        found = f"{name}~{count}"
    return found


def iter_modules(state: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a state with its place, in the order in which the state lists them."""
    if depth > MAX_DEPTH:  # flattening or matching says what is wrong
        return
    if is_module(state):
        yield path, module_of(state)
    elif isinstance(state, dict):
        yield from _modules_among(state.items(), path, depth)
    elif type(state) in (list, tuple):
        yield from _modules_among(enumerate(state), path, depth)


def _modules_among(items: Iterable[tuple[Any, Any]], path: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    for key, value in items:
        if not isinstance(value, Tensor):  # most are, and holding one in a path costs more than to see that it is one
            yield from iter_modules(value, child_path(path, key), depth + 1)


def clean_names(module: nn.Module, names: list[str]) -> dict[str, str]:
    """Each raw state-dict key of ``module`` without wrapper prefixes; raises UsageError where two become one."""
    prefixes = _wrapper_prefixes(module)
    cleaned: dict[str, str] = {}
    taken: dict[str, str] = {}
    for raw in names:
        name = _without(prefixes, raw)
        if name in taken:
            raise UsageError(
                f"{taken[name]!r} and {raw!r} of {type(module).__name__} are both called {name!r} once wrapper "
                "prefixes are removed. Rename one of them, or save the two modules under different keys of the state."
            )
        taken[name] = raw
        cleaned[raw] = name
    return cleaned


def clean_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of ``module`` under each of its names without wrapper prefixes."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {name: parameters[raw] for raw, name in clean_names(module, list(parameters)).items()}


def clean_paths(module: nn.Module) -> dict[str, str]:
    """The path of each module in ``module``, itself included, without wrapper prefixes."""
    prefixes = _wrapper_prefixes(module)
    return {raw: _without(prefixes, f"{raw}.")[:-1] for raw, _ in module.named_modules(remove_duplicate=False)}


def raw_names(module: nn.Module, known: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """What clean ``names`` that ``module`` lacks would be called in its state dict, whose raw keys are ``known``.

    A name lies in the innermost of the modules that have its parent's path, so that this one's hooks get to see it.
    """
    used = {""}
    for key in known:
        while (key := key.rpartition(".")[0]) and key not in used:
            used.add(key)
    inner: dict[str, str] = {}
    for raw, clean in clean_paths(module).items():
        if raw in used and len(raw) >= len(inner.get(clean, "")):
            inner[clean] = raw
    found = {}
    for name in names:
        parent = name.rpartition(".")[0]
        while parent not in inner:
            parent = parent.rpartition(".")[0]
        rest = name[len(parent) + 1 :] if parent else name
        found[name] = f"{inner[parent]}.{rest}" if inner[parent] else rest
    return found


def _without(prefixes: list[str], name: str) -> str:
    for prefix in prefixes:
        if name.startswith(prefix):
            parent = prefix[:-1].rpartition(".")[0]
            name = (parent + "." if parent else "") + name[len(prefix) :]
    return name


def _wrapper_prefixes(module: nn.Module) -> list[str]:
    """What wrappers put before the names of what they wrap, longest first, so that nested ones go one by one."""
    found = []
    for path, child in module.named_modules(remove_duplicate=False):
        head = path + "." if path else ""
        if isinstance(child, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            found.append(head + "module.")
        if path and path.rpartition(".")[2] in _WRAPPER_SEGMENTS:
            found.append(head)
    return sorted(found, key=len, reverse=True)


def parameter_names(state: Any) -> dict[int, str]:
    """The FQN of every parameter of every module in ``state``, by ``id``; the first name of a tied one counts."""
    found: dict[int, str] = {}
    taken: set[str] = set()
    for path, module in iter_modules(state):
        parameters = list(module.named_parameters(remove_duplicate=False))
        cleaned = clean_names(module, [raw for raw, _ in parameters])
        for raw, parameter in parameters:
            if id(parameter) not in found:
                # Modules at "a" and "a.b" may both have an "a.b.w".
                found[id(parameter)] = unique(child_path(path, cleaned[raw]), taken.__contains__)
                taken.add(found[id(parameter)])
    return found


def optimizer_parameter_names(
    value: torch.optim.Optimizer | OptimizerState, names: Mapping[int, str]
) -> list[list[str]]:
    """The FQN of each parameter, param group by param group; ``names`` are those of the state's modules.

    A parameter outside every module is called by its place.
    """
    if isinstance(value, OptimizerState):
        if value.names is not None:
            return value.names
        names = dict(names) | parameter_names(dict(value.modules))
    return [
        [names.get(id(parameter), place_in_groups(g, i)) for i, parameter in enumerate(group["params"])]
        for g, group in enumerate(optimizer_of(value).param_groups)
    ]


def place_in_groups(group: int, index: int) -> str:
    """The name of a parameter outside every module."""
    return f"param_groups.{group}.{index}"


def is_place_in_groups(name: str) -> bool:
    """Whether a parameter goes by its place, for want of a name."""
    return re.fullmatch(r"param_groups\.\d+\.\d+", name) is not None


def is_torch_format(state_dict: Any, named: list[list[str]]) -> bool:
    """Whether an optimizer's state dict is torch's: ``state`` by index and ``param_groups`` that list the indices.

    ``named`` are the names of the optimizer's parameters, group by group, for which there must be as many indices.
    """
    return (
        isinstance(state_dict, Mapping)
        and isinstance(state_dict.get("state"), Mapping)
        and isinstance(state_dict.get("param_groups"), list)
        and all(isinstance(group, Mapping) and "params" in group for group in state_dict["param_groups"])
        and [len(group["params"]) for group in state_dict["param_groups"]] == [len(group) for group in named]
    )
