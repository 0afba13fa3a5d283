"""How the live model and optimizers of a strategy are reached: this rank's part, under names that all strategies share.

A model's state dict holds whole tensors, or such as say themselves what this rank has of them; an optimizer's state
goes by its parameters' names. So every strategy saves its state as it is, and what any other one saved is read straight
into it. Stock Lightning gathers a sharded state first, or hands it to DCP.
"""

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
)
from torch.optim import Optimizer

from shardckpt.box import slices
from shardckpt.lightning.snapshot import MODEL, OPTIMIZERS
from shardckpt.state import ModuleState, OptimizerState
from shardckpt.state.leaves import is_distributed, local_tensor


class LiveState(Protocol):
    """The model and the optimizers of one strategy. Every rank calls, in the same order: there may be collectives."""

    def __init__(self, strategy: Any, stock: Any) -> None:
        """``stock`` has the methods that Lightning gave to ``strategy``."""

    def model_to_save(self) -> ModuleState: ...

    def optimizer_to_save(self, optimizer: Optimizer) -> OptimizerState: ...

    def model_to_restore(self) -> ModuleState: ...

    def optimizers_to_restore(self) -> list[OptimizerState]: ...

    def restoring(self) -> AbstractContextManager[Any]:
        """Within it the two are restored."""

    def load_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Load a checkpoint's model from whole tensors, which every rank has: a hook has looked at them."""

    def load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        """Load a checkpoint's optimizers from torch's index-keyed state dicts of whole tensors, likewise."""

    def memory(self) -> Any:
        """A state that takes as much memory as a save does, had without a collective."""


class WholeState:
    """Of a strategy under which every rank has all of it: a single device, DDP."""

    def __init__(self, strategy: Any, stock: Any) -> None:
        self._module = strategy.lightning_module
        self._optimizers: list[Optimizer] = strategy.optimizers
        self._stock = stock

    def model_to_save(self) -> ModuleState:
        return ModuleState(self._module, self._stock.lightning_module_state_dict())

    def optimizer_to_save(self, optimizer: Optimizer) -> OptimizerState:
        return OptimizerState(optimizer, self._stock.optimizer_state(optimizer), {MODEL: self._module})

    def model_to_restore(self) -> ModuleState:
        return ModuleState(self._module, self._module.state_dict())

    def optimizers_to_restore(self) -> list[OptimizerState]:
        return [OptimizerState(optimizer, {}, {MODEL: self._module}) for optimizer in self._optimizers]

    def restoring(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def load_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        self._stock.load_model_state_dict(checkpoint, strict=strict)

    def load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        self._stock.load_optimizer_state_dict(checkpoint)

    def memory(self) -> Any:
        states = [OptimizerState(o, o.state_dict(), {MODEL: self._module}) for o in self._optimizers]
        return {MODEL: self._module, OPTIMIZERS: states}


class DTensorState(WholeState):
    """Of a ``ModelParallelStrategy``: FSDP2 and tensor parallel, whose parameters and optimizer state are DTensors."""

    def model_to_save(self) -> ModuleState:
        return self.model_to_restore()

    def optimizer_to_save(self, optimizer: Optimizer) -> OptimizerState:
        return OptimizerState(optimizer, optimizer.state_dict(), {MODEL: self._module})

    def load_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        live, whole = self._module.state_dict(), checkpoint[MODEL]
        parts = OrderedDict((name, _part_of(value, live.get(name))) for name, value in whole.items())
        if hasattr(whole, "_metadata"):
            parts._metadata = whole._metadata  # type: ignore[attr-defined]
        self._module.load_state_dict(parts, strict=strict)

    def load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state_dict in zip(self._optimizers, checkpoint[OPTIMIZERS], strict=False):
            indices = [index for group in state_dict["param_groups"] for index in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            like = dict(zip(indices, parameters, strict=False))
            state = {
                index: {key: _copied(value, like.get(index)) for key, value in values.items()}
                if isinstance(values, Mapping)
                else values
                for index, values in state_dict["state"].items()
            }
            optimizer.load_state_dict({**state_dict, "state": state})


class FlatState:
    """Of an ``FSDPStrategy``: FSDP1, whose flat parameters torch turns into sharded ones with their names, and back.

    It does so module by module and tensor by tensor, with collectives, so no rank ever has all of the state.
    """

    def __init__(self, strategy: Any, stock: Any) -> None:
        self._model = strategy.model
        self._optimizers: list[Optimizer] = strategy.optimizers

    def restoring(self) -> AbstractContextManager[Any]:
        modules = FullyShardedDataParallel.fsdp_modules(self._model)
        # What torch does not shard (NO_SHARD, a world of one), it has no sharded state dict of either.
        if all(module.sharding_strategy is ShardingStrategy.NO_SHARD for module in modules):
            return self._whole()
        return FullyShardedDataParallel.state_dict_type(
            self._model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()
        )

    def _whole(self) -> AbstractContextManager[Any]:
        return FullyShardedDataParallel.state_dict_type(
            self._model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(rank0_only=False),
            FullOptimStateDictConfig(rank0_only=False),
        )

    def model_to_save(self) -> ModuleState:
        with self.restoring():
            return ModuleState(self._model, self._model.state_dict())

    def model_to_restore(self) -> ModuleState:
        return self.model_to_save()

    def optimizer_to_save(self, optimizer: Optimizer) -> OptimizerState:
        return self._unflattened(optimizer, {})

    def optimizers_to_restore(self) -> list[OptimizerState]:
        parameters = self.model_to_save().state_dict
        return [self._unflattened(optimizer, parameters) for optimizer in self._optimizers]

    def _unflattened(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> OptimizerState:
        """An optimizer's state, and one that stands for it, of those of the model's ``parameters`` that are given."""
        with self.restoring():
            state_dict = FullyShardedDataParallel.optim_state_dict(self._model, optimizer)
        for values in state_dict["state"].values():
            for key, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, Tensor) and not value.shape:
                    # The parameters of one flat parameter share its step counter, which each must have for itself.
                    values[key] = value.clone()
        groups = state_dict["param_groups"]
        stand_in = _Unflattened(self._model, optimizer, groups, parameters)
        return OptimizerState(stand_in, state_dict, {}, [[f"{MODEL}.{n}" for n in group["params"]] for group in groups])

    def load_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        with self._whole():
            self._model.load_state_dict(checkpoint[MODEL], strict=strict)

    def load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        targets = self.optimizers_to_restore()
        with self._whole():
            for target, state_dict in zip(targets, checkpoint[OPTIMIZERS], strict=False):
                target.optimizer.load_state_dict(dict(state_dict))

    def memory(self) -> Any:
        state = [values for optimizer in self._optimizers for values in optimizer.state.values()]
        return {
            "parameters": [parameter.detach() for parameter in self._model.parameters()],
            "state": [[value for value in values.values() if isinstance(value, Tensor)] for values in state],
        }


SHARDED: Final[dict[str, type[LiveState]]] = {
    "ModelParallelStrategy": DTensorState,
    "FSDPStrategy": FlatState,
}
"""By the name of the strategy class in Lightning's ``strategies``."""


class _Unflattened(Optimizer):
    """Stands for an optimizer of flat parameters: its parameters are the model's own, and it hands on what it loads."""

    def __init__(
        self, model: Any, optimizer: Optimizer, groups: list[dict[str, Any]], parameters: Mapping[str, Tensor]
    ) -> None:
        # Not torch's own: it would take them for parameters that are to be trained.
        self._model = model
        self._flat = optimizer
        self._names: list[list[str]] = [group["params"] for group in groups]
        self.state = {}  # type: ignore[assignment]
        self.param_groups = [
            group | {"params": [parameters.get(name) for name in names]}
            for group, names in zip(groups, self._names, strict=True)
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = [
            {**group, "params": names} for group, names in zip(state_dict["param_groups"], self._names, strict=True)
        ]
        name_of = {
            index: name
            for group, names in zip(state_dict["param_groups"], self._names, strict=True)
            for index, name in zip(group["params"], names, strict=True)
        }
        named = {name_of.get(index, index): values for index, values in state_dict["state"].items()}
        flat = FullyShardedDataParallel.optim_state_dict_to_load(
            self._model, self._flat, {"state": named, "param_groups": groups}
        )
        self._flat.load_state_dict(flat)


def _part_of(whole: Any, like: Any) -> Any:
    """Of a whole tensor this rank's part, cut as ``like`` is; anything else as it is."""
    if not isinstance(whole, Tensor) or not is_distributed(like) or is_distributed(whole) or whole.shape != like.shape:
        return whole
    part = torch.empty_like(like.detach(), dtype=whole.dtype)
    leaf = local_tensor("", part, split=False)
    for box, view in zip(leaf.boxes, leaf.views, strict=True):
        view.copy_(whole[slices(box)])
    return part


def _copied(whole: Any, like: Any) -> Any:
    """As `_part_of`, in memory of its own: an optimizer keeps what it is given, which may be the pages of a file."""
    part = _part_of(whole, like)
    return part.clone() if part is whole and isinstance(part, Tensor) else part
