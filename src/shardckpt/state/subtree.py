"""A part of a saved skeleton, by its place. Pure: tensors are referred to as before, only what is around them goes."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from shardckpt.errors import TensorNotFoundError, UsageError
from shardckpt.state import names, values
from shardckpt.state.skeleton import as_torch_format, child_node, module_entries, optimizer_node, tensor_name

Json = Any
Prefix = str | tuple[Any, ...]
"""A place in a state: dotted text, as in names of tensors, or the keys on the way to it."""


def prefix_name(prefix: Prefix) -> str:
    """A place as dotted text. Raises UsageError for what is none."""
    if isinstance(prefix, str):
        return prefix
    if not isinstance(prefix, tuple):
        raise UsageError(f"prefix is dotted text or a tuple of keys, not {prefix!r}")
    path = ""
    for key in prefix:
        path = names.child_path(path, key)
    return path


def subtree(skeleton: Json, prefix: Prefix) -> Json:
    """The node at ``prefix``, as if it had been saved by itself.

    It may cut into a module: of ``"encoder.weight"`` and ``"head.weight"``, ``"encoder"`` leaves ``"weight"``.
    Optimizers in the sub-tree call parameters that lie in it by their names in it, others as before.

    Raises TensorNotFoundError, a KeyError, where there is no such place, naming what is like it; UsageError where text
    means two places.
    """
    path = prefix_name(prefix)
    found = _by_text(skeleton, path, "") if isinstance(prefix, str) else _by_keys(skeleton, prefix)
    if not found:
        raise TensorNotFoundError(f"the checkpoint has nothing at {path!r}.{hint(path, place_names(skeleton))}")
    if len(found) > 1:
        raise UsageError(
            f"{path!r} is the name of {len(found)} places in the checkpoint; pass a tuple of keys instead."
        )
    return relative(found[0], path) if path else found[0]


def hint(name: str, known: Iterable[str]) -> str:
    """A sentence that names what is like ``name``, or nothing."""
    names_ = list(dict.fromkeys(known))
    tail = ".".join(name.split(".")[-2:])
    near = difflib.get_close_matches(name, names_, n=3) or [other for other in names_ if other.endswith(tail)][:3]
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def place_names(node: Json, path: str = "") -> Iterator[str]:
    """The name of every place in a skeleton that a prefix can mean, and of the parameters of its optimizers."""
    if path:
        yield path
    entries = module_entries(node)
    body = optimizer_node(node)
    if entries is not None:
        for name in entries:
            parts = name.split(".")
            for stop in range(1, len(parts) + 1):
                yield names.child_path(path, ".".join(parts[:stop]))
    elif body is not None:
        for group in body["param_groups"]:
            yield from group["params"]
    else:
        for key, child in children(node):
            yield from place_names(child, names.child_path(path, key))


def tensor_places(node: Json) -> dict[str, str]:
    """The names of the tensors that stand in a node, by their places; those of optimizers are left out."""
    found: dict[str, str] = {}

    def walk(node: Json, path: str) -> None:
        name = tensor_name(node)
        if name is not None:
            found.setdefault(path, name)
            return
        entries = module_entries(node)
        for key, child in children(node) if entries is None else entries.items():
            walk(child, names.child_path(path, key))

    walk(node, "")
    return found


def children(node: Json) -> Iterator[tuple[Any, Json]]:
    """The keys, or indices, and the nodes of a dict, list or tuple node; none of anything else."""
    items = node["$tuple"] if values.tag_of(node) == "$tuple" else node
    if isinstance(items, list):
        if not all(type(item) in values.SIMPLE for item in items):  # a million numbers are no places
            yield from enumerate(items)
        return
    for key, child in values.pairs_of(node) or []:
        yield values.decode_key(key, ""), child


def rename_parameters(node: Json, renamed: Callable[[str], str]) -> Json:
    """An optimizer node whose parameters have other names, which must be as many.

    Its ``saved_as`` has the names that those whose name has changed were saved with.
    """
    body = node["$optimizer"]
    first = body.get("saved_as", {})
    saved_as = {renamed(name): first.get(name, name) for name in parameters(node)}
    changed = {name: old for name, old in saved_as.items() if name != old}
    return {
        "$optimizer": {
            **body,
            "state": {renamed(name): item for name, item in body["state"].items()},
            "param_groups": [
                {**group, "params": [renamed(name) for name in group["params"]]} for group in body["param_groups"]
            ],
        }
        | ({"saved_as": changed} if changed else {})
    }


def parameters(node: Json) -> list[str]:
    """The names of all parameters of an optimizer node."""
    body = node["$optimizer"]
    return list(dict.fromkeys([*body["state"], *(name for group in body["param_groups"] for name in group["params"])]))


def relative(node: Json, path: str) -> Json:
    """``node`` with the parameters that its optimizers find below ``path`` called by the rest of their names."""
    tag = values.tag_of(node)
    if tag == "$optimizer":
        known = parameters(node)
        inner = {name: name.removeprefix(f"{path}.") for name in known if name.startswith(f"{path}.")}
        taken = set(inner.values())
        outer = {name: names.unique(name, taken.__contains__) for name in known if name not in inner}
        return rename_parameters(node, (inner | outer).__getitem__)
    if tag == "$tuple":
        return {"$tuple": relative(node["$tuple"], path)}
    if isinstance(node, list):
        return [relative(item, path) for item in node]
    pairs = values.pairs_of(node)
    return node if pairs is None else values.with_pairs(node, [[key, relative(item, path)] for key, item in pairs])


def _by_keys(node: Json, prefix: tuple[Any, ...]) -> list[Json]:
    for depth, key in enumerate(prefix):
        entries = module_entries(node)
        cut = None if entries is None or key in entries else _cut(node, str(key))
        try:
            node = child_node(node, key, prefix_name(prefix[:depth])) if cut is None else cut
        except KeyError:
            return []
    return [node]


def _by_text(node: Json, text: str, path: str) -> list[Json]:
    """Every node whose place below ``node`` is called ``text``."""
    if not text:
        return [node]
    entries = module_entries(node)
    if entries is not None:
        cut = _cut(node, text)
        return ([] if cut is None else [cut]) + _named(entries.items(), text, path)
    body = optimizer_node(node)
    if body is None:
        return _named(children(node), text, path)
    # State goes by the names of parameters, as its tensors do, and by torch's indices.
    of_state = _named(body["state"].items(), text.removeprefix("state."), path) if text.startswith("state.") else []
    return of_state or _named(children(as_torch_format(node)), text, path)


def _named(items: Iterable[tuple[Any, Json]], text: str, path: str) -> list[Json]:
    found = []
    for key, child in items:
        name = names.child_path("", key)
        if text == name:
            found.append(child)
        elif text.startswith(f"{name}."):
            found += _by_text(child, text[len(name) + 1 :], names.child_path(path, key))
    return found


def _cut(node: Json, name: str) -> Json | None:
    """The part of a module node that lies below ``name``; None where nothing does."""
    start = f"{name}."
    module = node["$module"]
    entries = {key.removeprefix(start): item for key, item in module["entries"].items() if key.startswith(start)}
    versions = {
        "" if key == name else key.removeprefix(start): version
        for key, version in module["versions"].items()
        if key == name or key.startswith(start)
    }
    return {"$module": {**module, "entries": entries, "versions": versions}} if entries else None
