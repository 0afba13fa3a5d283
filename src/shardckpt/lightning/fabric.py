"""Fabric: ``fabric.save`` and ``fabric.load`` through the plugin, every rank its part.

A Fabric gives its strategy the plugin by assigning to ``checkpoint_io`` when it is made. That assignment turns the
strategy into a bound one here; stock FSDP and ModelParallel strategies would raise at it, so this only adds. A strategy
that was made with the plugin in it is bound by a callback that Fabric gets from an entry point.

Saves are synchronous: Fabric has no hook at the end of a program, where somebody would wait for a save in flight and
hear of it if it failed.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from shardckpt.errors import UsageError
from shardckpt.lightning import fabric_state, flavours

log = logging.getLogger(__name__)

_FLAT: Final = "FSDPStrategy"
_REFUSING: Final = (_FLAT, "ModelParallelStrategy")
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

    Raises UsageError for the strategies of DeepSpeed and of FSDP1.
    """
    if not _is_ours(plugin):
        return False
    flavours.refuse_deepspeed(type(strategy))
    if not is_bound(type(strategy)):
        if any(base.__name__ == _FLAT for base in type(strategy).__mro__):
            raise UsageError(
                f"{type(strategy).__name__} keeps its parameters flat (FSDP1), and under Fabric ShardedCheckpointIO"
                " cannot save or load such ones. Use ModelParallelStrategy with fully_shard (FSDP2), or leave the"
                " plugin out."
            )
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
                return base.__name__ != _FLAT and all(
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
                fabric_state.save(self, path, state, storage_options, filter or {})
            else:
                super().save_checkpoint(path, state, storage_options=storage_options, filter=filter)

        def load_checkpoint(
            self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
        ) -> dict[str, Any]:
            if not _is_ours(self.checkpoint_io):
                return super().load_checkpoint(path, state, strict=strict, weights_only=weights_only)  # type: ignore[no-any-return]
            plugin = self.checkpoint_io
            text, options, is_ordinary = plugin.find_together("Fabric.load", path)
            if not is_ordinary:
                opened = plugin.checkpointer.open(text, storage_options=options, collective=True)
                return fabric_state.load(self, opened, state, strict, weights_only)
            if isinstance(state, dict) and state and fabric_state.knows_its_parts(text, state):
                return fabric_state.load_ordinary(self, text, state, strict, weights_only)
            return super().load_checkpoint(text, state, strict=strict, weights_only=weights_only)  # type: ignore[no-any-return]

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return (flavours.new_bound, (sharded, base), vars(self))

    return flavours.name_bound(Bound, base, __name__)
