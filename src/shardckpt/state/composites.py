"""Composites: values that are stored part by part, and how the nodes of their parts become their own.

Modules, state dicts, optimizers and sparse tensors are taken apart here. `flatten` walks over the parts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from shardckpt.errors import UnserialisableError
from shardckpt.state import names, values
from shardckpt.state.beside import is_sharded, parts
from shardckpt.state.leaves import layout_name
from shardckpt.state.skeleton import SPARSE_PARTS

Json = Any

LEFT_OUT: Final = object()
"""In place of a node: nothing of the value is selected."""


class Part(NamedTuple):
    """What stands at one place of a composite."""

    value: Any
    path: str
    split: bool
    """Whether its tensors are equal on all ranks."""


class Composite(NamedTuple):
    """A value taken apart. ``join`` makes its node of the nodes of its parts, in their order."""

    parts: list[Part]
    join: Callable[[list[Json]], Json]


def of_module(value: nn.Module | names.ModuleState, path: str) -> Composite:
    """A module, through its own ``state_dict()``, under names without wrappers' prefixes."""
    module = names.module_of(value)
    state_dict = value.state_dict if isinstance(value, names.ModuleState) else module.state_dict()
    cleaned = names.clean_names(module, list(state_dict))
    # FSDP1 leaves its prefix out of the state dict, so that only clean names can be compared.
    parameters = names.clean_parameters(module)
    entries = {
        clean: Part(state_dict[raw], names.child_path(path, clean), clean in parameters)
        for raw, clean in cleaned.items()
    }
    paths = names.clean_paths(module)
    return _of_entries(entries, {paths.get(raw, raw): version for raw, version in _versions(state_dict).items()})


def of_state_dict(value: Mapping[str, Any], path: str, split: bool) -> Composite:
    """What ``Module.state_dict()`` returned, without its module."""
    entries = {key: Part(item, names.child_path(path, key), split) for key, item in value.items()}
    return _of_entries(entries, _versions(value))


def _of_entries(entries: Mapping[str, Part], versions: Mapping[str, int]) -> Composite:
    def join(nodes: list[Json]) -> Json:
        kept = {name: node for name, node in zip(entries, nodes, strict=True) if node is not LEFT_OUT}
        if nodes and not kept:
            return LEFT_OUT
        return {"$module": {"entries": kept, "versions": versions}}

    return Composite(list(entries.values()), join)


def _versions(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """The versions that modules' own loading code asks for (BatchNorm's does), where they are not the usual 1."""
    versions = {name: entry.get("version") for name, entry in (getattr(state_dict, "_metadata", None) or {}).items()}
    return {name: version for name, version in versions.items() if type(version) is int and version != 1}


def of_sparse(value: Tensor, path: str, split: bool) -> Composite:
    """A sparse tensor; its parts are tensors, which are selected with it or not at all."""
    layout = layout_name(value)
    is_coo = value.layout is torch.sparse_coo
    coalesced = is_coo and value.is_coalesced()
    # The public accessors of a COO tensor refuse one that is not coalesced.
    found = {part: getattr(value.detach(), f"_{part}" if is_coo else part)() for part in SPARSE_PARTS[layout]}

    def join(nodes: list[Json]) -> Json:
        stored = dict(zip(found, nodes, strict=True))
        return {"$sparse": {"layout": layout, "size": list(value.shape), "coalesced": coalesced, "parts": stored}}

    return Composite([Part(tensor, names.child_path(path, part), split) for part, tensor in found.items()], join)


@dataclass(frozen=True)
class OptimizerContent:
    """An optimizer, its state dict, and the names of its parameters, param group by param group."""

    optimizer: torch.optim.Optimizer
    state_dict: Mapping[str, Any]
    named: list[list[str]]

    @classmethod
    def of(
        cls, value: torch.optim.Optimizer | names.OptimizerState, path: str, parameters: Mapping[int, str]
    ) -> "OptimizerContent":
        """Raises UnserialisableError for an optimizer that gives no state dict."""
        optimizer = names.optimizer_of(value)
        try:
            state_dict = value.state_dict if isinstance(value, names.OptimizerState) else optimizer.state_dict()
        except RuntimeError as error:  # a ZeroRedundancyOptimizer has none before it has been consolidated
            raise UnserialisableError(
                f"the {type(optimizer).__name__} at {path or 'the root'!r} gave no state dict: {error}"
            ) from error
        return cls(optimizer, state_dict, names.optimizer_parameter_names(value, parameters))

    @property
    def is_torch_format(self) -> bool:
        """Whether it can be taken apart; otherwise its state dict is a value like any other."""
        return names.is_torch_format(self.state_dict, self.named)

    def live_parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def composite(self, path: str, is_equal: Callable[[str], bool]) -> Composite:
        """State under the names of its parameters; ``is_equal`` tells what the user declares equal on all ranks."""
        state_path = names.child_path(path, "state")
        groups_path = names.child_path(path, "param_groups")
        by_index = self._by_index()
        keys: list[tuple[Any, str | None]] = []
        found: list[Part] = []
        for key, item in self.state_dict["state"].items():
            name, parameter = by_index.get(key, (None, None))
            child = names.child_path(state_path, key if name is None else name)
            value = item if parameter is None else parts(item, parameter, child, is_equal)
            keys.append((key, name))
            found.append(Part(value, child, not is_sharded(parameter)))
        for index, group in enumerate(self.state_dict["param_groups"]):
            options = {key: item for key, item in group.items() if key != "params"}
            found.append(Part(options, names.child_path(groups_path, index), True))
        rest = {key: item for key, item in self.state_dict.items() if key not in ("state", "param_groups")}
        found.append(Part(rest, path, True))

        def join(nodes: list[Json]) -> Json:
            return self._join(nodes, keys, path)

        return Composite(found, join)

    def _by_index(self) -> dict[Any, tuple[str, Tensor]]:
        """The name of each parameter and itself, by its key in the state dict."""
        return {
            index: (name, parameter)
            for group, group_names, live in zip(
                self.state_dict["param_groups"], self.named, self.optimizer.param_groups, strict=True
            )
            for index, name, parameter in zip(group["params"], group_names, live["params"], strict=True)
        }

    def _join(self, nodes: list[Json], keys: list[tuple[Any, str | None]], path: str) -> Json:
        states, options, rest = nodes[: len(keys)], nodes[len(keys) : -1], nodes[-1]
        kept = [(key, name, node) for (key, name), node in zip(keys, states, strict=True) if node is not LEFT_OUT]
        if not kept and options and all(node is LEFT_OUT for node in options):
            return LEFT_OUT
        loose = [[values.encode_key(key, path), node] for key, name, node in kept if name is None]
        body: dict[str, Json] = {
            "state": {name: node for _, name, node in kept if name is not None},
            "param_groups": [
                {"params": group_names, "options": {} if node is LEFT_OUT else node}
                for group_names, node in zip(self.named, options, strict=True)
            ],
        }
        if loose:
            body["loose"] = loose
        if rest is not LEFT_OUT and rest:
            body["rest"] = rest
        return {"$optimizer": body}
