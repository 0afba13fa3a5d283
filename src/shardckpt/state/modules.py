"""Modules as restore targets."""
# ruff: noqa: SLF001 - torch offers no public way to ask a module for its loading hooks

import collections
import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from shardckpt.state import names, values
from shardckpt.state.fresh import Thunk
from shardckpt.state.leaves import is_distributed, is_meta, is_raw_tensor, is_uninitialised, storage_key
from shardckpt.state.matching import Matching
from shardckpt.state.per_rank import PerRank
from shardckpt.state.rehearsal import rehearse
from shardckpt.state.skeleton import tensor_name

Json = Any


def match_module(match: Matching, live: nn.Module | names.ModuleState, node: Json, path: str) -> Thunk:
    """Match a module with what was saved of it, through its own ``state_dict()``/``load_state_dict`` semantics.

    Where the state dict shows the module's own memory and nothing in the module customises loading, tensors are read
    straight into it. Otherwise ``load_state_dict`` gets the whole dict, in which tensors that were read in place stand
    for themselves.
    """
    module = names.module_of(live)
    saved = match.items(node, path)
    if saved is None:
        match.differences.mismatched.append(f"{path or 'the root'}: a module here, something else in the checkpoint")
        return lambda: live
    state_dict = live.state_dict if isinstance(live, names.ModuleState) else module.state_dict()
    cleaned = names.clean_names(module, list(state_dict))
    owned = {storage_key(t) for t in [*module.parameters(), *module.buffers()] if not is_uninitialised(t)} - {None}
    on_meta = _on_meta(module)
    thunks: dict[str, Thunk] = {}
    made_room: list[Thunk] = []
    missing = []
    in_place = True
    for raw, value in state_dict.items():
        clean = cleaned[raw]
        child = names.child_path(path, clean)
        if clean not in saved:
            missing.append(clean)
            continue
        raw_live = isinstance(value, Tensor) and is_raw_tensor(value) and not is_uninitialised(value)
        if raw_live and (storage_key(value) in owned or (raw in on_meta and is_meta(value))):
            thunks[raw] = match.tensor(value, saved[clean], child, on_meta.get(raw))
            continue
        in_place = False
        if isinstance(value, PerRank):
            thunks[raw] = match.match(value, saved[clean], child)
            continue
        name = tensor_name(saved[clean])
        if raw_live and name is not None and is_distributed(value) and not is_meta(value):
            # A hook made it; loading code will want one that is sharded alike.
            thunks[raw] = match.tensor(value, saved[clean], child)
        elif not raw_live or name is None or match.fits(value, name, child):
            thunks[raw] = match.new(saved[clean], child)
    known = set(cleaned.values())
    unexpected = [clean for clean in saved if clean not in known]
    versions = node["$module"]["versions"] if values.tag_of(node) == "$module" else {}
    metadata = {raw: {"version": versions.get(clean, 1)} for raw, clean in names.clean_paths(module).items()}
    if (missing or unexpected) and _may_rename(module):
        raw_of = names.raw_names(module, state_dict, unexpected)
        back = cleaned | {raw: clean for clean, raw in raw_of.items()}
        entries = {raw: value for raw, value in state_dict.items() if cleaned[raw] in saved}
        for clean in unexpected:
            name = tensor_name(saved[clean])
            entries[raw_of[clean]] = None if name is None else match.entry(name)
        verdict = rehearse(module, _state_dict(entries.items(), metadata))
        # Where it cannot be asked beforehand, it judges while it loads.
        missed = [] if verdict is None else [back.get(raw, raw) for raw in verdict.missing]
        unknown = [] if verdict is None else [back.get(raw, raw) for raw in verdict.unexpected]
        if verdict is not None:
            match.differences.mismatched += [f"{path}: {error}" if path else error for error in verdict.errors]
        in_place = in_place and set(missed) == set(missing) and set(unknown) == set(unexpected)
        for clean in [clean for clean in unexpected if clean not in unknown]:
            thunks[raw_of[clean]] = match.new(saved[clean], names.child_path(path, clean))
        for raw in [raw for raw in on_meta if cleaned.get(raw) in missing and cleaned[raw] not in missed]:
            # Its loading code will copy into it, which takes memory.
            child = names.child_path(path, cleaned[raw])
            if verdict is None:
                match.differences.mismatched.append(
                    f"{child}: on the meta device, and missing here, unless the module's own loading code makes it up,"
                    " which cannot be asked beforehand; materialise it first (`module.to_empty(device=...)`)"
                )
            elif match.can_materialise(on_meta[raw], child):
                made_room.append(functools.partial(match.make_room, on_meta[raw]))
        missing, unexpected = missed, unknown
    match.differences.missing += [names.child_path(path, name) for name in missing]
    match.differences.unexpected += [names.child_path(path, clean) for clean in unexpected]
    if in_place and not _customises_loading(module):
        return lambda: ([thunk() for thunk in thunks.values()], live)[1]
    strict = match.strict

    def place() -> Any:
        for make in made_room:
            make()
        loaded = _state_dict(((raw, thunk()) for raw, thunk in thunks.items()), metadata)
        module.load_state_dict(loaded, strict=strict)
        return live

    return place


def _on_meta(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers that have a shape and no data, by each of their names."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {raw: tensor for raw, tensor in tensors if is_meta(tensor) and not is_uninitialised(tensor)}


def _state_dict(items: Iterable[tuple[str, Any]], metadata: dict[str, Any]) -> dict[str, Any]:
    """A state dict with modules' versions, the way torch passes them."""
    state_dict: dict[str, Any] = collections.OrderedDict(items)
    state_dict._metadata = metadata  # type: ignore[attr-defined]
    return state_dict


def _overrides_loading(module: nn.Module) -> bool:
    loader = type(module)._load_from_state_dict
    # torch.nn's own overrides only complete what old versions lack, which a matching checkpoint does not.
    return loader is not nn.Module._load_from_state_dict and not loader.__module__.startswith("torch.nn.modules.")


def _pre_hooks(module: nn.Module) -> list[Any]:
    """The hooks before loading, but for those by which FSDP brings its parameters into the form that is loaded."""
    hooks = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
    return [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.")]


def _may_rename(module: nn.Module) -> bool:
    """Whether loading code may know, or make up, what the names alone say is missing or unexpected."""
    return any(
        _pre_hooks(m) or type(m)._load_from_state_dict is not nn.Module._load_from_state_dict for m in module.modules()
    )


def _customises_loading(module: nn.Module) -> bool:
    return any(
        _pre_hooks(m)
        or m._load_state_dict_post_hooks
        or _overrides_loading(m)
        or type(m).load_state_dict is not nn.Module.load_state_dict
        for m in module.modules()
    )
