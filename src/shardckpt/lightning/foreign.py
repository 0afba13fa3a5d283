"""Checkpoints that are not ours, read into live modules and optimizers, of which this rank may hold a part only.

A file of stock Lightning holds whole tensors, and is mapped into memory; a directory of its FSDP and ModelParallel
strategies holds shards, and is read by DCP. What either has for an optimizer goes by parameter names or by order, and
finds its parameter by that. No optimizer is stepped for it, while torch's own loading steps one without state.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint._traverse import set_element
from torch.optim import Optimizer

from shardckpt.box import slices
from shardckpt.dcp_directory import Directory, Stored
from shardckpt.errors import LoadFailedError, StateMismatchError
from shardckpt.lightning import agreement
from shardckpt.lightning.restore import VERSION, Part
from shardckpt.lightning.snapshot import MODEL, OPTIMIZERS
from shardckpt.state import ModuleState, OptimizerState
from shardckpt.state.leaves import is_raw_tensor, local_tensor
from shardckpt.state.names import clean_names, module_of, optimizer_parameter_names, parameter_names

Rest = tuple[Any, ...]
"""Keys that lead from one place of a state to another below it."""


class Source(Protocol):
    """Where tensors and other values are read from."""

    path: str

    def under(self, *prefix: Any) -> Mapping[Rest, Any]:
        """What lies below a place: the source's own keys, by the rest of their places."""

    def tensor(self, key: Any) -> Stored | None:
        """The tensor under ``key``; None where something else is."""

    def value(self, *prefix: Any) -> Any:
        """The value at a place, made anew on this process; None where there is none."""

    def read(self, tensors: Mapping[Any, Tensor], others: Iterable[Any]) -> Mapping[Any, Any]:
        """Fill tensors, by the source's keys, and return what is no tensor."""


class File:
    """A file that was written by ``torch.save``: nested dicts of whole tensors, mapped into memory."""

    def __init__(self, path: str, weights_only: bool | None) -> None:
        self.path = path
        self.contents: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)

    def under(self, *prefix: Any) -> Mapping[Rest, Any]:
        return {rest: (*prefix, *rest) for rest in _places(self.value(*prefix))}

    def tensor(self, key: Any) -> Stored | None:
        value = self.value(*key)
        return Stored(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None

    def value(self, *prefix: Any) -> Any:
        node: Any = self.contents
        for key in prefix:
            node = node.get(key) if isinstance(node, Mapping) else None
        return node

    def read(self, tensors: Mapping[Any, Tensor], others: Iterable[Any]) -> Mapping[Any, Any]:
        for key, live in tensors.items():
            _cut(self.value(*key), live)
        return {key: self.value(*key) for key in others}


def _places(node: Any) -> Iterator[Rest]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from ((key, *rest) for rest in _places(value))
    elif node is not None:
        yield ()


def _cut(whole: Tensor, live: Tensor) -> None:
    """Copy into a live tensor what this rank has of it."""
    if not is_raw_tensor(live):
        live.copy_(whole)
        return
    leaf = local_tensor("", live, split=False)
    for box, view in zip(leaf.boxes, leaf.views, strict=True):
        view.copy_(whole[slices(box)])


def load(path: str, map_location: Any, weights_only: bool | None) -> dict[str, Any]:
    """The checkpoint in a directory: a dict like that of a ``.ckpt`` file, with parts that are read when looked at.

    A Trainer's has the keys that a Trainer looks for, whatever its strategy called them. Raises CorruptCheckpointError
    for a directory that is incomplete, UnsafeLoadError where ``weights_only`` (None is true) forbids to unpickle what
    ``meta.pt`` holds.
    """
    directory = Directory(path, map_location, weights_only)
    found = directory.extra
    if VERSION not in found:
        return found | {source: ForeignPart(directory, source, (source,)) for source in directory.sources}
    for source in directory.sources:
        if source in ("model", MODEL):  # FSDP's name for it, and ModelParallel's
            found[MODEL] = ForeignPart(directory, source, (MODEL,))
    optimizers = [source for source in directory.sources if source.startswith("optimizer_")]
    if optimizers or "lr_schedulers" in found:
        found[OPTIMIZERS] = [
            ForeignPart(directory, f"optimizer_{index}", (OPTIMIZERS, index)) for index in range(len(optimizers))
        ]
    return found


class ForeignPart(Part):
    """A module's or an optimizer's state in a directory: not read yet, or a dict like any other."""

    def __init__(self, directory: Any = None, source: str = "", place: tuple[Any, ...] = ()) -> None:
        # Code that copies containers calls the class with contents alone, and gets a dict of them.
        is_copy = not isinstance(directory, Directory)
        super().__init__(*([directory] if is_copy and directory is not None else []), place=place)
        self.source = source
        if not is_copy:
            self.directory = directory
            self.read_with(lambda: directory.value(source) or {})

    def check_shapes(self, live: nn.Module | ModuleState) -> None:
        _module(self.directory, self.source, live, strict=False)

    def fits(self, optimizer: Optimizer) -> bool:
        return True  # whether it does depends on the parameters' names: `restore` judges

    def restore(self, state: dict[str, Any], *, strict: bool) -> None:
        """Read parts of the same directory into a Trainer's module or its optimizers; every rank calls."""
        targets: dict[str, Any] = {}
        for key, value in state.items():
            if key == OPTIMIZERS:
                targets |= {f"optimizer_{index}": optimizer for index, optimizer in enumerate(value)}
            else:
                targets[self.source] = value
        restore(self.directory, targets, strict=strict)


def restore(source: Source, targets: Mapping[str, nn.Module | ModuleState | OptimizerState], *, strict: bool) -> None:
    """Read what a source has into live modules and optimizers, by its top-level keys; every rank calls.

    Raises, on every rank and before anything is changed, StateMismatchError for what does not fit: of an optimizer
    always, of a module its shapes always and its names if ``strict``.
    """

    def match() -> list[Callable[[], None]]:
        return [
            _optimizer(source, key, target)
            if isinstance(target, OptimizerState)
            else _module(source, key, target, strict=strict)
            for key, target in targets.items()
        ]

    placing = agreement.on_all(f"load({source.path!r})", match, timeout=agreement.TIMEOUT)

    def place_all() -> None:
        try:
            for place in placing:
                place()
        except Exception as error:
            raise LoadFailedError(
                f"the load of {source.path} failed: {type(error).__name__}: {error}. The live state may be partly"
                " restored: load a checkpoint again before training on."
            ) from error

    agreement.on_all(f"read({source.path!r})", place_all, timeout=agreement.TIMEOUT)


def _module(source: Source, top: str, target: nn.Module | ModuleState, *, strict: bool) -> Callable[[], None]:
    """What fills a module, once everything has been found to fit."""
    module = module_of(target)
    state_dict = target.state_dict if isinstance(target, ModuleState) else module.state_dict()
    cleaned = clean_names(module, list(state_dict))
    keys = source.under(top)
    saved = dict.fromkeys(rest[0] for rest in keys if rest)
    tensors: dict[Any, Tensor] = {}
    others: list[str] = []
    lines = []
    for raw, name in cleaned.items():
        live, key = state_dict[raw], keys.get((name,))
        entry = None if key is None else source.tensor(key)
        if name not in saved:
            lines += [f"  missing from the checkpoint: {name}"] if strict else []
        elif key is None or entry is None or not isinstance(live, Tensor):
            others.append(raw)
        elif tuple(live.shape) != entry.shape:
            lines.append(f"  size mismatch of {name}: {tuple(live.shape)} here, {entry.shape} in the checkpoint")
        else:
            tensors[key] = live.detach()
    if strict:
        lines += [f"  in the checkpoint only: {name}" for name in saved.keys() - set(cleaned.values())]
    if lines:
        raise _mismatch(source, top, lines)

    def place() -> None:
        source.read(tensors, [])
        loaded = OrderedDict(state_dict)
        loaded |= {raw: source.value(top, cleaned[raw]) for raw in others}
        loaded._metadata = getattr(state_dict, "_metadata", {})  # type: ignore[attr-defined]
        module.load_state_dict(loaded, strict=strict)  # for its hooks; tensors stand for themselves

    return place


def _optimizer(source: Source, top: str, target: OptimizerState) -> Callable[[], None]:
    """What fills an optimizer, once it has been found to have the parameters that were saved."""
    optimizer = target.optimizer
    groups = source.value(top, "param_groups") or []
    live = _live_names(target, [list(group["params"]) for group in groups])
    parameters = {
        name: parameter
        for names, group in zip(live, optimizer.param_groups, strict=True)
        for name, parameter in zip(names, group["params"], strict=True)
    }
    holders = {name: group for group in groups for name in group["params"]}
    lines = [f"  missing from the checkpoint: {name}" for name in parameters if name not in holders]
    keys = source.under(top, "state")
    saved = dict.fromkeys([*holders, *(rest[0] for rest in keys if rest)])
    lines += [f"  in the checkpoint only: {name}" for name in saved if name not in parameters]
    if lines:
        raise _mismatch(source, top, lines)
    at_places = [*groups, *optimizer.param_groups[len(groups) :]]
    options = [holders[names[0]] if names else at_place for names, at_place in zip(live, at_places, strict=False)]
    tensors: dict[Any, Tensor] = {}
    for rest, key in keys.items():
        entry = source.tensor(key)
        if entry is not None:
            parameter = parameters[rest[0]].detach()
            is_shaped = entry.shape == tuple(parameter.shape)
            tensors[key] = (
                torch.empty_like(parameter, dtype=entry.dtype)
                if is_shaped
                else torch.empty(entry.shape, dtype=entry.dtype)
            )

    def place() -> None:
        others = source.read(tensors, [key for key in keys.values() if key not in tensors])
        index_of = {name: index for index, name in enumerate(parameters)}
        state: dict[str, Any] = {}
        for rest, key in keys.items():
            if rest:  # an empty state has no places below it
                set_element(state, rest, tensors[key] if key in tensors else others[key])
        optimizer.load_state_dict(
            {
                "state": {index_of[name]: slots for name, slots in state.items()},
                "param_groups": [
                    group | {"params": [index_of[name] for name in names]}
                    for names, group in zip(live, options, strict=True)
                ],
            }
        )

    return place


def _live_names(target: OptimizerState, saved: list[list[Any]]) -> list[list[Any]]:
    """What the directory calls the parameters of an optimizer: names, or, where it has no names, places."""
    groups = [group["params"] for group in target.optimizer.param_groups]
    by_name = all(isinstance(name, str) for names in saved for name in names) and target.modules
    if not by_name and [len(names) for names in saved] == [len(group) for group in groups]:
        return saved
    names: dict[int, str] = {}
    for module in target.modules.values():  # a directory holds one model, whose parameters go by their names in it
        names |= parameter_names(module)
    return optimizer_parameter_names(target.optimizer, names)


def _mismatch(source: Source, top: str, lines: list[str]) -> StateMismatchError:
    return StateMismatchError(
        f"{top!r} in {source.path} does not match the live state, and nothing has been changed:\n" + "\n".join(lines)
    )
