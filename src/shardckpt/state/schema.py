"""What a skeleton may look like: checked once, when a manifest is read, so that nobody after has to doubt it.

The skeleton of a hostile manifest could otherwise send the code that walks it anywhere: a tag with an impossible
argument, a key that cannot be hashed, ten thousand levels of nesting. The check itself does not recurse.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

from shardckpt.errors import CorruptCheckpointError
from shardckpt.garbage import held_off
from shardckpt.manifest import Manifest
from shardckpt.state import values
from shardckpt.state.skeleton import SPARSE_PARTS, per_rank_place

Json = Any

MAX_DEPTH: Final = 200
"""Containers in one another. Restoring recurses, and Python stops at 1,000 frames, of which the caller has some; what
`flatten` writes is not half as deep."""

Child = tuple[str, Json]
"""The path of a node, for messages, and the node."""


@held_off()
def check_skeleton(manifest: Manifest, where: str) -> None:
    """Raise CorruptCheckpointError, naming the place in the state, where ``manifest.state`` cannot be restored.

    ``where`` names the file in messages.
    """
    level: list[tuple[Child, bool]] = [(("", manifest.state), False)]
    places: set[str] = set()
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise CorruptCheckpointError(
                f"{where}: the state is nested deeper than {MAX_DEPTH} levels, at {level[0][0][0][:80]!r} for one."
            )
        following: list[tuple[Child, bool]] = []
        for (path, node), within in level:
            children = _children(manifest, path, node, where)
            place = per_rank_place(node)
            if place is not None:
                # Walking over one place again and again, or in itself, would never end.
                if within or place in places:
                    raise CorruptCheckpointError(
                        f"{where}: the values by rank of {place!r} stand in the state twice, or within others. The"
                        " manifest is damaged; load another checkpoint."
                    )
                places.add(place)
            # Anything else is a value, and means itself.
            nodes = [child for child in children if isinstance(child[1], (dict, list))]
            following += [(child, within or place is not None) for child in nodes]
        level = following
    for place in manifest.per_rank.keys() - places:
        raise CorruptCheckpointError(f"{where}: `per_rank` has {place!r}, which stands nowhere in the state.")


def _children(manifest: Manifest, path: str, node: Json, where: str) -> Iterator[Child]:
    tag = values.tag_of(node)
    try:
        if tag in _CHILDREN:
            return iter(_CHILDREN[tag](manifest, path, node[tag]))
        if tag is not None:
            values.decode_scalar(node, path)
        elif isinstance(node, dict):
            return iter([(_at(path, key), value) for key, value in node.items()])
        elif isinstance(node, list):
            return iter(_items(path, node))
        return iter(())
    except (CorruptCheckpointError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise CorruptCheckpointError(
            f"{where}: the state has {str(node)[:80]} at {path or 'the root'!r}, which means nothing: {error}. The "
            "manifest is damaged; load another checkpoint."
        ) from error


def _at(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _require(true: bool, what: str) -> None:
    if not true:
        raise ValueError(what)


def _items(path: str, node: Json) -> list[Child]:
    _require(isinstance(node, list), "its items are no list")
    return [(_at(path, index), item) for index, item in enumerate(node)]


def _hashable_items(path: str, node: Json) -> list[Child]:
    items = _items(path, node)
    for _, item in items:
        _check_key(item, objects=True)
    return items


def _pairs(path: str, node: Json) -> list[Child]:
    _require(isinstance(node, list), "its items are no list of pairs")
    children = []
    for pair in node:
        _require(isinstance(pair, list) and len(pair) == 2, "its items are no pairs")
        _check_key(pair[0])
        children.append((_at(path, str(pair[0])[:40]), pair[1]))
    return children


def _check_key(node: Json, depth: int = 0, *, objects: bool = False) -> None:
    """A key, or an item of a set, is a scalar, or a tuple or frozen set of such; sets may hold pickled objects too."""
    _require(depth < MAX_DEPTH, "it is nested too deeply")
    tag = values.tag_of(node)
    if objects and tag == "$object":
        return
    if tag in ("$tuple", "$frozenset"):
        _require(isinstance(node[tag], list), "a key's items are no list")
        for item in node[tag]:
            _check_key(item, depth + 1, objects=objects)
    else:
        hash(values.decode_scalar(node, "a key"))


def _tensor(manifest: Manifest, path: str, name: Json) -> list[Child]:  # noqa: ARG001 - the signature of _CHILDREN
    _require(isinstance(name, str) and manifest.resolve(name) is not None, "the manifest lists no such tensor")
    return []


def _object(manifest: Manifest, path: str, name: Json) -> list[Child]:  # noqa: ARG001 - the signature of _CHILDREN
    _require(isinstance(name, str) and name in manifest.objects, "the manifest lists no such object")
    return []


def _per_rank(manifest: Manifest, path: str, place: Json) -> list[Child]:
    _require(isinstance(place, str) and place in manifest.per_rank, "the manifest lists no such place")
    return [(_at(path, f"rank-{rank}"), node) for rank, node in manifest.per_rank[place].items()]


def _defaultdict(_: Manifest, path: str, node: Json) -> list[Child]:
    factory, pairs = node
    _require(factory is None or factory in values.FACTORIES, "its factory is unknown")
    return _pairs(path, pairs)


def _module(_: Manifest, path: str, node: Json) -> list[Child]:
    _require(all(type(version) is int for version in node["versions"].values()), "a version is no number")
    return [(_at(path, name), value) for name, value in node["entries"].items()]


def _optimizer(_: Manifest, path: str, node: Json) -> list[Child]:
    children = [(_at(path, f"state.{name}"), value) for name, value in node["state"].items()]
    children += _pairs(_at(path, "state"), node.get("loose", []))
    _require(isinstance(node["param_groups"], list), "its param_groups are no list")
    for index, group in enumerate(node["param_groups"]):
        params, options = group["params"], group["options"]
        _require(isinstance(params, list) and all(type(name) is str for name in params), "params are no names")
        pairs = values.pairs_of(options)
        _require(pairs is not None and all(type(key) is str for key, _ in pairs), "options are no dict")
        children.append((_at(path, f"param_groups.{index}"), options))
    _require("saved_as" not in node, "it has the names of a load")
    if "rest" in node:
        _require(values.pairs_of(node["rest"]) is not None, "its rest is no dict")
        children.append((path, node["rest"]))
    return children


def _sparse(_: Manifest, path: str, node: Json) -> list[Child]:
    parts = node["parts"]
    _require(set(SPARSE_PARTS[node["layout"]]) == parts.keys(), "its parts are not those of its layout")
    _require(all(values.tag_of(part) == "$tensor" for part in parts.values()), "a part is no tensor")
    _require(all(type(n) is int and 0 <= n < 1 << 63 for n in node["size"]), "its size is impossible")
    _require(type(node["coalesced"]) is bool, "coalesced is neither true nor false")
    return [(_at(path, name), part) for name, part in parts.items()]


_CHILDREN: Final[dict[str | None, Callable[[Manifest, str, Json], list[Child]]]] = {
    "$tensor": _tensor,
    "$ndarray": _tensor,
    "$object": _object,
    "$per_rank": _per_rank,
    "$tuple": lambda _, path, node: _items(path, node),
    "$set": lambda _, path, node: _hashable_items(path, node),
    "$frozenset": lambda _, path, node: _hashable_items(path, node),
    "$dict": lambda _, path, node: _pairs(path, node),
    "$ordered": lambda _, path, node: _pairs(path, node),
    "$counter": lambda _, path, node: _pairs(path, node),
    "$defaultdict": _defaultdict,
    "$module": _module,
    "$optimizer": _optimizer,
    "$sparse": _sparse,
}
