"""Flatten: a nested state becomes named tensors, a JSON skeleton that says where they stand, and pickled objects.

Kinds are asked for here once. Above this floor there are only `LocalTensor`s, JSON and bytes.
"""

import fnmatch
import io
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import xxhash
from torch import Tensor, nn

from shardckpt.errors import UnserialisableError, UsageError
from shardckpt.state import names, values
from shardckpt.state.leaves import LocalTensor, is_raw_tensor, is_uninitialised, local_tensor, memory_key

Json = Any

_SPARSE_PARTS: Final = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


@dataclass(slots=True)
class Flattened:
    """A state as the engine sees it on one rank."""

    tensors: dict[str, LocalTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    skeleton: Json = None
    objects: dict[str, bytes] = field(default_factory=dict)
    """Pickled with ``torch.save``, by path; taken at the call, so that they belong to the same instant."""
    structure: str = ""
    """Digest of names, kinds, shapes, dtypes and boxes, but of no values: equal while a plan stays good."""
    outline: str = ""
    """Digest of names and kinds alone: equal on ranks whose skeletons have the same places."""


class Selection:
    """Which names of a state are saved: those that match ``include``, less those that match ``exclude``."""

    def __init__(self, include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
        self._include, self._exclude = include, exclude

    def __call__(self, path: str) -> bool:
        if self._exclude is not None and any(fnmatch.fnmatchcase(path, pattern) for pattern in self._exclude):
            return False
        return self._include is None or any(fnmatch.fnmatchcase(path, pattern) for pattern in self._include)


def flatten(
    state: Any,
    *,
    replicated: bool | Sequence[str],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> Flattened:
    """Flatten ``state`` without copying a tensor, stepping an optimizer or changing anything.

    ``replicated`` declares loose tensors and buffers equal on all ranks (true, or patterns of their names), so that
    their writing is shared. Raises UnserialisableError naming the path of a value that cannot be stored, UsageError for
    a state of a wrong type or with clashing names.
    """
    if not (
        isinstance(state, Mapping) or names.is_module(state) or names.is_optimizer(state) or names.is_stateful(state)
    ):
        raise UsageError(
            f"a state is a dict, a module, an optimizer or an object with state_dict/load_state_dict, not "
            f"{type(state).__name__}."
        )
    walk = _Flattener(
        names.parameter_names(state),
        lambda path: (
            replicated is True or (replicated is not False and any(fnmatch.fnmatchcase(path, p) for p in replicated))
        ),
        Selection(include, exclude),
    )
    walk.result.skeleton = walk.node(state, "", False)
    walk.result.structure = walk.structure.hexdigest()
    walk.result.outline = walk.outline.hexdigest()
    return walk.result


class _Flattener:
    def __init__(
        self, parameters: Mapping[int, str], replicated: Callable[[str], bool], selected: Callable[[str], bool]
    ) -> None:
        self.result = Flattened()
        self.structure = xxhash.xxh3_128()
        self.outline = xxhash.xxh3_128()
        self._parameters = parameters
        self._replicated = replicated
        self._selected = selected
        self._memory: dict[Hashable, str] = {}
        self._open: set[int] = set()

    def node(self, value: Any, path: str, split: bool) -> Json:
        """The skeleton of ``value``. ``split`` is inherited: whether tensors in it are equal on all ranks."""
        if isinstance(value, Tensor):
            return self._tensor(value, path, split)
        if names.is_module(value):
            return self._module(value, path)
        if names.is_optimizer(value):
            return self._optimizer(value, path)
        scalar = values.encode_scalar(value)
        if scalar is not values.NOT_PLAIN:
            self._note("v", path)
            return scalar
        if values.is_plain_dict(value) or type(value) in (list, tuple, set, frozenset):
            return self._container(value, path, split)
        if names.is_stateful(value):
            return self.node(value.state_dict(), path, split)
        if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
            return self._ndarray(value, path, split)
        return self._object(value, path)

    def _note(self, kind: str, path: str) -> None:
        line = f"{kind}\0{path}\0".encode("utf-8", "surrogatepass")
        self.structure.update(line)
        self.outline.update(line)

    def _container(self, value: Any, path: str, split: bool) -> Json:
        if id(value) in self._open:
            raise UnserialisableError(f"the {type(value).__name__} at {path!r} contains itself; a state is a tree.")
        self._open.add(id(value))
        self._note(type(value).__name__, path)
        try:
            if isinstance(value, dict):
                return self._dict(value, path, split)
            items = [self.node(item, names.child_path(path, index), split) for index, item in enumerate(value)]
        finally:
            self._open.discard(id(value))
        if type(value) is list:
            return items
        if type(value) is not tuple and any(isinstance(item, dict) and "$tensor" in item for item in items):
            raise UnserialisableError(f"the {type(value).__name__} at {path!r} holds tensors; use a list or a dict.")
        return {f"${type(value).__name__}": items}

    def _dict(self, value: dict[Any, Any], path: str, split: bool) -> Json:
        pairs = []
        for key, item in value.items():
            child = names.child_path(path, key)
            if self._is_leaf(item) and not self._selected(child):
                continue
            pairs.append([self._key(key, path), self.node(item, child, split)])
        return values.encode_pairs(value, pairs)

    def _is_leaf(self, value: Any) -> bool:
        return not (isinstance(value, (dict, list, tuple)) or names.is_module(value) or names.is_stateful(value))

    def _key(self, key: Any, path: str) -> Json:
        if type(key) is tuple:
            return {"$tuple": [self._key(item, path) for item in key]}
        encoded = values.encode_scalar(key)
        if encoded is values.NOT_PLAIN:
            raise UnserialisableError(
                f"the dict at {path or 'the root'!r} has a key of type {type(key).__name__}: {key!r}. Keys are "
                f"plain values."
            )
        return encoded

    def _tensor(self, value: Tensor, path: str, split: bool) -> Json:
        if is_uninitialised(value):
            raise UnserialisableError(
                f"parameter {path!r} is lazy and has no shape yet; run the module once before saving."
            )
        if value.layout in _SPARSE_PARTS and not value.is_quantized and not value.is_nested:
            return self._sparse(value, path, split)
        if not is_raw_tensor(value):
            return self._object(value, path)
        name = self._unique(path)
        key = memory_key(value)
        if key is not None and key in self._memory:
            self.result.aliases[name] = self._memory[key]
            self._note("a", name)
            self.structure.update(f"{self._memory[key]}\0".encode("utf-8", "surrogatepass"))
            return {"$tensor": name}
        leaf = local_tensor(name, value, split=split or self._replicated(name))
        if key is not None:
            self._memory[key] = name
        self.result.tensors[name] = leaf
        self._note("t", name)
        self.structure.update(f"{leaf.shape}{leaf.dtype}{leaf.split}{leaf.location}{leaf.boxes}\0".encode())
        return {"$tensor": name}

    def _unique(self, path: str) -> str:
        """``path``, or, where another tensor has that name ({"a": {"b": t}, "a.b": u}), a variant of it."""
        name, count = path, 1
        while name in self.result.tensors or name in self.result.aliases:
            count += 1
            name = f"{path}~{count}"
        return name

    def _sparse(self, value: Tensor, path: str, split: bool) -> Json:
        parts = {
            part.strip("_"): self._tensor(
                getattr(value.detach(), part)(), names.child_path(path, part.strip("_")), split
            )
            for part in _SPARSE_PARTS[value.layout]
        }
        layout = str(value.layout).removeprefix("torch.")
        coalesced = value.layout is torch.sparse_coo and value.is_coalesced()
        return {"$sparse": {"layout": layout, "size": list(value.shape), "coalesced": coalesced, "parts": parts}}

    def _ndarray(self, value: Any, path: str, split: bool) -> Json:
        try:
            tensor = torch.from_numpy(value)
        except (TypeError, ValueError):  # strings, objects, foreign byte order, negative strides
            return self._object(value, path)
        return {"$ndarray": self._tensor(tensor, path, split)["$tensor"]}

    def _module(self, value: nn.Module | names.ModuleState, path: str) -> Json:
        module = names.module_of(value)
        state_dict = value.state_dict if isinstance(value, names.ModuleState) else module.state_dict()
        cleaned = names.clean_names(module, list(state_dict))
        parameters = {raw for raw, _ in module.named_parameters(remove_duplicate=False)}
        self._note("m", path)
        entries = {}
        for raw, item in state_dict.items():
            child = names.child_path(path, cleaned[raw])
            if self._selected(child):
                entries[cleaned[raw]] = self.node(item, child, raw in parameters)
        return {"$module": {"entries": entries, "versions": _module_versions(state_dict)}}

    def _optimizer(self, value: torch.optim.Optimizer | names.OptimizerState, path: str) -> Json:
        optimizer = names.optimizer_of(value)
        state_dict = value.state_dict if isinstance(value, names.OptimizerState) else optimizer.state_dict()
        if not names.is_torch_format(state_dict):
            return self.node(dict(state_dict), path, True)
        named = names.optimizer_parameter_names(value, self._parameters)
        by_index = {
            index: name
            for group, group_names in zip(state_dict["param_groups"], named, strict=True)
            for index, name in zip(group["params"], group_names, strict=True)
        }
        self._note("o", path)
        state, loose = {}, []
        for key, item in state_dict["state"].items():
            if key in by_index:
                child = names.child_path(names.child_path(path, "state"), by_index[key])
                state[by_index[key]] = self.node(item, child, True)
            else:
                loose.append([self._key(key, path), self.node(item, names.child_path(f"{path}.state", key), True)])
        groups = []
        for index, (group, group_names) in enumerate(zip(state_dict["param_groups"], named, strict=True)):
            rest = {key: item for key, item in group.items() if key != "params"}
            child = f"{path}.param_groups.{index}" if path else f"param_groups.{index}"
            groups.append({"params": group_names, "options": self.node(rest, child, True)})
        rest = {key: item for key, item in state_dict.items() if key not in ("state", "param_groups")}
        node: dict[str, Json] = {"state": state, "param_groups": groups}
        if loose:
            node["loose"] = loose
        if rest:
            node["rest"] = self.node(rest, path, True)
        return {"$optimizer": node}

    def _object(self, value: Any, path: str) -> Json:
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
        except Exception as error:  # pickle runs the object's own code, which may raise anything
            raise UnserialisableError(
                f"the value at {path or 'the root'!r} is a {type(value).__module__}.{type(value).__qualname__}, which"
                f" is neither plain nor picklable: {error}. Take it out of the state, or give it"
                " state_dict/load_state_dict."
            ) from error
        self.result.objects[path] = buffer.getvalue()
        self._note("p", path)
        return {"$object": path}


def _module_versions(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """The versions that modules' own loading code asks for (BatchNorm's does), where they are not the usual 1."""
    metadata = getattr(state_dict, "_metadata", None) or {}
    return {name: entry["version"] for name, entry in metadata.items() if entry.get("version", 1) not in (1, None)}
