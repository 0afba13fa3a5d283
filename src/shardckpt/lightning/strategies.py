"""Strategies bound to the plugin: every rank writes its part, and tensors are read straight into the live model.

Stock Lightning calls a plugin's ``save_checkpoint`` on rank 0 alone and hands whole dicts around when it loads. A bound
strategy is an instance of a subclass of its own class that overrides just these places.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from shardckpt.lightning import agreement, flavours, live_state
from shardckpt.lightning.live_state import FlatState, LiveState, WholeState
from shardckpt.lightning.plugin import ShardedCheckpointIO
from shardckpt.lightning.restore import Part
from shardckpt.lightning.sharing import Running
from shardckpt.lightning.snapshot import MODEL, OPTIMIZERS, Produced

log = logging.getLogger(__name__)

_STANDARD: Final = ("save_checkpoint", "load_checkpoint", "load_model_state_dict", "load_optimizer_state_dict")
"""What a strategy must have left as Lightning has it, for the binding to know what it replaces."""
_PRODUCING: Final = ("lightning_module_state_dict", "optimizer_state")
"""And one that shards its state these too."""


def can_bind(strategy_class: Any) -> bool:
    """Whether it is known how this strategy class saves and loads: through ``CheckpointIO``, as DDP, or FSDP's way.

    DeepSpeed and XLA have other ways, and so may a user's subclass.
    """
    flavour = next((flavour for flavour in flavours.loaded() if flavour.defines(strategy_class)), None)
    if flavour is None:
        return False
    kind = _sharding_of(strategy_class)
    base = flavours.attribute(flavour, "strategies", kind or "Strategy")
    return all(
        getattr(strategy_class, name) is getattr(base, name) for name in _STANDARD + (_PRODUCING if kind else ())
    )


def _sharding_of(strategy_class: Any) -> str | None:
    """The name of Lightning's strategy that shards state which a class is or derives from; None where there is none."""
    for flavour in filter(flavours.Flavour.is_loaded, flavours.ALL):
        for name in live_state.SHARDED:
            if issubclass(strategy_class, flavours.attribute(flavour, "strategies", name)):
                return name
    return None


def is_bound(strategy_class: Any) -> bool:
    return "_shardckpt_bound" in vars(strategy_class)


def plugin_of(strategy: Any) -> ShardedCheckpointIO | None:
    """The strategy's plugin, if it is ours."""
    plugin = strategy.checkpoint_io
    return plugin if isinstance(plugin, ShardedCheckpointIO) else None


def prepare(strategy: Any) -> None:
    """Warm the memory that this rank's part of a checkpoint takes, beside training: the first save is fast then too."""
    plugin = plugin_of(strategy)
    if plugin is None:
        return
    try:
        plugin.checkpointer.prepare(strategy._shardckpt_live.memory())
    except Exception as error:  # noqa: BLE001 - training must not end for want of a warm-up
        # A hook may yet take out what cannot be saved; if none does, the save says so.
        log.debug("memory for checkpoints is not warmed: %s", error)


@functools.cache
def sharded(base: Any) -> Any:
    """The subclass of strategy class ``base`` whose instances are bound. Calls with one class return one class.

    Single inheritance, so that an existing instance can change its class to it.
    """
    flavour = next(flavour for flavour in flavours.ALL if flavour.defines(base))
    lightning_optimizer = flavours.attribute(flavour, "core.optimizer", "LightningOptimizer")
    to_device = flavour.fabric_module("utilities.optimizer")._optimizer_to_device
    live_kind = live_state.SHARDED.get(_sharding_of(base) or "", WholeState)

    class Bound(base):  # type: ignore[misc]  # the base is known when it runs, not before
        _shardckpt_bound = True
        _shardckpt_fitting = False
        _shardckpt_weights_only: bool | None = None
        _shardckpt_reading = live_kind is WholeState
        """Whether what is loaded goes through the plugin, and not through what this strategy has of its own."""

        @property
        def checkpoint_io(self) -> Any:
            if vars(self).get("_checkpoint_io") is None:
                self.checkpoint_io = ShardedCheckpointIO()
            return super().checkpoint_io

        @checkpoint_io.setter
        def checkpoint_io(self, plugin: Any) -> None:
            self._checkpoint_io = plugin

        @property
        def _shardckpt_produced(self) -> Produced:
            if "_shardckpt_notes" not in vars(self):
                self._shardckpt_notes = Produced()
            return self._shardckpt_notes

        @property
        def _shardckpt_live(self) -> LiveState:
            return (WholeState if plugin_of(self) is None else live_kind)(self, super())

        # -- saving

        def setup(self, trainer: Any) -> None:
            super().setup(trainer)
            self._shardckpt_fitting = trainer.state.fn == "fit"

        def lightning_module_state_dict(self) -> Any:
            state = self._shardckpt_live.model_to_save()
            self._shardckpt_produced.module(state)
            return state.state_dict

        def optimizer_state(self, optimizer: Any) -> Any:
            wrapped = isinstance(optimizer, lightning_optimizer)
            state = self._shardckpt_live.optimizer_to_save(optimizer.optimizer if wrapped else optimizer)
            self._shardckpt_produced.optimizer(state)
            return state.state_dict

        def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any | None = None) -> None:
            plugin = plugin_of(self)
            if plugin is None:
                super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
                return
            try:
                plugin.save_from_every_rank(checkpoint, filepath, storage_options, _running(self, filepath))
            finally:
                self._shardckpt_produced.forget()

        # -- loading

        def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None, **_: Any) -> Any:
            """Read the plain values. Tensors follow in `load_model_state_dict` and `load_optimizer_state_dict`.

            A Trainer of the documented contract passes ``state`` too. It holds no optimizers at this point, so the live
            ones are found later, here as well.
            """
            plugin = plugin_of(self)
            stock = super().load_checkpoint
            if plugin is None:
                return stock(checkpoint_path, weights_only=weights_only)
            if weights_only is None:  # Lightning drops it on the way to strategies that load after their setup
                weights_only = self._shardckpt_weights_only

            def itself(path: str) -> Any:
                self._shardckpt_reading = False
                return stock(path, weights_only=weights_only)

            self._shardckpt_reading = True
            # DCP's directories name no part of a flat parameter; torch's own code finds it.
            otherwise = itself if live_kind is FlatState else None
            return plugin.load_lazily(
                checkpoint_path, weights_only, otherwise=otherwise, mapped=live_kind is not WholeState
            )

        @property
        def lightning_restore_optimizer(self) -> bool:
            """True too where a strategy that would load its optimizers with its model has left them to the plugin."""
            return super().lightning_restore_optimizer or self._shardckpt_reading

        def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
            if not self._shardckpt_reading:
                super().load_model_state_dict(checkpoint, strict=strict)
                return
            part, live = checkpoint[MODEL], self._shardckpt_live
            # A module that overrides this is shown the whole dict and decides by itself what it takes.
            plain = type(self.lightning_module).load_state_dict is torch.nn.Module.load_state_dict
            target = live.model_to_restore()

            def is_ours() -> bool:
                untouched = plain and isinstance(part, Part) and part.is_still(MODEL)
                if untouched and not strict:
                    part.check_shapes(target)
                return untouched

            if _all_agree(self, "Trainer.load_model", is_ours):
                with live.restoring():
                    part.restore({MODEL: target}, strict=strict)
            else:
                # Read what is not read yet where a rank that cannot keeps no other waiting in a collective.
                _all_agree(self, "Trainer.read_model", lambda: bool(part))
                live.load_model(checkpoint, strict)

        def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
            if not self._shardckpt_reading:
                super().load_optimizer_state_dict(checkpoint)
                return
            parts, live = checkpoint[OPTIMIZERS], self._shardckpt_live
            targets = live.optimizers_to_restore()

            def is_ours() -> bool:
                counts = len(parts) == len(targets)
                return counts and all(map(_is_plain, parts, range(len(parts)), (t.optimizer for t in targets)))

            if _all_agree(self, "Trainer.load_optimizers", is_ours):
                with live.restoring():
                    if parts:
                        parts[0].restore({OPTIMIZERS: targets}, strict=True)
            else:
                _all_agree(self, "Trainer.read_optimizers", lambda: all(map(bool, parts)))
                live.load_optimizers(checkpoint)
            for optimizer in self.optimizers:
                to_device(optimizer, self.root_device)

        # -- the rest

        def teardown(self) -> None:
            self._shardckpt_fitting = False
            self._shardckpt_produced.forget()
            plugin = plugin_of(self)
            if plugin is None:
                super().teardown()
                return
            with plugin.tearing_down(interrupted=_status(_trainer(self)) == "interrupted"):
                super().teardown()

        def __getstate__(self) -> dict[str, Any]:
            state: dict[str, Any] = super().__getstate__()
            return {key: value for key, value in state.items() if not key.startswith("_shardckpt_")}

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return (flavours.new_bound, (sharded, base), self.__getstate__())

    return flavours.name_bound(Bound, base, __name__)


def _is_plain(part: Any, index: int, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's state is as the checkpoint has it, fits, and is kept on every rank.

    One that does not fit is torch's to judge, which refuses some of them and takes others.
    """
    return (
        isinstance(part, Part)
        and part.is_still(OPTIMIZERS, index)
        and not hasattr(optimizer, "consolidate_state_dict")
        and part.fits(optimizer)
    )


def _all_agree(strategy: Any, call: str, ask: Callable[[], bool]) -> bool:
    # Hooks may touch a part on one rank alone, and reading straight into the live state is a thing of all ranks.
    plugin = plugin_of(strategy)
    return plugin is not None and agreement.whether_all(call, ask, timeout=plugin.timeout)


def _trainer(strategy: Any) -> Any | None:
    # The module's own `trainer` property raises where there is none.
    return getattr(strategy.lightning_module, "_trainer", None)


def _status(trainer: Any | None) -> str | None:
    return None if trainer is None else str(trainer.state.status.value)


def _running(strategy: Any, path: Any) -> Running:
    trainer = _trainer(strategy)
    # Between the strategy's setup and its teardown of a fit somebody waits for the save later. SLURM's handler, which
    # alone uses this name, has the job killed as soon as the call returns.
    waited_for = strategy._shardckpt_fitting and _status(trainer) == "running"
    interrupted = _status(trainer) == "interrupted"
    at_once = os.path.basename(str(path)).startswith("hpc_ckpt_")
    progress = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    position = (
        getattr(trainer, "global_step", None),
        getattr(trainer, "current_epoch", None),
        repr(getattr(progress, "batch_progress", None)),
    )
    return Running(
        produced=strategy._shardckpt_produced,
        asynchronous=waited_for and not at_once,
        position=position,
        emergency=interrupted or at_once,
        interrupted=interrupted,
        replicas_agree=getattr(strategy, "_model_averager", None) is None,
    )
