"""The binding: how a Trainer that was given the plugin comes to have every rank save.

Lightning calls the factories named by the entry points ``lightning.pytorch.callbacks_factory`` and
``pytorch_lightning.callbacks_factory`` whenever a Trainer is made. Ours return one callback while there is a
`ShardedCheckpointIO` in the process, and nothing otherwise. The callback's ``setup``, the first hook that runs in every
process, turns the Trainer's strategy into a bound one (`shardckpt.lightning.strategies`).

The like groups ``lightning.fabric.callbacks_factory`` and ``lightning_fabric.callbacks_factory`` are for Fabric, whose
strategies are bound when they are given the plugin (`shardckpt.lightning.fabric`), or at the latest here.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from shardckpt.lightning import fabric, flavours, from_checkpoint, model_checkpoint, strategies
from shardckpt.lightning.living import living
from shardckpt.lightning.plugin import ShardedCheckpointIO
from shardckpt.saving import wait_for_copies

log = logging.getLogger(__name__)


def lightning_callbacks() -> list[Any]:
    """The factory for Trainers of ``lightning``."""
    return _callbacks(flavours.LIGHTNING)


def pytorch_lightning_callbacks() -> list[Any]:
    """The factory for Trainers of ``pytorch_lightning``."""
    return _callbacks(flavours.PYTORCH_LIGHTNING)


def fabric_callbacks() -> list[Any]:
    """The factory for every Fabric, of either package."""
    return [fabric.FabricBinding()] if living else []


def _callbacks(flavour: flavours.Flavour) -> list[Any]:
    if not living:
        return []
    flavours.register(ShardedCheckpointIO)
    from_checkpoint.install()
    model_checkpoint.install()
    flavours.wrap(flavours.attribute(flavour, "trainer.trainer", "Trainer"), "_run", _noting)
    return [_binding_of(flavour)()]


def _noting(stock: Callable[..., Any]) -> Callable[..., Any]:
    def _run(self: Any, *args: Any, weights_only: bool | None = None, **kwargs: Any) -> Any:
        # Lightning itself does not tell strategies that load a checkpoint after their setup.
        if _unwrapped(self.strategy) is not None:
            self.strategy._shardckpt_weights_only = weights_only
        return stock(self, *args, weights_only=weights_only, **kwargs)

    return _run


@functools.cache
def _binding_of(flavour: flavours.Flavour) -> Any:
    callback: Any = flavours.attribute(flavour, "callbacks", "Callback")

    class ShardedCheckpointBinding(callback):  # type: ignore[misc]  # the base depends on the flavour
        """Binds the Trainer's strategy to its `ShardedCheckpointIO`; does nothing to a Trainer without one.

        With ``overlap="step"`` it comes first among the callbacks, so that none changes weights that are being copied.
        """

        _is_prepared = True

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            bound = bind(trainer.strategy)
            self._is_prepared = not (bound and stage == "fit" and trainer.checkpoint_callbacks)
            plugin = strategies.plugin_of(trainer.strategy)
            if bound and plugin is not None and plugin.overlaps:
                trainer.callbacks = [self, *(other for other in trainer.callbacks if other is not self)]

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            # Optimizers allocate their state at the first step: from then on it is known how much memory a save takes.
            if not self._is_prepared and trainer.global_step > 0:
                self._is_prepared = True
                strategies.prepare(trainer.strategy)
            self._log(trainer)

        def _log(self, trainer: Any) -> None:
            plugin = strategies.plugin_of(trainer.strategy)
            if plugin is not None and plugin.figures is not None:
                plugin.figures.log(trainer)

        def on_train_end(self, trainer: Any, *_: Any) -> None:
            wait_for_copies()
            plugin = strategies.plugin_of(trainer.strategy)
            if plugin is not None and plugin.figures is not None:
                plugin.settle()  # the figures of the last save, which loggers take no longer after this
            self._log(trainer)

        def _wait_for_copies(self, trainer: Any, *_: Any) -> None:
            # What `overlap="step"` copies changes by more than steps here: callbacks swap in averages, prune, restore.
            wait_for_copies()

        on_validation_start = _wait_for_copies
        on_train_epoch_start = _wait_for_copies
        on_train_epoch_end = _wait_for_copies

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            # The class exists in no module; spawned processes get the Trainer's callbacks pickled.
            return (_new, (flavour,))

    ShardedCheckpointBinding.__qualname__ = ShardedCheckpointBinding.__name__
    return ShardedCheckpointBinding


def _new(flavour: flavours.Flavour) -> Any:
    return _binding_of(flavours.Flavour(*flavour))()


def bind(strategy: Any) -> bool:
    """Bind ``strategy``, in place, to the plugin that it has; tells whether it is bound now."""
    plugin = _unwrapped(strategy)
    if plugin is None:
        return False
    if not strategies.is_bound(type(strategy)):
        flavours.refuse_deepspeed(type(strategy))
        if not strategies.can_bind(type(strategy)):
            log.warning(
                "%s reads and writes its checkpoints in its own way, so ShardedCheckpointIO cannot have every process"
                " write a part of them. Strategies for a single device, DDP, FSDP and ModelParallel can be bound, and"
                " subclasses of theirs that leave alone how they save and load.",
                type(strategy).__name__,
            )
            return False
        strategy_class: Any = type(strategy)
        strategy.__class__ = strategies.sharded(strategy_class)
    plugin.bind()
    return True


def _unwrapped(strategy: Any) -> ShardedCheckpointIO | None:
    """The strategy's plugin, taken out of an ``AsyncCheckpointIO``, which would copy every tensor a second time."""
    plugin = flavours.taken_out(strategy.checkpoint_io)
    found = plugin if isinstance(plugin, ShardedCheckpointIO) else None
    if found is not None and found is not strategy.checkpoint_io:
        log.info("ShardedCheckpointIO is asynchronous by itself: the AsyncCheckpointIO around it is taken off")
        strategy.checkpoint_io = found
    return found
