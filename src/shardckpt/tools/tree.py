"""The saved state as a tree of places, for people: what stands where. No tensor is read, nothing unpickled."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from shardckpt.errors import CorruptCheckpointError
from shardckpt.manifest import Manifest
from shardckpt.state import values
from shardckpt.state.names import child_path
from shardckpt.state.skeleton import module_entries, optimizer_node, per_rank_place, tensor_name

Json = Any

_REFERENCES = ("$tensor", "$ndarray", "$sparse", "$object", "$module", "$optimizer", "$per_rank")
_CONTAINERS = ("$set", "$frozenset", "$dict", "$ordered", "$counter", "$defaultdict")
_NOT_PLAIN: Final = frozenset((*_REFERENCES, *_CONTAINERS))
"""Tags of what makes a list more than a long value."""


@dataclass
class Node:
    """One place of the state."""

    path: str
    """Dotted, as in the names of tensors; empty for the root."""
    key: str
    """Its own part of the path."""
    kind: str
    """``tensor``, ``ndarray``, ``sparse``, ``object``, ``per_rank``, ``module``, ``optimizer``, ``value``, or the kind
    of a container: ``dict``, ``list``, ``tuple``, ``ordered``, ``counter``, ``defaultdict``."""
    children: list["Node"] = field(default_factory=list)
    tensor: str | None = None
    """Of a tensor: its name in the manifest."""
    value: Json = None
    """Of a plain value: as it stands in the manifest. Of a pickled object its path there; of a sparse tensor, or a
    defaultdict, what is to be known of it besides its children."""


def tree_of(manifest: Manifest) -> Node:
    """The whole state, in the order in which it was saved."""
    return _node(manifest, "", "", manifest.state)


def walk(node: Node) -> Iterator[Node]:
    """A node and all that lies in it, depth first."""
    yield node
    for child in node.children:
        yield from walk(child)


def text_of(value: Json) -> str:
    """A plain value as Python would show it."""
    tag = values.tag_of(value)
    if isinstance(value, list):
        return f"[{', '.join(map(text_of, value))}]"
    if tag == "$tuple":
        items = [text_of(item) for item in value[tag]]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    if tag in ("$set", "$frozenset"):
        return f"{tag[1:]}({', '.join(map(text_of, value[tag]))})"
    if tag == "$object":
        return f"<pickled object {value[tag]!r}>"
    try:
        return repr(values.decode_scalar(value, ""))
    except CorruptCheckpointError:
        return str(value)


def _node(manifest: Manifest, path: str, key: str, node: Json) -> Node:
    tag = values.tag_of(node)
    name = tensor_name(node)
    if name is not None:
        return Node(path, key, "tensor" if tag == "$tensor" else "ndarray", tensor=name)
    place = per_rank_place(node)
    if place is not None:
        ranks = {f"rank-{rank}": value for rank, value in sorted(manifest.per_rank[place].items())}
        return Node(path, key, "per_rank", _nodes(manifest, path, ranks.items()))
    if tag == "$object":
        return Node(path, key, "object", value=node[tag])
    if tag == "$sparse":
        about = {name: part for name, part in node[tag].items() if name != "parts"}
        return Node(path, key, "sparse", _nodes(manifest, path, node[tag]["parts"].items()), value=about)
    entries = module_entries(node)
    if entries is not None:
        return Node(path, key, "module", _nodes(manifest, path, entries.items()))
    if (body := optimizer_node(node)) is not None:
        return Node(path, key, "optimizer", _optimizer(manifest, path, body))
    items = node[tag] if tag == "$tuple" else node
    if isinstance(items, list) and not all(_is_plain(item) for item in items):
        return Node(path, key, "tuple" if tag else "list", _nodes(manifest, path, enumerate(items)))
    pairs = values.pairs_of(node)
    if pairs is not None:
        named = [(values.decode_key(key_node, path), value) for key_node, value in pairs]
        kind = tag[1:] if tag and tag != "$dict" else "dict"
        factory = node[tag][0] if tag == "$defaultdict" else None
        return Node(path, key, kind, _nodes(manifest, path, named), value=factory)
    return Node(path, key, "value", value=node)


def _is_plain(node: Json) -> bool:
    """Whether a node of a list is a single value, or a list of such: long lists of numbers are no places."""
    tag = values.tag_of(node)
    if isinstance(node, list) or tag == "$tuple":
        return all(_is_plain(item) for item in (node[tag] if tag else node))
    if isinstance(node, dict) and tag is None:
        return False
    return tag not in _NOT_PLAIN


def _nodes(manifest: Manifest, path: str, items: Any) -> list[Node]:
    return [_node(manifest, child_path(path, key), str(key), value) for key, value in items]


def _optimizer(manifest: Manifest, path: str, body: dict[str, Json]) -> list[Node]:
    state = child_path(path, "state")
    found = _nodes(manifest, state, body["state"].items())
    loose = ((values.decode_key(key, state), value) for key, value in body.get("loose", []))
    found += _nodes(manifest, state, loose)
    groups_path = child_path(path, "param_groups")
    groups = []
    for index, group in enumerate(body["param_groups"]):
        at = child_path(groups_path, index)
        options = [(values.decode_key(key, at), value) for key, value in values.pairs_of(group["options"]) or []]
        groups.append(Node(at, str(index), "dict", _nodes(manifest, at, [*options, ("params", group["params"])])))
    rest = [(values.decode_key(key, path), value) for key, value in values.pairs_of(body.get("rest", {})) or []]
    return [
        Node(state, "state", "dict", found),
        Node(groups_path, "param_groups", "list", groups),
        *_nodes(manifest, path, rest),
    ]
