"""Questions about a saved skeleton that need no live state."""

from typing import Any, Final

from shardckpt.state import values

Json = Any

SPARSE_PARTS: Final = {
    "sparse_coo": ("indices", "values"),
    "sparse_csr": ("crow_indices", "col_indices", "values"),
    "sparse_bsr": ("crow_indices", "col_indices", "values"),
    "sparse_csc": ("ccol_indices", "row_indices", "values"),
    "sparse_bsc": ("ccol_indices", "row_indices", "values"),
}
"""The parts that a sparse tensor of each layout is stored as."""

MAX_DEPTH: Final = 100
"""Containers within containers: deeper states are refused, so that walking over one never ends in a RecursionError."""


def module_entries(node: Json) -> dict[str, Json] | None:
    """The entries of a module node by name in the module; None where the node is none."""
    return node["$module"]["entries"] if values.tag_of(node) == "$module" else None


def optimizer_node(node: Json) -> dict[str, Json] | None:
    """The body of an optimizer node; None where the node is none."""
    return node["$optimizer"] if values.tag_of(node) == "$optimizer" else None


def tensor_name(node: Json) -> str | None:
    """The name of the stored tensor that a node stands for; None where it is no single tensor."""
    return node[tag] if (tag := values.tag_of(node)) in ("$tensor", "$ndarray") else None


def per_rank_place(node: Json) -> str | None:
    """The name under which a manifest lists all ranks' values for a node; None where there is one value for all."""
    return node["$per_rank"] if values.tag_of(node) == "$per_rank" else None


def per_rank_places(node: Json) -> list[str]:
    """The names of all places in a node that have a value for each rank."""
    place = per_rank_place(node)
    if place is not None:
        return [place]
    items = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [place for item in items for place in per_rank_places(item)]


def as_torch_format(node: Json) -> Json:
    """An optimizer node as the node of torch's own state dict: state by index, as ``load_state_dict`` takes it."""
    body = node["$optimizer"]
    index = 0
    indices: dict[str, int] = {}
    groups = []
    for group in body["param_groups"]:
        numbers = list(range(index, index + len(group["params"])))
        index += len(numbers)
        for name, number in zip(group["params"], numbers, strict=True):
            indices.setdefault(name, number)
        options = values.pairs_of(group["options"]) or []
        groups.append({"$dict": [*options, ["params", numbers]]})
    state = [[indices[name], value] for name, value in body["state"].items() if name in indices]
    rest = values.pairs_of(body.get("rest", {})) or []
    return {"state": {"$dict": state + body.get("loose", [])}, "param_groups": groups} | dict(rest)


def contains_tensor(node: Json) -> bool:
    """Whether any tensor stands in a node."""
    if isinstance(node, dict):
        return any(key in ("$tensor", "$sparse", "$ndarray") or contains_tensor(value) for key, value in node.items())
    return isinstance(node, list) and any(contains_tensor(item) for item in node)


def merge(first: Json, second: Json) -> Json:
    """Two ranks' skeletons as one: everything of ``first``, and of ``second`` the places that ``first`` lacks."""
    if isinstance(first, dict) and isinstance(second, dict):
        tag, other = values.tag_of(first), values.tag_of(second)
        if {tag, other} == {None, "$dict"}:  # the keys of one rank are all strings, those of another are not
            return {"$dict": _merge_pairs(_pair_lists(first), _pair_lists(second))}
        if tag != other:
            return first
        if tag in ("$dict", "$ordered", "$counter"):
            return {tag: _merge_pairs(first[tag], second[tag])}
        if tag == "$tuple":
            return {tag: merge(first[tag], second[tag])}
        if tag == "$defaultdict":
            return {tag: [first[tag][0], _merge_pairs(first[tag][1], second[tag][1])]}
        if tag == "$optimizer":
            return {tag: _merge_optimizers(first[tag], second[tag])}
        if tag is not None and tag not in ("$module", "$sparse"):
            return first
        return {key: merge(value, second[key]) if key in second else value for key, value in first.items()} | {
            key: value for key, value in second.items() if key not in first
        }
    if isinstance(first, list) and isinstance(second, list):
        merged = [merge(a, b) for a, b in zip(first, second, strict=False)] + first[len(second) :]
        tail = second[len(first) :]
        # Plain values come from the lowest rank; only what no other rank has makes a longer list of a higher one count.
        return merged + tail if contains_tensor(tail) or per_rank_places(tail) else merged
    return first


def _pair_lists(node: Json) -> list[list[Json]]:
    return [[key, value] for key, value in values.pairs_of(node) or []]


def _merge_pairs(first: list[list[Json]], second: list[list[Json]]) -> list[list[Json]]:
    others = {repr(key): value for key, value in second}
    merged = [[key, merge(value, others[repr(key)]) if repr(key) in others else value] for key, value in first]
    known = {repr(key) for key, _ in first}
    return merged + [[key, value] for key, value in second if repr(key) not in known]


def _merge_optimizers(first: dict[str, Json], second: dict[str, Json]) -> dict[str, Json]:
    """Parameters join a group that has their options, that at their index before others; if none has, they make one.

    The stages of a pipeline have different parameters in the groups of one index, and maybe different options for them.
    """
    groups = list(first["param_groups"])
    known = {name for group in groups for name in group["params"]}
    for index, group in enumerate(second["param_groups"]):
        added = [name for name in group["params"] if name not in known]
        if group["params"] and not added:
            continue
        options = _options(group)
        near = range(index, min(index + 1, len(groups)))
        place = next((i for i in [*near, *range(len(groups))] if _options(groups[i]) == options), None)
        if place is None:
            groups.append({"params": added, "options": group["options"]})
        else:
            groups[place] = _joined(groups[place], group, added)
    return {**second, **first, "state": merge(first["state"], second["state"]), "param_groups": groups}


def _options(group: dict[str, Json]) -> dict[str, Json]:
    """The options of a saved param group; ``param_names`` is none, but what torch calls its parameters."""
    return {repr(key): value for key, value in values.pairs_of(group["options"]) or [] if key != "param_names"}


def _joined(group: dict[str, Json], other: dict[str, Json], added: list[str]) -> dict[str, Json]:
    """``group`` with the parameters ``added`` from ``other``."""
    called = dict(zip(other["params"], _param_names(other), strict=False))
    more = [called[name] for name in added if name in called]
    pairs = values.pairs_of(group["options"]) or []
    options = [[key, value + more if key == "param_names" else value] for key, value in pairs]
    return {"params": group["params"] + added, "options": values.with_pairs(group["options"], options)}


def _param_names(group: dict[str, Json]) -> list[Json]:
    return next((value for key, value in values.pairs_of(group["options"]) or [] if key == "param_names"), [])


def child_node(node: Json, key: Any, path: str) -> Json:
    """The node under ``key`` of a container node; raises KeyError where there is none."""
    entries = module_entries(node)
    if entries is not None:
        return entries[key]
    if values.tag_of(node) == "$optimizer":
        node = as_torch_format(node)
    if values.tag_of(node) == "$tuple":
        node = node["$tuple"]
    if isinstance(node, list):
        if not isinstance(key, int) or not 0 <= key < len(node):
            raise KeyError(key)
        return node[key]
    for key_node, value in values.pairs_of(node) or []:
        if values.decode_key(key_node, path) == key:
            return value
    raise KeyError(key)
