"""Fabric: ``fabric.save`` and ``fabric.load`` through the plugin, every rank its part.

A Fabric gives its strategy the plugin by assigning to ``checkpoint_io`` when it is made. That assignment turns the
strategy into a bound one here; stock FSDP and ModelParallel strategies would raise at it, so this only adds. A strategy
that was made with the plugin in it is bound by a callback that Fabric gets from an entry point.

Saves are synchronous: Fabric has no hook at the end of a program, where somebody would wait for a save in flight and
hear of it if it failed.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from shardckpt.commit import checkpoint_path
from shardckpt.lightning import agreement, flavours, foreign, ordinary
from shardckpt.lightning.restore import Reading
from shardckpt.loading import OpenCheckpoint
from shardckpt.state import ModuleState, OptimizerState
from shardckpt.state.leaves import is_distributed
from shardckpt.state.names import clean_names, is_stateful

log = logging.getLogger(__name__)

Filters = Mapping[str, Callable[[str, Any], bool]]

_REFUSING: Final = ("FSDPStrategy", "ModelParallelStrategy")
"""Strategies that refuse plugins, since they write DCP directories themselves."""


def install() -> None:
    """Have the strategies of every Fabric that is imported bind themselves to a plugin that is assigned to them."""
    for flavour in flavours.ALL:
        if flavour.is_fabric_loaded():
            for base in _bases(flavour):
                flavours.wrap_setter(base, "checkpoint_io", _binding)


def _bases(flavour: flavours.Flavour) -> list[Any]:
    module = flavour.fabric_module("strategies")
    return [getattr(module, name) for name in (*_REFUSING, "Strategy")]


def _binding(stock: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def checkpoint_io(strategy: Any, plugin: Any) -> None:
        if not bind(strategy, flavours.taken_out(plugin)):
            stock(strategy, plugin)

    return checkpoint_io


class FabricBinding:
    """Fabric's callback for a strategy that was made with the plugin; does nothing to any other."""

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        bind(fabric.strategy, flavours.taken_out(getattr(fabric.strategy, "_checkpoint_io", None)))


def bind(strategy: Any, plugin: Any) -> bool:
    """Bind ``strategy``, in place, to ``plugin``, if that is ours; tells whether it is bound to it now.

    Raises UsageError for DeepSpeed's strategy.
    """
    if not _is_ours(plugin):
        return False
    flavours.refuse_deepspeed(type(strategy))
    if not is_bound(type(strategy)):
        if not can_bind(type(strategy)):
            log.warning(
                "%s has its own save_checkpoint or load_checkpoint, so ShardedCheckpointIO cannot have every process"
                " write a part of its checkpoints.",
                type(strategy).__name__,
            )
            return False
        strategy_class: Any = type(strategy)
        strategy.__class__ = sharded(strategy_class)
    strategy._checkpoint_io = plugin
    plugin.bind()
    return True


def is_bound(strategy_class: Any) -> bool:
    return "_shardckpt_bound" in vars(strategy_class)


def can_bind(strategy_class: Any) -> bool:
    """Whether this is a strategy of Fabric's that saves and loads as Lightning's own do."""
    for flavour in flavours.ALL:
        if flavour.is_fabric_loaded():
            base = next((base for base in _bases(flavour) if issubclass(strategy_class, base)), None)
            if base is not None:
                return all(
                    getattr(strategy_class, n) is getattr(base, n) for n in ("save_checkpoint", "load_checkpoint")
                )
    return False


def _is_ours(plugin: Any) -> bool:
    from shardckpt.lightning.plugin import ShardedCheckpointIO  # which imports this module, to have it installed

    return isinstance(plugin, ShardedCheckpointIO)


def _new_plugin() -> Any:
    from shardckpt.lightning.plugin import ShardedCheckpointIO

    return ShardedCheckpointIO()


@functools.cache
def sharded(base: Any) -> Any:
    """The subclass of strategy class ``base`` whose instances are bound. Calls with one class return one class.

    Single inheritance, so that an existing instance can change its class to it.
    """

    class Bound(base):  # type: ignore[misc]  # the base is known when it runs, not before
        _shardckpt_bound = True

        @property
        def checkpoint_io(self) -> Any:
            if vars(self).get("_checkpoint_io") is None:
                self._checkpoint_io = _new_plugin()
            return self._checkpoint_io

        @checkpoint_io.setter
        def checkpoint_io(self, plugin: Any) -> None:
            self._checkpoint_io = flavours.taken_out(plugin)

        def save_checkpoint(
            self, path: Any, state: dict[str, Any], storage_options: Any | None = None, filter: Any | None = None
        ) -> None:
            if _is_ours(self.checkpoint_io):
                _save(self, path, state, storage_options, filter or {})
            else:
                super().save_checkpoint(path, state, storage_options=storage_options, filter=filter)

        def load_checkpoint(
            self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
        ) -> dict[str, Any]:
            if not _is_ours(self.checkpoint_io):
                return super().load_checkpoint(path, state, strict=strict, weights_only=weights_only)  # type: ignore[no-any-return]
            plugin = self.checkpoint_io

            def decide() -> tuple[str, bool]:
                text, _, is_ordinary = plugin.found(path)
                return text, is_ordinary

            text, is_ordinary = agreement.from_rank_zero(
                "Fabric.load", decide, tuple[str, bool], timeout=plugin.timeout, before=plugin.wait
            )
            if not is_ordinary:
                opened = plugin.checkpointer.open(text, storage_options=plugin.options_for(text), collective=True)
                return _load(self, opened, state, strict, weights_only)
            if isinstance(state, dict) and state and _knows_its_parts(text, state):
                return _load_ordinary(self, text, state, strict, weights_only)
            return super().load_checkpoint(text, state, strict=strict, weights_only=weights_only)  # type: ignore[no-any-return]

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            # The class exists in no module, so a pickle names the class that it was made from.
            return (_new, (base,), vars(self))

    Bound.__name__ = Bound.__qualname__ = f"Sharded{base.__name__}"
    Bound.__doc__ = f"`{base.__name__}`, every process of which writes its own shard of each checkpoint."
    Bound.__module__ = __name__
    return Bound


def _new(base: Any) -> Any:
    bound = sharded(base)
    return bound.__new__(bound)


# -- saving ------------------------------------------------------------------------------------------------------------


def _save(strategy: Any, path: Any, state: dict[str, Any], storage_options: Any | None, filters: Filters) -> None:
    """Save on every rank, to the path that rank 0 was given; committed when it returns."""
    plugin = strategy.checkpoint_io

    def decide() -> str:
        text = checkpoint_path(path)
        plugin.displaced.make_way(text)
        return text

    text = agreement.from_rank_zero("Fabric.save", decide, str, timeout=plugin.timeout)
    try:
        plugin.checkpointer.save(_to_save(strategy, state, filters), text, storage_options=storage_options)
    finally:
        plugin.displaced.settle(None)
    plugin.wrote(text, storage_options)


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


# -- loading -----------------------------------------------------------------------------------------------------------


def _load(strategy: Any, opened: OpenCheckpoint, state: Any, strict: bool, weights_only: bool | None) -> dict[str, Any]:
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


def _knows_its_parts(path: str, state: Any) -> bool:
    """Whether tensors of an ordinary checkpoint can be read into live ones, that is, which part of each is here.

    Those of FSDP1 are flat, which Lightning's own code has to deal with. Its code also reads a file on a single device
    and under DDP.
    """
    modules = [module for value in state.values() if isinstance(value, nn.Module) for module in value.modules()]
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in modules):
        return False
    is_sharded = any(is_distributed(p) for module in modules for p in module.parameters(recurse=False))
    return is_sharded or ordinary.is_directory(path)


def _load_ordinary(
    strategy: Any, path: str, state: dict[str, Any], strict: bool, weights_only: bool | None
) -> dict[str, Any]:
    """As `_load`, from a file or a directory of stock Lightning's."""

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
