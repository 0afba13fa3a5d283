"""What Fabric saves and loads: a dict of modules, optimizers and other values, on every rank of a bound strategy."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from shardckpt.commit import checkpoint_path
from shardckpt.lightning import agreement, flavours, foreign, ordinary
from shardckpt.lightning.restore import Reading
from shardckpt.loading import OpenCheckpoint
from shardckpt.state import ModuleState, OptimizerState
from shardckpt.state.leaves import is_distributed
from shardckpt.state.names import clean_names, is_stateful

Filters = Mapping[str, Callable[[str, Any], bool]]


def save(strategy: Any, path: Any, state: dict[str, Any], storage_options: Any | None, filters: Filters) -> None:
    """Save on every rank, to the path that rank 0 was given; committed when it returns."""
    plugin = strategy.checkpoint_io

    with plugin.displaced.making_way() as way:

        def decide() -> str:
            text = checkpoint_path(path)
            way.make(text)
            return text

        text = agreement.from_rank_zero("Fabric.save", decide, str, timeout=plugin.timeout)
        chosen = agreement.on_all("Fabric.state", lambda: _to_save(strategy, state, filters), timeout=plugin.timeout)
        plugin.checkpointer.save(chosen, text, storage_options=storage_options)
    plugin.places.wrote(text, storage_options)


def _to_save(strategy: Any, state: dict[str, Any], filters: Filters) -> dict[str, Any]:
    """``state`` as the engine takes it, less what the filters leave out: they see what Fabric would show them."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        chosen = filters.get(key)
        if isinstance(value, Optimizer) and hasattr(value, "consolidate_state_dict"):
            # One that shards its state itself: whole on rank 0, empty elsewhere.
            value = strategy.get_optimizer_state(value)
        if chosen is None:
            found[key] = value
        elif isinstance(value, nn.Module):
            state_dict = value.state_dict()
            cleaned = clean_names(value, list(state_dict))
            found[key] = ModuleState(value, {n: v for n, v in state_dict.items() if chosen(cleaned[n], v)})
        elif isinstance(value, Optimizer):
            kept = {name: item for name, item in value.state_dict().items() if chosen(name, item)}
            found[key] = OptimizerState(value, kept)
        else:
            converted = value.state_dict() if is_stateful(value) else value
            is_dict = isinstance(converted, dict)
            found[key] = {n: v for n, v in converted.items() if chosen(n, v)} if is_dict else converted
    return found


def load(strategy: Any, opened: OpenCheckpoint, state: Any, strict: bool, weights_only: bool | None) -> dict[str, Any]:
    """Restore ``state`` in place, and return what is left, of which modules and optimizers are read when looked at."""
    reading = Reading(opened, "cpu", weights_only)
    timeout = strategy.checkpoint_io.timeout
    if isinstance(state, (nn.Module, Optimizer)):
        opened.restore(state, strict=strict or isinstance(state, Optimizer), weights_only=weights_only)
        return {}
    if not state:
        everything: dict[str, Any] = agreement.on_all("Fabric.read", reading.everything, timeout=timeout)
        return everything

    def match() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        saved = opened.keys()
        _check_keys(strategy, state, saved, strict=strict)
        live = {key: value for key, value in state.items() if key in saved and _fits(opened, key, value)}
        for key, value in live.items():
            if isinstance(value, nn.Module) and not strict:
                reading.parts([key])[key].check_shapes(value)
        others = reading.values(key for key in state if key in saved and key not in live)
        return live, others, reading.parts(key for key in saved if key not in state)

    live, others, rest = agreement.on_all("Fabric.match", match, timeout=timeout)
    opened.restore(live, strict=strict, weights_only=weights_only)
    state.update(live | others)
    return rest


def _fits(opened: OpenCheckpoint, key: str, value: Any) -> bool:
    """Whether a value is restored in place; a tensor of another kind is replaced, as stock Fabric replaces them all."""
    if not isinstance(value, Tensor) or is_distributed(value):
        return True
    entry = opened.manifest.resolve(key)
    kind = (tuple(value.shape), str(value.dtype))
    return entry is not None and kind == (tuple(entry.shape), f"torch.{entry.dtype}")


def knows_its_parts(path: str, state: Any) -> bool:
    """Whether tensors of an ordinary checkpoint can be read into live ones, that is, which part of each is here.

    Those of FSDP1 are flat, which Lightning's own code has to deal with. Its code also reads a file on a single device
    and under DDP.
    """
    modules = [module for value in state.values() if isinstance(value, nn.Module) for module in value.modules()]
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in modules):
        return False
    is_sharded = any(is_distributed(p) for module in modules for p in module.parameters(recurse=False))
    return is_sharded or ordinary.is_directory(path)


def load_ordinary(
    strategy: Any, path: str, state: dict[str, Any], strict: bool, weights_only: bool | None
) -> dict[str, Any]:
    """As `load`, from a file or a directory of stock Lightning's."""

    def match() -> tuple[foreign.Source, dict[str, Any]]:
        source: foreign.Source
        if ordinary.is_directory(path):
            found = foreign.load(path, "cpu", weights_only)
            source = next(part.directory for part in found.values() if isinstance(part, foreign.ForeignPart))
        else:
            source = foreign.File(path, weights_only)
            found = dict(source.contents)
        _check_keys(strategy, state, found, strict=strict)
        return source, found

    source, found = agreement.on_all("Fabric.match", match, timeout=strategy.checkpoint_io.timeout)
    modules = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
    targets: dict[str, Any] = {}
    for key, value in state.items():
        if key in found and isinstance(value, (nn.Module, Optimizer)):
            part = found.pop(key)
            top = part.source if isinstance(part, foreign.ForeignPart) else key
            targets[top] = OptimizerState(value, {}, modules) if isinstance(value, Optimizer) else value
    foreign.restore(source, targets, strict=strict)
    for key in [key for key in state if key in found]:
        saved = found.pop(key)
        if is_stateful(state[key]):
            state[key].load_state_dict(saved)
        else:
            state[key] = saved
    return found


def _check_keys(strategy: Any, state: Any, saved: Any, *, strict: bool) -> None:
    """Raise the KeyError that Fabric raises for a key that the checkpoint lacks."""
    flavour = flavours.of(strategy)
    assert flavour is not None, "a bound strategy is one of Lightning's"
    flavour.fabric_module("strategies.strategy")._validate_keys_for_strict_loading(state.keys(), saved, strict=strict)
