"""From an open checkpoint to what Lightning wants: all of it, what fits a given state, or a dict that reads lazily."""

from collections.abc import Iterable
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from shardckpt import coordinator
from shardckpt.errors import StateMismatchError, UsageError
from shardckpt.lightning.lazy import LazyDict
from shardckpt.lightning.snapshot import MODEL, OPTIMIZERS
from shardckpt.loading import OpenCheckpoint
from shardckpt.staging import StagingPool
from shardckpt.state import ModuleState
from shardckpt.state.leaves import is_uninitialised
from shardckpt.state.names import child_path, clean_names
from shardckpt.state.skeleton import child_node, module_entries, optimizer_node
from shardckpt.state.values import pairs_of

VERSION: Final = "pytorch-lightning_version"
"""The key by which Lightning knows a checkpoint of its own, and we a Trainer's dict among other dicts."""

Place = tuple[Any, ...]
"""Keys and indices that lead from the root of a state to a value in it."""


class Part(LazyDict):
    """A module's or an optimizer's state in a checkpoint: not read yet, or a dict like any other."""

    def __init__(
        self, *args: Any, opened: OpenCheckpoint | None = None, place: Place = (), weights_only: bool | None = None
    ) -> None:
        # Code that copies containers calls the class with contents alone, and gets a dict of them.
        super().__init__(*args)
        self._opened = opened
        self._place = place
        self._weights_only = weights_only

    def is_still(self, *place: Any) -> bool:
        """Whether this is what the checkpoint has at ``place``, and nobody has looked at it or put it elsewhere."""
        return self.is_untouched and self._place == place

    def check_shapes(self, live: nn.Module | ModuleState) -> None:
        """Raise StateMismatchError if a tensor has another shape in the checkpoint, which torch never lets pass."""
        assert self._opened is not None, "a part that was not looked at knows where it lies"
        module, state_dict = live if isinstance(live, ModuleState) else (live, live.state_dict())
        lines = []
        for raw, name in clean_names(module, list(state_dict)).items():
            full = child_path(".".join(map(str, self._place)), name)
            tensor, saved = state_dict[raw], self._opened.manifest.resolve(full)
            if saved is None or not isinstance(tensor, Tensor) or is_uninitialised(tensor):
                continue
            if tuple(tensor.shape) != tuple(saved.shape):
                lines.append(f"  {full}: {tuple(tensor.shape)} here, {tuple(saved.shape)} in the checkpoint")
        if lines:
            raise StateMismatchError(
                f"size mismatch between the model and {self._opened.path}, and nothing has been changed:\n"
                + "\n".join(lines)
                + "\nstrict=False (strict_loading) lets names be missing or left over, but no shape differ."
            )

    def fits(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer has the param groups of the saved one: as many, as large, with the same options."""
        assert self._opened is not None, "a part that was not looked at knows where it lies"
        body = optimizer_node(_node_at(self._opened, self._place))
        if body is None:
            return False
        saved = [(len(g["params"]), {key for key, _ in pairs_of(g["options"]) or []}) for g in body["param_groups"]]
        return saved == [(len(g["params"]), g.keys() - {"params"}) for g in optimizer.param_groups]

    def restore(self, state: dict[str, Any], *, strict: bool) -> None:
        """Read parts of the same checkpoint straight into live modules and optimizers.

        Raises StateMismatchError, if ``strict``, before anything is changed.
        """
        assert self._opened is not None, "a part that was not looked at knows where it lies"
        self._opened.restore(state, strict=strict, weights_only=self._weights_only)


class Reading:
    """One open checkpoint and how it is to be read."""

    def __init__(self, opened: OpenCheckpoint, map_location: Any, weights_only: bool | None) -> None:
        self._opened = opened
        self._map_location = map_location
        self._weights_only = weights_only

    def everything(self) -> Any:
        """The whole checkpoint as plain values and new tensors."""
        return self._value()

    def lazily(self) -> dict[str, Any]:
        """A Trainer's checkpoint, less modules and optimizers, which are read when somebody looks at them.

        Raises UsageError for a checkpoint that is no Trainer's.
        """
        keys = self._opened.keys()
        if VERSION not in keys:
            raise UsageError(
                f"{self._opened.path} was not saved by a Trainer: it lacks {VERSION!r}. Use shardckpt.load."
            )
        return {key: self._part(key) if key == MODEL else self._but_parts(key) for key in keys}

    def parts(self, keys: Iterable[Any]) -> dict[Any, Any]:
        """What the checkpoint has under ``keys``; modules and optimizers are read when somebody looks at them."""
        return {key: self._but_parts(key) for key in keys}

    def values(self, keys: Iterable[Any]) -> dict[Any, Any]:
        """What the checkpoint has under ``keys``, made anew."""
        return {key: self._value(key) for key in keys}

    def for_inference(self) -> dict[str, Any]:
        """The whole checkpoint, less what nobody asks for once training is over: optimizers, and further modules."""
        keys = self._opened.keys()
        return {key: self._value(key) if key == MODEL else self._but_parts(key) for key in keys}

    def into(self, state: nn.Module | Optimizer | dict[str, Any]) -> dict[str, Any] | None:
        """Restore into ``state`` in place; returns what is still to be applied, None where that is nothing."""
        if isinstance(state, (nn.Module, Optimizer)):
            return self._into_objects({"": state})
        return self._into_trainer_state(state) if VERSION in state and MODEL in state else self._into_objects(state)

    # -- into live state ----------------------------------------------------------------------------------------------

    def _into_trainer_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A Trainer's dict: model tensors that fit are read in place, and stand for themselves in what is returned.

        The optimizers' states in it show no live tensors before the first step, so those are read anew.
        """
        keys = self._opened.keys()
        rest = {key: self._value(key) for key in keys if key != MODEL}
        names = self._children(MODEL)
        live = {name: value for name, value in state[MODEL].items() if name in names and self._fits(name, value)}
        self._opened.restore({MODEL: live}, strict=False, weights_only=self._weights_only)
        return {MODEL: {name: live[name] if name in live else self._value(MODEL, name) for name in names}} | rest

    def _fits(self, name: str, value: Any) -> bool:
        entry = self._opened.manifest.resolve(f"{MODEL}.{name}")
        return (
            isinstance(value, Tensor)
            and entry is not None
            and tuple(value.shape) == tuple(entry.shape)
            and str(value.dtype) == f"torch.{entry.dtype}"
        )

    def _into_objects(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """A dict of modules, optimizers and other values, by keys of the checkpoint.

        A module and optimizers that the checkpoint has no key for are the Trainer's ``state_dict`` and
        ``optimizer_states``.
        """
        saved = self._opened.keys()
        target = {key: value for key, value in state.items() if key in saved}
        others = {key: value for key, value in state.items() if key not in saved}
        modules = [key for key, value in others.items() if isinstance(value, nn.Module)]
        if MODEL in saved and MODEL not in target and len(modules) == 1:
            target[MODEL] = others.pop(modules[0])
        optimizers: list[Optimizer] = []
        if OPTIMIZERS in saved and OPTIMIZERS not in target:
            optimizers = [others.pop(key) for key, value in [*others.items()] if isinstance(value, Optimizer)]
        if others:
            raise UsageError(f"{self._opened.path} has nothing for {[*others]}; it has {saved}.")
        if optimizers and len(optimizers) != len(states := self._children(OPTIMIZERS)):
            raise UsageError(
                f"{self._opened.path} holds the state of {len(states)} optimizers, and {len(optimizers)} were given."
            )
        named = any(isinstance(value, nn.Module) for value in target.values())
        if optimizers and named:
            target[OPTIMIZERS] = optimizers
        self._opened.restore(target, map_location=self._map_location, weights_only=self._weights_only)
        state.update((key, target[key]) for key in state if key in target)
        if not named:  # without a module parameters have no names, and are matched by their order
            for index, optimizer in enumerate(optimizers):
                optimizer.load_state_dict(self._value(OPTIMIZERS, index))
        applied = {*target, OPTIMIZERS} if optimizers else set(target)
        return {key: self._value(key) for key in saved if key not in applied} or None

    # -- values -------------------------------------------------------------------------------------------------------

    def _value(self, *place: Any) -> Any:
        return self._opened.materialise(place, map_location=self._map_location, weights_only=self._weights_only)

    def _part(self, *place: Any) -> Part:
        part = Part(opened=self._opened, place=place, weights_only=self._weights_only)
        part.read_with(lambda: self._value_later(place))
        return part

    def _value_later(self, place: Place) -> Any:
        """As `_value`, whatever became of the Trainer: a hook may keep a part longer than that lives."""
        pool = StagingPool()
        here = OpenCheckpoint(
            self._opened.path,
            self._opened.manifest,
            self._opened.storage,
            pool=pool,
            begin=lambda _: coordinator.begin_alone(),
            patience=0.0,
            share_reads=False,
            tell=lambda _: None,
        )
        try:
            return here.materialise(place, map_location=self._map_location, weights_only=self._weights_only)
        finally:
            pool.close()

    def _but_parts(self, key: Any) -> Any:
        node = self._node(key)
        if key == OPTIMIZERS and isinstance(node, list):
            return [self._part(key, index) for index in self._children(key)]
        is_part = module_entries(node) is not None or optimizer_node(node) is not None
        return self._part(key) if is_part else self._value(key)

    def _children(self, *place: Any) -> list[Any]:
        """The keys or indices of a container of the state, in order."""
        node = self._node(*place)
        if isinstance(node, list):
            return list(range(len(node)))
        entries = module_entries(node)
        return list(entries) if entries is not None else [key for key, _ in pairs_of(node) or []]

    def _node(self, *place: Any) -> Any:
        return _node_at(self._opened, place)


def _node_at(opened: OpenCheckpoint, place: Place) -> Any:
    node = opened.manifest.state
    for depth, key in enumerate(place):
        node = child_node(node, key, ".".join(map(str, place[:depth])))
    return node
