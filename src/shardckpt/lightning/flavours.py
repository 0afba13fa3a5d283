"""The two packages that Lightning comes in, ``lightning`` and ``pytorch_lightning``: same code, distinct classes.

Neither is imported before it is needed, and a program of one does not get the other imported by us.
"""

import abc
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, NamedTuple

from shardckpt.errors import UsageError


class Flavour(NamedTuple):
    """One of the two packages."""

    pytorch: str
    """Where the Trainer, strategies and callbacks are."""
    fabric: str
    """Where ``CheckpointIO`` is."""

    def is_installed(self) -> bool:
        # Fabric may be installed without the Trainer. A folder of that name is found too, but has no origin.
        spec = importlib.util.find_spec(self.fabric.partition(".")[0])
        return spec is not None and spec.origin is not None

    def is_loaded(self) -> bool:
        return self.pytorch in sys.modules

    def is_fabric_loaded(self) -> bool:
        return self.fabric in sys.modules

    def module(self, name: str) -> ModuleType:
        """A module below the flavour's ``pytorch`` package, imported if need be."""
        return importlib.import_module(f"{self.pytorch}.{name}")

    def fabric_module(self, name: str) -> ModuleType:
        """A module below the flavour's ``fabric`` package, imported if need be."""
        return importlib.import_module(f"{self.fabric}.{name}")

    def checkpoint_io(self) -> abc.ABCMeta:
        found: abc.ABCMeta = self.fabric_module("plugins.io.checkpoint_io").CheckpointIO
        return found

    def defines(self, cls: type) -> bool:
        """Whether ``cls`` is one of the flavour's classes or derives from one."""
        packages = (f"{self.pytorch}.", f"{self.fabric}.")
        return any(base.__module__.startswith(packages) for base in cls.__mro__)


LIGHTNING: Final = Flavour("lightning.pytorch", "lightning.fabric")
PYTORCH_LIGHTNING: Final = Flavour("pytorch_lightning", "lightning_fabric")
ALL: Final = (LIGHTNING, PYTORCH_LIGHTNING)


def loaded() -> list[Flavour]:
    """The flavours that this process has imported."""
    return [flavour for flavour in ALL if flavour.is_loaded()]


def main() -> Flavour:
    """The flavour whose ``CheckpointIO`` ours inherits: one that is imported already, else ``lightning`` if installed.

    Raises:
        ImportError: neither is installed.
    """
    for flavour in [*loaded(), *(flavour for flavour in ALL if flavour.is_installed())]:
        return flavour
    raise ImportError(
        "shardckpt.lightning needs Lightning, and neither `lightning` nor `pytorch_lightning` is installed: "
        'pip install "shardckpt[lightning]"'
    )


def of(instance: object) -> Flavour | None:
    """The flavour that an instance's class belongs to; None where it belongs to neither."""
    return next((flavour for flavour in ALL if flavour.defines(type(instance))), None)


def register(plugin: type) -> None:
    """Make ``plugin`` a ``CheckpointIO`` in the eyes of the flavours.

    A Trainer checks its plugins with ``isinstance`` against its own flavour's class. ``pytorch_lightning`` may be
    imported later than the plugin is made, so the module of its that defines the class is imported here, at little
    cost. The like module of ``lightning`` brings all of it along, so that waits until the program imports it.
    """
    for flavour in ALL:
        if flavour.is_loaded() or (flavour is PYTORCH_LIGHTNING and flavour.is_installed()):
            checkpoint_io = flavour.checkpoint_io()
            if not issubclass(plugin, checkpoint_io):
                checkpoint_io.register(plugin)


def taken_out(plugin: Any) -> Any:
    """``plugin``, without the ``AsyncCheckpointIO`` around it, which would copy every tensor a second time."""
    return plugin.checkpoint_io if type(plugin).__name__ == "AsyncCheckpointIO" else plugin


def attribute(flavour: Flavour, module: str, name: str) -> Any:
    """``<flavour>.<module>.<name>``."""
    return getattr(flavour.module(module), name)


def wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace a function of Lightning's by ``wrapper`` of it, once, however often this is called."""
    stock = getattr(owner, name)
    if not hasattr(stock, "_shardckpt_wraps"):
        wrapped = wrapper(stock)
        wrapped._shardckpt_wraps = stock
        setattr(owner, name, wrapped)


def wrap_property(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Any]) -> None:
    """As `wrap`, for a property that cannot be set."""
    stock = vars(owner)[name].fget
    if not hasattr(stock, "_shardckpt_wraps"):
        wrapped = wrapper(stock)
        wrapped._shardckpt_wraps = stock
        setattr(owner, name, property(wrapped))


def wrap_setter(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Any]) -> None:
    """As `wrap`, for what assigning to a property of a class does."""
    stock = vars(owner)[name]
    if not hasattr(stock.fset, "_shardckpt_wraps"):
        wrapped = wrapper(stock.fset)
        wrapped._shardckpt_wraps = stock.fset
        setattr(owner, name, stock.setter(wrapped))


def refuse_deepspeed(strategy_class: type) -> None:
    """Raise UsageError for DeepSpeed's strategy: it writes its checkpoints itself, so none of them would be ours.

    XLA's strategies refuse every plugin but their own, and say so.
    """
    for base in strategy_class.__mro__:
        if base.__name__ == "DeepSpeedStrategy" and base.__module__.startswith(_PACKAGES):
            raise UsageError(
                f"{strategy_class.__name__} saves and loads its checkpoints with DeepSpeed's own engine and never asks"
                " a CheckpointIO plugin, so ShardedCheckpointIO would do nothing. Leave the plugin out to keep"
                " DeepSpeed's checkpoints, or train with FSDPStrategy, ModelParallelStrategy or DDPStrategy, under"
                " which every process writes its shard."
            )


_PACKAGES: Final = tuple(f"{package}." for flavour in ALL for package in (flavour.pytorch, flavour.fabric))


def name_bound(bound: Any, base: Any, module: str) -> Any:
    """Give ``bound``, the subclass of a strategy class whose instances are bound, its name and docstring."""
    bound.__name__ = bound.__qualname__ = f"Sharded{base.__name__}"
    bound.__doc__ = f"`{base.__name__}`, every process of which writes its own shard of each checkpoint."
    bound.__module__ = module
    return bound


def new_bound(make: Callable[[Any], Any], base: Any) -> Any:
    """An empty instance of what ``make`` makes of ``base``: a class in no module, so that pickles name these two."""
    bound = make(base)
    return bound.__new__(bound)
