"""What the ranks do in the matrix of layouts: every source saved once, then every target restores all of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

import shardckpt
from multirank import matrix_layouts as ml
from shardckpt import Checkpointer
from states import bits


class Side:
    """A model with an optimizer of each kind: as it was saved, or as it should come back."""

    def __init__(self, layout: ml.Layout) -> None:
        self.layout = layout
        self.model = layout.build("model")
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        if layout.is_module:
            self.first, self.second, self.gradients = (layout.build(key) for key in ("first", "second", "gradients"))
            self.optimizers = self.new_optimizers(lr=0.125)
            self.fill()

    def new_optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        return ml.optimizers(self.model, lr)

    def fill(self) -> None:
        for kind, optimizer in self.optimizers.items():
            ml.fill(optimizer, kind, self.model, self.first, self.second)

    def state(self) -> dict[str, Any]:
        if not self.layout.is_module:
            return {"model": self.model.state_dict()}
        return {"model": self.model, **self.optimizers}


def leaves(model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> Iterator[tuple[str, Any]]:
    """Everything that must come back, by name."""
    for name, value in model.state_dict().items():
        yield f"model.{name.removeprefix('module.')}", value
    for kind, optimizer in optimizers.items():
        for name, parameter in ml.named_parameters(model):
            state = optimizer.state.get(parameter, {})
            yield from ((f"{kind}.{name}.{key}", value) for key, value in sorted(state.items()))
        for index, group in enumerate(optimizer.param_groups):
            yield from ((f"{kind}.{index}.{key}", value) for key, value in group.items() if key != "params")


def image(value: Any) -> Any:
    """What two equal values have in common: for a tensor its kind, its layout and its local bits."""
    if isinstance(value, ShardedTensor):
        return [(shard.metadata.shard_offsets, image(shard.tensor)) for shard in value.local_shards()]
    if isinstance(value, DTensor):
        return value.device_mesh, value.placements, tuple(value.shape), image(value.to_local())
    if isinstance(value, Tensor):
        return "tensor", value.dtype, tuple(value.shape), bits(value)
    return type(value), value


def images(model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Any]:
    return {name: image(value) for name, value in leaves(model, optimizers)}


def spoil(model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Make every tensor another one, where it is."""
    for _, value in leaves(model, optimizers):
        tensors = [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                local.detach().fill_(77)


def save(rank: int, root: str, numbers: list[int]) -> None:
    checkpointer = Checkpointer(timeout=60, commit_timeout=60)
    for number in numbers:
        checkpointer.save(Side(ml.LAYOUTS[number]).state(), f"{root}/{number}")
    checkpointer.close()


def load(rank: int, root: str, target: int) -> int:
    """Every source's checkpoint into one target, which then trains on as if it had never stopped.

    By turns the optimizers are fresh, or have state that is to be overwritten in place.
    """
    live, reference = Side(ml.LAYOUTS[target]), Side(ml.LAYOUTS[target])
    expected = images(reference.model, reference.optimizers)
    if reference.optimizers:
        ml.step(reference.optimizers, reference.model, reference.gradients)
    after = images(reference.model, reference.optimizers)
    checkpointer = Checkpointer(timeout=60, commit_timeout=60)
    for number, source in enumerate(ml.LAYOUTS):
        where = (source, live.layout)
        fresh = (number + target) % 2 == 0 or not source.is_module
        if live.layout.is_module:
            live.optimizers = live.new_optimizers(lr=99.0)
            if not fresh:
                live.fill()
        spoil(live.model, live.optimizers)
        state = live.state() if source.is_module else {"model": live.state()["model"]}
        pointers = {name: value.data_ptr() for name, value in leaves(live.model, {}) if type(value) is Tensor}
        report = checkpointer.load(f"{root}/{number}", state)
        assert not report.missing + report.unexpected + report.mismatched, (where, str(report))
        assert all(value.data_ptr() == pointers[name] for name, value in leaves(live.model, {}) if name in pointers)
        restored = images(live.model, live.optimizers if source.is_module else {})
        wanted = expected if source.is_module else {name: expected[name] for name in restored}
        assert restored.keys() == wanted.keys(), (where, restored.keys() ^ wanted.keys())
        for name, value in restored.items():
            assert value == wanted[name], (where, name, value, wanted[name])
        # Steps of DTensors are slow, and equal states make equal ones: two of the fresh, two of the others will do.
        if live.optimizers and source.is_module and (number + target) % 7 == 0:
            ml.step(live.optimizers, live.model, live.gradients)
            for name, value in images(live.model, live.optimizers).items():
                assert value == after[name], (where, "trained", name)
    checkpointer.close()
    return len(ml.LAYOUTS)


def load_whole(root: str) -> None:
    """Every source's checkpoint without a template: plain tensors on one process."""
    model = ml.bare("model")
    for number, source in enumerate(ml.LAYOUTS):
        loaded = shardckpt.load(f"{root}/{number}")["model"]
        assert loaded.keys() == model.state_dict().keys(), source
        for name, value in model.state_dict().items():
            assert image(loaded[name]) == image(value), (source, name)
