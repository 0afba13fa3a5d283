"""Optimizers as restore targets: state finds its parameter by name, and nothing is ever stepped."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardckpt.state import names, values
from shardckpt.state.skeleton import optimizer_node

if TYPE_CHECKING:
    from shardckpt.state.match import Match, Thunk

Json = Any


def match_optimizer(
    match: "Match", live: torch.optim.Optimizer | names.OptimizerState, node: Json, path: str
) -> "Thunk":
    """Match an optimizer with what was saved of one.

    State that the optimizer has already is read in place. State that it lacks is allocated, shaped and sharded like its
    parameter where it has the parameter's shape. Param groups take their options from the saved group that held their
    parameters, or, if they are empty, from the group at their place.
    """
    optimizer = names.optimizer_of(live)
    live_names = names.optimizer_parameter_names(live, match.parameters)
    body = optimizer_node(node) or _named(match, node, live_names, path)
    if body is None:
        match.differences.mismatched.append(
            f"{path or 'the root'}: an optimizer here, something else in the checkpoint"
        )
        return lambda: live
    saved_names = {name for group in body["param_groups"] for name in group["params"]}
    parameters = {
        name: parameter
        for group, group_names in zip(optimizer.param_groups, live_names, strict=True)
        for name, parameter in zip(group_names, group["params"], strict=True)
    }
    match.differences.missing += [_in(path, f"param_groups: {name}") for name in parameters if name not in saved_names]
    match.differences.unexpected += [_in(path, f"param_groups: {name}") for name in saved_names - parameters.keys()]
    state = {
        name: _match_state(
            match, optimizer.state.get(parameters[name], {}), parameters[name], item, _in(path, f"state.{name}")
        )
        for name, item in body["state"].items()
        if name in parameters
    }
    options: list[Thunk] = [
        match.new(saved["options"], _in(path, f"param_groups.{index}")) if saved is not None else dict
        for index, saved in enumerate(_saved_groups(live_names, body["param_groups"]))
    ]
    loose = match.new({"$dict": body.get("loose", [])}, _in(path, "state"))
    rest = match.new(body.get("rest", {}), path)

    def place() -> Any:
        named_state = {name: {key: thunk() for key, thunk in thunks.items()} for name, thunks in state.items()}
        group_options = [thunk() for thunk in options]
        if type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict and not _has_load_hooks(optimizer):
            _place_directly(optimizer, parameters, saved_names, named_state, loose(), group_options)
        else:
            optimizer.load_state_dict(_as_state_dict(live_names, named_state, loose(), group_options, rest()))
        return live

    return place


def _in(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _named(match: "Match", node: Json, live_names: list[list[str]], path: str) -> dict[str, Json] | None:
    """The body of an optimizer node from a state dict that was saved as a plain dict: by order, as torch loads it."""
    items = match.items(node, path)
    if items is None or not {"state", "param_groups"} <= items.keys() or not isinstance(items["param_groups"], list):
        return None
    groups: list[dict[str, Json]] = []
    by_index: dict[Any, str] = {}
    for index, group_node in enumerate(items["param_groups"]):
        group = dict(values.pairs_of(group_node) or [])
        numbers = group.pop("params", [])
        group_names: list[str] = live_names[index] if index < len(live_names) else []
        if len(group_names) != len(numbers):
            match.differences.mismatched.append(
                f"{_in(path, f'param_groups.{index}')}: {len(group_names)} parameters here, {len(numbers)} in the "
                f"checkpoint"
            )
            return {"state": {}, "param_groups": []}
        by_index.update(zip(numbers, group_names, strict=True))
        groups.append({"params": group_names, "options": group})
    state_items = match.items(items["state"], path) or {}
    state = {by_index[number]: item for number, item in state_items.items() if number in by_index}
    return {"state": state, "param_groups": groups}


def _match_state(
    match: "Match", live: Mapping[str, Any], parameter: Tensor, node: Json, path: str
) -> "dict[Any, Thunk]":
    thunks: dict[Any, Thunk] = {}
    for key, item in (match.items(node, path) or {}).items():
        child = f"{path}.{key}"
        value = live.get(key)
        name = item.get("$tensor") if isinstance(item, dict) else None
        if isinstance(value, Tensor) and name is not None and _same_kind(match, value, name):
            thunks[key] = match.tensor(value, item, child)
        else:
            thunks[key] = match.new(item, child, like=parameter)
    return thunks


def _same_kind(match: "Match", live: Tensor, name: str) -> bool:
    """Whether live optimizer state can take the stored tensor; if not, it is replaced, as torch's own loading does."""
    entry = match.entry(name)
    return tuple(live.shape) == tuple(entry.shape) and str(live.dtype) == f"torch.{entry.dtype}"


def _saved_groups(live_names: list[list[str]], saved: list[dict[str, Json]]) -> list[dict[str, Json] | None]:
    """For each live param group the saved group whose options it takes."""
    holder = {name: group for group in saved for name in group["params"]}
    found: list[dict[str, Json] | None] = []
    for index, group_names in enumerate(live_names):
        at_place = saved[index] if index < len(saved) else None
        if at_place is not None and (not group_names or set(group_names) & set(at_place["params"])):
            found.append(at_place)
        else:
            found.append(next(filter(None, map(holder.get, group_names)), None))
    return found


def _has_load_hooks(optimizer: torch.optim.Optimizer) -> bool:
    # torch offers no public way to ask; both exist since 2.0.
    return bool(
        optimizer._optimizer_load_state_dict_pre_hooks  # noqa: SLF001
        or optimizer._optimizer_load_state_dict_post_hooks  # noqa: SLF001
    )


def _place_directly(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    saved_names: set[str],
    state: Mapping[str, dict[Any, Any]],
    loose: dict[Any, Any],
    options: list[dict[str, Any]],
) -> None:
    """What ``Optimizer.load_state_dict`` does, less its cast of state to the parameter's dtype, which loses bits."""
    for name, parameter in parameters.items():
        if name in state:
            optimizer.state[parameter] = state[name]
        elif name in saved_names:
            optimizer.state.pop(parameter, None)
    optimizer.state.update(loose)
    for group, group_options in zip(optimizer.param_groups, options, strict=True):
        names_of_its_own = group.get("param_names")
        group.update(group_options)
        if names_of_its_own is not None:
            group["param_names"] = names_of_its_own
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def _as_state_dict(
    live_names: list[list[str]],
    state: Mapping[str, dict[Any, Any]],
    loose: dict[Any, Any],
    options: list[dict[str, Any]],
    rest: dict[str, Any],
) -> dict[str, Any]:
    """Torch's state dict for an optimizer that has loading code of its own."""
    index_of: dict[str, int] = {}
    groups = []
    for group_names, group_options in zip(live_names, options, strict=True):
        for name in group_names:
            index_of.setdefault(name, len(index_of))
        groups.append(group_options | {"params": [index_of[name] for name in group_names]})
    by_index: dict[Any, Any] = {index_of[name]: values for name, values in state.items()}
    return {"state": by_index | loose, "param_groups": groups} | rest
