"""Match: the live state beside a checkpoint's skeleton, before a byte is read.

Matching walks both trees together. It changes nothing: it collects the live tensors to be filled, the tensors to be
made anew, every difference, and for each place a *thunk* that, run once all tensors are read, returns the value for
it.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardckpt.codecs import DTYPES
from shardckpt.errors import CorruptCheckpointError, StateMismatchError
from shardckpt.manifest import Manifest, TensorEntry
from shardckpt.state import names, values
from shardckpt.state.leaves import LocalTensor, is_raw_tensor, is_uninitialised, local_tensor, memory_key
from shardckpt.state.modules import match_module
from shardckpt.state.optimizers import match_optimizer
from shardckpt.state.skeleton import as_torch_format, contains_tensor, module_entries, tensor_name

Json = Any
Thunk = Callable[[], Any]


@dataclass(slots=True)
class Fresh:
    """A tensor that has no live counterpart: allocated once the match is accepted, then filled by the reader."""

    fqn: str
    entry: TensorEntry
    make: Callable[[], Tensor]
    finish: Callable[[Tensor], Tensor]
    tensor: Tensor | None = None

    def value(self) -> Tensor:
        assert self.tensor is not None, "a thunk ran before its tensor was allocated"
        return self.tensor


@dataclass(slots=True)
class Differences:
    """How a live state and a checkpoint differ, as lines for a person; empty where they match."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def check(self, where: str, *, strict: bool) -> None:
        """Raise StateMismatchError that names every difference, if ``strict``."""
        lines = [f"  missing from the checkpoint: {name}" for name in self.missing]
        lines += [f"  in the checkpoint only: {name}" for name in self.unexpected]
        lines += [f"  {line}" for line in self.mismatched]
        if strict and lines:
            raise StateMismatchError(
                f"the checkpoint {where} does not match the live state, and nothing has been changed:\n"
                + "\n".join(lines)
                + "\nPass strict=False to restore what matches and report the rest."
            )


class Match:
    """One live state (or none) held against one manifest.

    ``targets`` are live tensors to fill, under the names of the checkpoint; ``fresh`` those to be made; ``objects`` the
    pickled values that somebody must load into it before the thunks run.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        parameters: Mapping[int, str],
        convert_dtype: bool,
        strict: bool,
        relocate: Callable[[Tensor, str], Tensor],
    ) -> None:
        self.manifest = manifest
        self.targets: list[LocalTensor] = []
        self.fresh: list[Fresh] = []
        self.objects: dict[str, Any] = {}
        self.restored: list[str] = []
        self.differences = Differences()
        self.parameters = parameters
        self._convert_dtype = convert_dtype
        self.strict = strict
        self._relocate = relocate
        self._filled: set[Hashable] = set()
        self._made: dict[str, Fresh] = {}

    def allocate(self) -> list[LocalTensor]:
        """Allocate what is new; returns everything to be filled."""
        filled = list(self.targets)
        for fresh in self.fresh:
            fresh.tensor = fresh.make()
            if fresh.tensor.device.type != "meta":
                filled.append(local_tensor(fresh.fqn, fresh.tensor, split=False))
        return filled

    def settle(self) -> None:
        """Give new tensors their final place, once read."""
        for fresh in self.fresh:
            fresh.tensor = fresh.finish(fresh.value())

    # -- live state beside saved node -------------------------------------------------------------------------------

    def match(self, live: Any, node: Json, path: str) -> Thunk:
        """The thunk that restores ``node`` into ``live``, and the value that then belongs in its place."""
        if isinstance(live, Tensor):
            return self.tensor(live, node, path)
        if names.is_module(live):
            return match_module(self, live, node, path)
        if names.is_optimizer(live):
            return match_optimizer(self, live, node, path)
        if isinstance(live, dict):
            return self._dict(live, node, path)
        if type(live) in (list, tuple):
            return self._sequence(live, node, path)
        value = self.new(node, path)
        if names.is_stateful(live):
            return lambda: (live.load_state_dict(value()), live)[1]
        return value

    def tensor(self, live: Tensor, node: Json, path: str) -> Thunk:
        name = tensor_name(node)
        if not is_raw_tensor(live) or is_uninitialised(live):
            return self.new(node, path)
        if name is None:
            self.differences.mismatched.append(f"{path}: a tensor here, but a plain value in the checkpoint")
            return lambda: live
        if self.fits(live, name, path):
            self.fill(live, name)
        return lambda: live

    def entry(self, name: str) -> TensorEntry:
        entry = self.manifest.resolve(name)
        if entry is None:
            raise CorruptCheckpointError(f"the skeleton names tensor {name!r}, which the manifest does not list.")
        return entry

    def fits(self, live: Tensor, name: str, path: str) -> bool:
        """Whether a live tensor can take a stored one; the reasons why not go to the differences."""
        entry = self.entry(name)
        if tuple(live.shape) != tuple(entry.shape):
            self.differences.mismatched.append(
                f"{path}: shape {tuple(live.shape)} here, {tuple(entry.shape)} in the checkpoint"
            )
            return False
        if live.dtype is not DTYPES.get(entry.dtype) and not self._convert_dtype:
            here = str(live.dtype).removeprefix("torch.")
            self.differences.mismatched.append(
                f"{path}: dtype {here} here, {entry.dtype} in the checkpoint (convert_dtype=True converts)"
            )
            return False
        return True

    def fill(self, live: Tensor, name: str) -> None:
        """Have a live tensor read in place; memory that has several names is read once."""
        key = memory_key(live)
        self.restored.append(name)
        if key is not None and key in self._filled:
            return
        self._filled.add(key)
        self.targets.append(local_tensor(self.manifest.aliases.get(name, name), live, split=False))

    def _dict(self, live: dict[Any, Any], node: Json, path: str) -> Thunk:
        saved = self.items(node, path)
        if saved is None:
            self.differences.mismatched.append(f"{path or 'the root'}: a dict here, something else in the checkpoint")
            return lambda: live
        thunks: dict[Any, Thunk] = {}
        for key, value in live.items():
            child = names.child_path(path, key)
            if key in saved:
                thunks[key] = self.match(value, saved[key], child)
            else:
                self.differences.missing.append(child)
        for key in saved.keys() - live.keys():
            child = names.child_path(path, key)
            if not path:
                self.differences.skipped.append(child)
            elif live and contains_tensor(saved[key]):
                self.differences.unexpected.append(child)
            else:
                thunks[key] = self.new(saved[key], child)
        order = [key for key in saved if key in thunks]

        def place() -> dict[Any, Any]:
            for key in order:
                live[key] = thunks[key]()
            return live

        return place

    def items(self, node: Json, path: str) -> dict[Any, Json] | None:
        """A saved container as decoded key → node, whatever it was saved as; None where it is no dict."""
        entries = module_entries(node)
        if entries is not None:
            return dict(entries)
        if values.tag_of(node) == "$optimizer":
            node = as_torch_format(node)
        pairs = values.pairs_of(node)
        return None if pairs is None else {self._key(key, path): value for key, value in pairs}

    def _key(self, node: Json, path: str) -> Any:
        if values.tag_of(node) == "$tuple":
            return tuple(self._key(item, path) for item in node["$tuple"])
        return values.decode_scalar(node, path)

    def _sequence(self, live: Any, node: Json, path: str) -> Thunk:
        items = node["$tuple"] if values.tag_of(node) == "$tuple" else node
        holds_tensors = any(isinstance(item, Tensor) or names.is_stateful(item) for item in live)
        if not isinstance(items, list) or len(items) != len(live):
            if not holds_tensors:
                return self.new(node, path)
            found = len(items) if isinstance(items, list) else "no list"
            self.differences.mismatched.append(f"{path}: {len(live)} items here, {found} in the checkpoint")
            return lambda: live
        thunks = [
            self.match(value, item, names.child_path(path, i))
            for i, (value, item) in enumerate(zip(live, items, strict=True))
        ]

        def place() -> Any:
            restored = [thunk() for thunk in thunks]
            if isinstance(live, list):
                live[:] = restored
                return live
            return tuple(restored)

        return place

    # -- new values -------------------------------------------------------------------------------------------------

    def new(self, node: Json, path: str, like: Tensor | None = None) -> Thunk:
        """The thunk that makes the value of ``node`` anew; tensors on the device that ``like`` implies, if given."""
        tag = values.tag_of(node)
        argument: Any = node[tag] if tag is not None else None
        if tag == "$tensor":
            return self._new_tensor(argument, like).value
        if tag == "$ndarray":
            fresh = self._new_tensor(argument, None)
            return lambda: fresh.value().cpu().numpy()
        if tag == "$sparse":
            parts = {part: self.new(item, path) for part, item in argument["parts"].items()}
            return lambda: _sparse(argument, {part: thunk() for part, thunk in parts.items()})
        if tag == "$object":
            self.objects.setdefault(argument, None)
            return lambda: self.objects[argument]
        if tag in ("$tuple", "$set", "$frozenset") or isinstance(node, list):
            items = [
                self.new(item, names.child_path(path, i), like)
                for i, item in enumerate(node if tag is None else argument)
            ]
            kind = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}.get(tag or "", list)
            return lambda: kind(item() for item in items)
        saved = self.items(node, path)
        if saved is not None:
            made = {key: self.new(value, names.child_path(path, key), like) for key, value in saved.items()}

            def fill() -> Any:
                empty = values.empty_dict_of(node) if tag not in ("$module", "$optimizer") else {}
                dict.update(empty, {key: thunk() for key, thunk in made.items()})  # a Counter's own update would add
                return empty

            return fill
        value = values.decode_scalar(node, path)
        return lambda: value

    def _new_tensor(self, name: str, like: Tensor | None) -> Fresh:
        entry = self.entry(name)
        fqn = self.manifest.aliases.get(name, name)
        if like is None and fqn in self._made:
            return self._made[fqn]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise CorruptCheckpointError(f"tensor {fqn!r} has dtype {entry.dtype!r}, which this torch does not know.")
        if like is not None:
            fresh = Fresh(fqn, entry, lambda: _beside(like, entry, dtype), lambda tensor: tensor)
        else:
            fresh = Fresh(
                fqn,
                entry,
                lambda: torch.empty(tuple(entry.shape), dtype=dtype),
                lambda tensor: self._relocate(tensor, entry.location),
            )
            self._made[fqn] = fresh
        self.restored.append(fqn)
        self.fresh.append(fresh)
        return fresh


def _beside(parameter: Tensor, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    """Room for optimizer state: sharded like its parameter where it has its shape; a step counter stays on the CPU."""
    if tuple(entry.shape) == tuple(parameter.shape):
        return torch.empty_like(parameter.detach(), dtype=dtype)
    device = "cpu" if entry.location == "cpu" else parameter.device
    return torch.empty(tuple(entry.shape), dtype=dtype, device=device)


def _sparse(node: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    size = torch.Size(node["size"])
    if node["layout"] == "sparse_coo":
        return torch.sparse_coo_tensor(parts["indices"], parts["values"], size, is_coalesced=node["coalesced"])
    compressed, plain = ("crow", "col") if "crow_indices" in parts else ("ccol", "row")
    return torch.sparse_compressed_tensor(
        parts[f"{compressed}_indices"],
        parts[f"{plain}_indices"],
        parts["values"],
        size,
        layout=getattr(torch, node["layout"]),
    )
