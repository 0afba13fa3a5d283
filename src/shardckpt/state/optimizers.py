"""Optimizers as restore targets: state finds its parameter by name, and nothing is ever stepped."""
# ruff: noqa: SLF001 - torch offers no public way to ask an optimizer for its loading hooks

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shardckpt.manifest import TensorEntry
from shardckpt.state import names, values
from shardckpt.state.beside import as_part, like_parameter
from shardckpt.state.distributed import is_dtensor
from shardckpt.state.fresh import Thunk
from shardckpt.state.leaves import is_distributed, is_meta
from shardckpt.state.matching import Matching
from shardckpt.state.materialise import host_of, like
from shardckpt.state.param_groups import conflicts, holders_of, unlike
from shardckpt.state.skeleton import optimizer_node, tensor_name
from shardckpt.state.subtree import rename_parameters

Json = Any
Optimizer = torch.optim.Optimizer


def match_optimizer(match: Matching, live: Optimizer | names.OptimizerState, node: Json, path: str) -> Thunk:
    """Match an optimizer with what was saved of one.

    State that the optimizer has already is read in place. State that it lacks is allocated, shaped and sharded like its
    parameter where it has the parameter's shape. Param groups take their options from the saved group that held most of
    their parameters; those without parameters, in order, from the saved groups without.
    """
    optimizer = names.optimizer_of(live)
    live_names = names.optimizer_parameter_names(live, match.parameters)
    is_stock = type(optimizer).load_state_dict is Optimizer.load_state_dict
    if optimizer_node(node) is None and not is_stock and match.items(node, path) is not None:
        # Saved in a form of its own, which its own code knows.
        value = match.new(node, path)
        return lambda: (optimizer.load_state_dict(value()), live)[1]
    body = optimizer_node(node) or _named(match, node, live_names, path)
    if body is None:
        match.differences.mismatched.append(
            f"{path or 'the root'}: an optimizer here, something else in the checkpoint"
        )
        return lambda: live
    body = _by_place(body, live_names)
    saved_as: dict[str, str] = body.get("saved_as", {})
    saved_names = dict.fromkeys(name for group in body["param_groups"] for name in group["params"])
    parameters = {
        name: parameter
        for group, group_names in zip(optimizer.param_groups, live_names, strict=True)
        for name, parameter in zip(group_names, group["params"], strict=True)
    }
    groups_path = names.child_path(path, "param_groups")
    sources = _sources(match, parameters, saved_names, saved_as)
    match.differences.missing += [f"{groups_path}: {name}" for name in parameters if name not in sources]
    used = set(sources.values())
    match.differences.unexpected += [f"{groups_path}: {name}" for name in saved_names if name not in used]
    holders = holders_of(live_names, body["param_groups"], sources)
    match.differences.mismatched += conflicts(holders, live_names, body["param_groups"], sources, groups_path)
    empty = iter([group for group in body["param_groups"] if not group["params"]])
    saved_groups = [
        body["param_groups"][found[0]] if found else None if group_names else next(empty, None)
        for found, group_names in zip(holders, live_names, strict=True)
    ]
    others = unlike(optimizer, saved_groups, groups_path)
    if others:
        match.differences.mismatched += others
        return lambda: live
    step_on_device = {
        name: saved is not None and _counts_on_device(saved["options"])
        for group_names, saved in zip(live_names, saved_groups, strict=True)
        for name in group_names
    }
    state_path = names.child_path(path, "state")
    for name, source in list(sources.items()):
        why = _misfit(match, parameters[name], saved_as.get(source, source), body["state"].get(source))
        if why:
            match.differences.mismatched.append(f"{state_path}: {name}: {why}")
            del sources[name]
    state = {
        name: _match_state(
            match,
            optimizer.state.get(parameters[name], {}),
            Beside(match, parameters[name], name if name != source else None),
            body["state"][source],
            names.child_path(state_path, source),
            step_on_device[name],
        )
        for name, source in sources.items()
        if source in body["state"]
    }
    options: list[Thunk] = [
        match.new(saved["options"], names.child_path(groups_path, index)) if saved is not None else dict
        for index, saved in enumerate(saved_groups)
    ]
    loose = match.new({"$dict": body.get("loose", [])}, state_path)
    rest = match.new(body.get("rest", {}), path)

    def place() -> Any:
        named_state = {name: {key: thunk() for key, thunk in thunks.items()} for name, thunks in state.items()}
        state_dict = _as_state_dict(live_names, named_state, loose(), [thunk() for thunk in options], rest())
        if is_stock:
            _load_state_dict(optimizer, state_dict, [parameters[name] for name in sources])
        else:
            optimizer.load_state_dict(state_dict)
        return live

    return place


def _named(match: Matching, node: Json, live_names: list[list[str]], path: str) -> dict[str, Json] | None:
    """The body of an optimizer node from a state dict that was saved as a plain dict: by order, as torch loads it."""
    items = match.items(node, path)
    if items is None or not {"state", "param_groups"} <= items.keys() or not isinstance(items["param_groups"], list):
        return None
    groups: list[dict[str, Json]] = []
    by_index: dict[Any, str] = {}
    for index, group_node in enumerate(items["param_groups"]):
        group = match.items(group_node, path) or {}
        numbers = group.pop("params", [])
        group_names: list[str] = live_names[index] if index < len(live_names) else []
        if not isinstance(numbers, list) or len(group_names) != len(numbers):
            place = names.child_path(path, f"param_groups.{index}")
            found = len(numbers) if isinstance(numbers, list) else "none"
            match.differences.mismatched.append(
                f"{place}: {len(group_names)} parameters here, {found} in the checkpoint"
            )
            return {"state": {}, "param_groups": []}
        by_index.update(zip(numbers, group_names, strict=True))
        groups.append({"params": group_names, "options": group})
    state = [(values.decode_key(key, path), key, item) for key, item in values.pairs_of(items["state"]) or []]
    rest = [[key, item] for key, item in values.pairs_of(node) or [] if key not in ("state", "param_groups")]
    return {
        "state": {by_index[index]: item for index, _, item in state if index in by_index},
        "loose": [[key, item] for index, key, item in state if index not in by_index],
        "param_groups": groups,
        "rest": {"$dict": rest},
    }


def _by_place(body: dict[str, Json], live_names: list[list[str]]) -> dict[str, Json]:
    """``body`` with the names of the live parameters where one side knows no names but places in param groups.

    So an optimizer finds its state again whether or not its module was saved, or is restored, beside it.
    """
    saved_names = [group["params"] for group in body["param_groups"]]
    known = {name for group in saved_names for name in group} & {name for group in live_names for name in group}
    renamed: dict[str, str] = {}
    for index, (ours, theirs) in enumerate(zip(live_names, saved_names, strict=False)):
        if len(ours) != len(theirs):
            continue
        for position, (live, saved) in enumerate(zip(ours, theirs, strict=True)):
            place = names.place_in_groups(index, position)
            if place in (live, saved) and live not in known and saved not in known:
                renamed[saved] = live
    if not renamed:
        return body
    return dict(rename_parameters({"$optimizer": body}, lambda name: renamed.get(name, name))["$optimizer"])


def _sources(
    match: Matching, parameters: Mapping[str, Tensor], saved_names: Mapping[str, None], saved_as: Mapping[str, str]
) -> dict[str, str]:
    """The saved parameter whose state each live one takes: that of its name, or the one that it was tied to."""
    aliases = match.manifest.aliases
    tied: dict[str, str] = {}
    for name in saved_names:
        stored = saved_as.get(name, name)
        tied.setdefault(aliases.get(stored, stored), name)

    def source(name: str) -> str | None:
        if name in saved_names:
            return name
        stored = match.stored(name)
        return None if stored is None else tied.get(aliases.get(stored, stored))

    found = {name: source(name) for name in parameters}
    return {name: other for name, other in found.items() if other is not None}


def _misfit(match: Matching, parameter: Tensor, source: str, node: Json) -> str:
    """Why saved state is not for a parameter that has changed its shape since; such state would fail at a step."""
    saved = match.manifest.resolve(source)
    items = match.items(node, source) if node is not None else None
    if not items or saved is None or tuple(saved.shape) == tuple(parameter.shape):
        return ""
    stored = [match.entry(name) for name in map(tensor_name, items.values()) if name is not None]
    if any(tuple(entry.shape) == tuple(parameter.shape) for entry in stored):
        return ""  # what is saved of the parameter has another form than the parameter itself
    return f"of a parameter of shape {tuple(parameter.shape)} here, {tuple(saved.shape)} in the checkpoint"


def _match_state(
    match: Matching, live: Mapping[str, Any], beside: "Beside", node: Json, path: str, step_on_device: bool
) -> dict[Any, Thunk]:
    thunks: dict[Any, Thunk] = {}
    for key, item in (match.items(node, path) or {}).items():
        child = names.child_path(path, key)
        value = live.get(key)
        name = item.get("$tensor") if isinstance(item, dict) else None
        # State that has no data yet is made anew, where its parameter will be.
        part = as_part(value, beside.parameter) if isinstance(value, Tensor) and not is_meta(value) else None
        if (
            part is not None
            and name is not None
            and _same_kind(match, part, name)
            and match.filled_from(part) in (None, match.manifest.aliases.get(name, name))
        ):
            thunks[key] = _filled(match.tensor(part, item, child), value)
        else:
            thunks[key] = match.new(item, child, replace(beside, is_step=key == "step" and not step_on_device))
    return thunks


def _filled(fill: Thunk, live: Any) -> Thunk:
    return lambda: (fill(), live)[1]


def _same_kind(match: Matching, live: Tensor, name: str) -> bool:
    """Whether live optimizer state can take the stored tensor; if not, it is replaced, as torch's own loading does."""
    entry = match.entry(name)
    return tuple(live.shape) == tuple(entry.shape) and str(live.dtype) == f"torch.{entry.dtype}"


@dataclass(frozen=True, eq=False)
class Beside:
    """Room for optimizer state: on its parameter's device, and sharded like it where it has its shape.

    Beside a DTensor, state of another shape is a replicated one. A parameter that is still on the meta device will be
    where the load puts it, if it does, and so will its state.
    """

    match: Matching
    parameter: Tensor
    twin: str | None
    """The parameter's name where the state is that of another one, to which it was tied; each has its own from now."""
    is_step: bool = False
    """It is a step counter that is counted on the CPU; the policy is that of torch's ``Optimizer.load_state_dict``."""

    def _is_shaped(self, entry: TensorEntry) -> bool:
        return not self.is_step and tuple(entry.shape) == tuple(self.parameter.shape)

    def key(self, entry: TensorEntry) -> Hashable:
        place: Hashable = id(self.parameter) if is_meta(self.parameter) else None
        if is_distributed(self.parameter) and self._is_shaped(entry):
            place = id(self.parameter)
        elif is_dtensor(self.parameter):
            place = self.parameter.device_mesh
        return self.parameter.device, self.is_step, self.twin, place

    def make(self, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        if self._is_shaped(entry):
            return like(self.parameter, dtype)
        device = "cpu" if self._stays_on_cpu(entry) else host_of(self.parameter)
        return like_parameter(torch.empty(tuple(entry.shape), dtype=dtype, device=device), self.parameter)

    def finish(self, entry: TensorEntry, tensor: Tensor) -> Tensor:
        if not is_meta(self.parameter) or is_dtensor(self.parameter) or self._stays_on_cpu(entry):
            return tensor
        if id(self.parameter) not in self.match.materialised:
            return self.match.relocate(tensor, entry.location)
        _, fresh = self.match.materialised[id(self.parameter)]
        return tensor.to(fresh.value().device)

    def _stays_on_cpu(self, entry: TensorEntry) -> bool:
        return self.is_step and entry.location == "cpu"


def _counts_on_device(options: Json) -> bool:
    """Whether the options of a param group have its step counters live where the parameters do."""
    pairs = [(key, value) for key, value in values.pairs_of(options) or [] if isinstance(key, str)]
    return any(key in ("fused", "capturable") and value is True for key, value in pairs)


def _as_state_dict(
    live_names: list[list[str]],
    state: Mapping[str, dict[Any, Any]],
    loose: dict[Any, Any],
    options: list[dict[str, Any]],
    rest: dict[str, Any],
) -> dict[str, Any]:
    """Torch's state dict of what was saved, for the live optimizer's groups."""
    index_of: dict[str, int] = {}
    groups = []
    for group_names, group_options in zip(live_names, options, strict=True):
        for name in group_names:
            index_of.setdefault(name, len(index_of))
        groups.append(group_options | {"params": [index_of[name] for name in group_names]})
    by_index: dict[Any, Any] = {index_of[name]: values for name, values in state.items()}
    return {"state": by_index | loose, "param_groups": groups} | rest


def _load_state_dict(optimizer: Optimizer, state_dict: dict[str, Any], saved: list[Tensor]) -> None:
    """What ``Optimizer.load_state_dict`` does, less its cast of state to the parameter's dtype, which loses bits.

    ``saved`` are the parameters that the checkpoint knows; others keep the state they have.
    """
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = pre_hook(optimizer, state_dict) or state_dict
    groups = state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError("a load_state_dict hook has changed the number of parameters in the param groups")
    parameter_of = {
        index: parameter
        for group, live_group in zip(groups, optimizer.param_groups, strict=True)
        for index, parameter in zip(group["params"], live_group["params"], strict=True)
    }
    for parameter in saved:
        optimizer.state.pop(parameter, None)
    for key, value in state_dict["state"].items():
        optimizer.state[parameter_of.get(key, key)] = value
    for group, live_group in zip(groups, optimizer.param_groups, strict=True):
        own_names = live_group.get("param_names")
        live_group.update({key: value for key, value in group.items() if key != "params"})
        if own_names is not None:
            live_group["param_names"] = own_names
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)
