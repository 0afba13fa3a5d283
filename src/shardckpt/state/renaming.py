"""Other names for the places of a saved skeleton, by a key map. Pure: tensors are referred to as before."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

from shardckpt.errors import UsageError
from shardckpt.state import names, values
from shardckpt.state.skeleton import module_entries, optimizer_node
from shardckpt.state.subtree import children, hint, parameters, place_names, rename_parameters

Json = Any
KeyMap = Mapping[str, str] | Callable[[str], str]
"""From names in the checkpoint to names in the live state; of a dict, a key stands for all that lies below it too."""

_GONE: Final = object()
"""In place of a container from which everything was moved elsewhere."""


def rename(skeleton: Json, key_map: KeyMap, modules: Collection[str] | None, *, strict: bool) -> Json:
    """``skeleton`` with each place where ``key_map`` says, and the state of optimizers with its parameters.

    Names are dotted, from the root of ``skeleton``; containers are renamed before what is in them. ``modules`` are the
    places of modules in the state to be restored (None: there is no such state), which say where a module's names begin
    when they move to a place that the checkpoint lacks.

    Raises UsageError where two places get one name, where a dict's key is no name of the checkpoint (if ``strict``),
    and for what cannot be moved: the items of a list.
    """
    walk = _Renamer(_Mapping(key_map), modules or ())
    root = walk.keep(skeleton, "", "")
    unknown = walk.mapping.unused() if strict else []
    if unknown:
        raise UsageError(
            f"key_map: the checkpoint has nothing called {unknown[0]!r}.{hint(unknown[0], place_names(skeleton))}"
        )
    entries = None if root is _GONE else module_entries(root)
    if entries is not None and modules and "" not in modules:
        # What was a module by itself becomes a part of a state.
        walk.moved += [(name, item, True) for name, item in entries.items()]
        root = {}
    root = {} if root is _GONE else root
    for target, node, from_module in walk.moved:
        root = _Placing(modules, from_module).place(root, target, node)
    _restore_versions(root, "", walk.versions)
    return root


class _Mapping:
    """A key map as a function, and which of a dict's keys were of use."""

    def __init__(self, key_map: KeyMap) -> None:
        if isinstance(key_map, Mapping):
            if not all(type(name) is str for item in key_map.items() for name in item):
                raise UsageError("key_map is a dict of names to names, and one of them is no string")
        elif not callable(key_map):
            raise UsageError(f"key_map is a dict of names or a function from name to name, not {key_map!r}")
        self._key_map = key_map
        self._used: set[str] = set()

    def __call__(self, name: str) -> str:
        if not isinstance(self._key_map, Mapping):
            renamed = self._key_map(name)
            if type(renamed) is not str:
                raise UsageError(f"key_map({name!r}) returned a {type(renamed).__name__}, not a name")
            return renamed
        found = None
        above: str | None = name
        while above is not None:  # the longest key counts, though the others were not wrong
            if above in self._key_map:
                self._used.add(above)
                found = above if found is None else found
            above = above.rpartition(".")[0] if above else None
        if found is None:
            return name
        rest = name[len(found) :].removeprefix(".")
        return ".".join(filter(None, (self._key_map[found], rest)))

    def unused(self) -> list[str]:
        return [key for key in self._key_map if key not in self._used] if isinstance(self._key_map, Mapping) else []


class _Renamer:
    """Walks over a skeleton: what keeps its place in its container stays, all else is listed as moved."""

    def __init__(self, mapping: _Mapping, modules: Collection[str]) -> None:
        self.mapping = mapping
        self._modules = modules
        self.moved: list[tuple[str, Json, bool]] = []
        """Where to, what, and whether it was a module's."""
        self.versions: list[tuple[str, int]] = []
        """Of modules, by their new names."""
        self._taken: dict[str, str] = {}

    def keep(self, node: Json, old: str, new: str) -> Json:
        """``node``, called ``old`` so far, without what moves out of it when it is called ``new``."""
        if module_entries(node) is not None:
            return self._module(node, old, new)
        if optimizer_node(node) is not None:
            self._claim(old, new)
            return self._optimizer(node, old)
        if values.tag_of(node) == "$tuple" or isinstance(node, list):
            return self._list(node, old, new)
        pairs = values.pairs_of(node)
        if not pairs:
            self._claim(old, new)
            return node
        return self._dict(node, pairs, old, new)

    def _claim(self, old: str, new: str) -> None:
        if old and not new:
            raise UsageError(f"key_map: {old!r} of the checkpoint would have no name")
        other = self._taken.setdefault(new, old)
        if other != old:
            raise UsageError(f"key_map: {other!r} and {old!r} of the checkpoint would both be called {new!r}")

    def _module(self, node: Json, old: str, new: str) -> Json:
        body = node["$module"]
        kept = {}
        for name, item in body["entries"].items():
            child = names.child_path(old, name)
            target = self.mapping(child)
            self._claim(child, target)
            inner = target if not new else target.removeprefix(f"{new}.")
            if target == names.child_path(new, inner):
                kept[inner] = item
            else:
                self.moved.append((target, item, True))
        self.versions += [
            (self.mapping(path) if path else path, version)
            for name, version in body["versions"].items()
            for path in [names.child_path(old, name) if name else old]
        ]
        return {"$module": {**body, "entries": kept, "versions": {}}} if kept or not body["entries"] else _GONE

    def _optimizer(self, node: Json, path: str) -> Json:
        renamed: dict[str, str] = {}
        taken: dict[str, str] = {}
        for name in parameters(node):
            # What has no name but a place in param groups keeps that.
            renamed[name] = name if names.is_place_in_groups(name) else self.mapping(name)
            other = taken.setdefault(renamed[name], name)
            if other != name:
                raise UsageError(
                    f"key_map: parameters {other!r} and {name!r} of the optimizer at {path or 'the root'!r} would both"
                    f" be called {renamed[name]!r}"
                )
        return rename_parameters(node, renamed.__getitem__)

    def _list(self, node: Json, old: str, new: str) -> Json:
        items = list(node["$tuple"] if isinstance(node, dict) else node)
        for index, item in children(node):
            child, place = names.child_path(old, index), names.child_path(new, index)
            if (target := self.mapping(child)) != place:
                raise UsageError(
                    f"key_map: {child!r} of the checkpoint is an item of a list and cannot become {target!r}; rename"
                    " the list, or what is in the item"
                )
            kept = self.keep(item, child, place)
            items[index] = {} if kept is _GONE else kept
        return {"$tuple": items} if isinstance(node, dict) else items

    def _dict(self, node: Json, pairs: list[tuple[Json, Json]], old: str, new: str) -> Json:
        keys = [values.decode_key(key, old) for key, _ in pairs]
        targets = [self.mapping(names.child_path(old, key)) for key in keys]
        inner = [_inner(str(key), new, target) for key, target in zip(keys, targets, strict=True)]
        kept: list[list[Json]] = []
        for (key_node, item), key, target, name in zip(pairs, keys, targets, inner, strict=True):
            place = len(self.moved)  # what moves out of a container comes after it
            value = self.keep(item, names.child_path(old, key), target)
            if value is _GONE:
                continue
            into_module = module_entries(value) is not None and _owners(self._modules, target)
            if into_module or name is None or inner.count(name) > 1:
                self.moved.insert(place, (target, value, False))
            else:
                kept.append([key_node if target == names.child_path(new, key) else name, value])
        return values.with_pairs(node, kept) if kept else _GONE


def _inner(key: str, container: str, target: str) -> str | None:
    """The name in ``container`` that something called ``key`` has when it is called ``target``; None if it moves out.

    Both are one step of a path, unless the keys are paths themselves.
    """
    name = target.removeprefix(f"{container}.") if container else target
    if not name or target != names.child_path(container, name):
        return None
    return name if name == key or "." in key or "." not in name else None


def _owners(modules: Collection[str], target: str) -> list[str]:
    """The modules whose names begin above ``target``, where no module is."""
    if target in modules:
        return []
    return [name for name in modules if not name or target.startswith(f"{name}.")]


class _Placing:
    """Where one moved node goes."""

    def __init__(self, modules: Collection[str] | None, from_module: bool) -> None:
        self._modules = modules
        self._from_module = from_module

    def place(self, root: Json, target: str, node: Json) -> Json:
        """``root`` with ``node`` at ``target``. Changes ``root``, whose containers must be nobody else's."""
        owners = _owners(self._modules or (), target)
        if owners:
            owner = max(owners, key=len)
            name = target.removeprefix(f"{owner}." if owner else "")
            # An entry of a module is one, whatever it is; a container that moves into a module becomes its entries.
            target, node = owner, _module({name: node} if self._from_module else dict(_leaves(node, name)))
        return self._attach(root, target, node, "")

    def _attach(self, container: Json, name: str, node: Json, path: str) -> Json:
        if not name:
            return self._merge(container, node, path)
        entries = module_entries(container)
        if entries is not None:
            if name in entries:
                raise self._occupied(names.child_path(path, name))
            entries[name] = node
            return container
        items = container["$tuple"] if values.tag_of(container) == "$tuple" else container
        if isinstance(items, list):
            head, _, rest = name.partition(".")
            if not head.isdecimal() or int(head) >= len(items):
                raise UsageError(f"key_map: {path!r} is a list without an item {head!r}")
            items[int(head)] = self._attach(items[int(head)], rest, node, names.child_path(path, head))
            return container
        pairs = values.pairs_of(container)
        if pairs is None:
            raise self._occupied(path)
        made = [[key, item] for key, item in pairs]
        for pair in made:
            key = names.child_path("", values.decode_key(pair[0], path))
            if name == key or name.startswith(f"{key}."):
                rest = name[len(key) :].removeprefix(".")
                pair[1] = self._attach(pair[1], rest, node, names.child_path(path, key))
                return values.with_pairs(container, made)
        head, _, rest = name.partition(".")
        if not rest:
            value = node
        elif self._from_module and self._modules is None:
            value = _module({rest: node})
        else:
            value = self._attach({}, rest, node, names.child_path(path, head))
        return values.with_pairs(container, [*made, [head, value]])

    def _merge(self, container: Json, node: Json, path: str) -> Json:
        """What stands in one place and what comes there, as one."""
        if container == {}:
            return node
        flat = module_entries(node)
        pairs = values.pairs_of(container)
        if flat is not None and pairs is not None:
            # A module's names have dots, and a dict that holds its entries keeps them so.
            taken = {names.child_path("", values.decode_key(key, path)) for key, _ in pairs}
            if clash := next(filter(taken.__contains__, flat), None):
                raise self._occupied(names.child_path(path, clash))
            return values.with_pairs(container, [*map(list, pairs), *map(list, flat.items())])
        for name, item in _items(node) or [("", node)]:
            if not name:
                raise self._occupied(path)
            container = self._attach(container, name, item, path)
        return container

    def _occupied(self, path: str) -> UsageError:
        return UsageError(
            f"key_map: something of the checkpoint is at {path!r} already, and another would go there too"
        )


def _leaves(node: Json, path: str) -> Iterator[tuple[str, Json]]:
    """What lies in a container, at any depth, by flat names."""
    items = _items(node)
    if not items:
        yield path, node
    for name, item in items:
        if module_entries(node) is not None:
            yield names.child_path(path, name), item
        else:
            yield from _leaves(item, names.child_path(path, name))


def _items(node: Json) -> list[tuple[str, Json]]:
    """The items of a dict or a module node, by name."""
    entries = module_entries(node)
    if entries is not None:
        return list(entries.items())
    return [(names.child_path("", values.decode_key(key, "")), item) for key, item in values.pairs_of(node) or []]


def _module(entries: dict[str, Json]) -> Json:
    return {"$module": {"entries": entries, "versions": {}}}


def _restore_versions(node: Json, path: str, versions: list[tuple[str, int]]) -> None:
    if module_entries(node) is None:
        for key, child in children(node):
            _restore_versions(child, names.child_path(path, key), versions)
        return
    start = f"{path}." if path else ""
    for name, version in versions:
        if name == path or name.startswith(start):
            node["$module"]["versions"]["" if name == path else name.removeprefix(start)] = version
