"""Sub-trees and new names of skeletons, which no file and no tensor is needed for."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardckpt.errors import TensorNotFoundError, UsageError
from shardckpt.state.renaming import rename
from shardckpt.state.subtree import subtree

Json = Any

KEYS = "abcd"
segments = st.sampled_from(KEYS)


def module(entries: dict[str, Json], versions: dict[str, int] | None = None) -> Json:
    return {"$module": {"entries": entries, "versions": versions or {}}}


def optimizer(names: list[str]) -> Json:
    state = {name: {"exp_avg": {"$tensor": f"opt.state.{name}.exp_avg"}} for name in names}
    return {"$optimizer": {"state": state, "param_groups": [{"params": names, "options": {"lr": 0.1}}]}}


@st.composite
def skeletons(draw: st.DrawFn) -> Json:
    """Dicts, lists and modules in one another, whose leaves say where they were."""
    count = iter(range(1000))

    def leaf() -> Json:
        return {"$tensor": f"t{next(count)}"}

    def node(depth: int) -> Json:
        kind = draw(st.sampled_from(("leaf", "dict", "module", "list") if depth else ("dict",)))
        if kind == "leaf" or depth == 4:
            return leaf()
        if kind == "module":
            paths = draw(st.lists(st.lists(segments, min_size=1, max_size=3).map(".".join), min_size=1, max_size=5))
            names = [p for p in dict.fromkeys(paths) if not any(q.startswith(f"{p}.") for q in paths)]
            parents = [name.rpartition(".")[0] for name in names]
            return module({name: leaf() for name in names}, {name: 2 for name in parents if draw(st.booleans())})
        if kind == "list":
            return [node(depth + 1) for _ in range(draw(st.integers(1, 2)))]
        return {key: node(depth + 1) for key in draw(st.lists(segments, min_size=1, max_size=3, unique=True))}

    return node(0)


def leaves(node: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    """Every leaf by its name."""
    if isinstance(node, dict) and "$tensor" in node:
        yield path, node
        return
    if isinstance(node, dict) and "$module" in node:
        items: Any = node["$module"]["entries"].items()
    else:
        items = enumerate(node) if isinstance(node, list) else node.items()
    for key, child in items:
        yield from leaves(child, f"{path}.{key}" if path else str(key))


def modules(node: Json, path: str = "") -> Iterator[str]:
    if isinstance(node, dict) and "$module" in node:
        yield path
    elif not (isinstance(node, dict) and "$tensor" in node):
        for key, child in enumerate(node) if isinstance(node, list) else node.items():
            yield from modules(child, f"{path}.{key}" if path else str(key))


def exchange(name: str) -> str:
    """Every segment becomes another one, and the same function leads back."""
    return ".".join(KEYS[-1 - KEYS.index(part)] if part in KEYS else part for part in name.split("."))


@settings(max_examples=60, deadline=None)
@given(skeletons())
def test_a_function_and_its_inverse_lead_back(skeleton):
    """Every place gets the name the function says, keeps its reference, and loses nothing on the way back."""
    renamed = rename(skeleton, exchange, None, strict=True)
    assert dict(leaves(renamed)) == {exchange(name): leaf for name, leaf in leaves(skeleton)}
    assert sorted(modules(renamed)) == sorted(map(exchange, modules(skeleton)))
    assert rename(renamed, exchange, None, strict=True) == skeleton


@settings(max_examples=60, deadline=None)
@given(skeletons(), st.data())
def test_a_dict_and_its_inverse_lead_back(skeleton, data):
    """A place that moves takes along all that lies below it, and comes back to where it was."""
    before = dict(leaves(skeleton))
    places = {name[:stop] for name in before for stop, c in enumerate(f"{name}.") if c == "."}
    movable = sorted(place for place in places if not place.rpartition(".")[2].isdecimal())
    place = data.draw(st.sampled_from(movable))
    target = data.draw(st.sampled_from(("new", "new.at.depth", "a.new", f"{place}_", "b.c.new")))
    assume(target not in places and not target.startswith(f"{place}.") and _reaches(skeleton, target))
    there = list(modules(skeleton))
    renamed = rename(skeleton, {place: target}, there, strict=True)
    moved = {
        target + name.removeprefix(place) if name == place or name.startswith(f"{place}.") else name: leaf
        for name, leaf in before.items()
    }
    assert dict(leaves(renamed)) == moved
    back = rename(renamed, {target: place}, there, strict=True)
    assert dict(leaves(back)) == before
    assert set(modules(back)) == set(there)


def _reaches(skeleton: Json, target: str) -> bool:
    """Whether neither a list nor a leaf stands on the way to a place."""
    node = skeleton
    for part in target.split("."):
        if isinstance(node, list) or "$tensor" in node:
            return False
        if not isinstance(node, dict) or part not in node:
            return True
        node = node[part]
    return True


@settings(max_examples=60, deadline=None)
@given(skeletons())
def test_the_same_names_change_nothing(skeleton):
    """A key map that keeps every name keeps the skeleton, versions of modules included."""
    assert rename(skeleton, lambda name: name, None, strict=True) == skeleton
    assert rename(skeleton, {}, list(modules(skeleton)), strict=True) == skeleton


@settings(max_examples=60, deadline=None)
@given(skeletons(), st.data())
def test_a_subtree_has_what_lies_below_its_name(skeleton, data):
    """Under every prefix of every name there is what that prefix says, once."""
    before = dict(leaves(skeleton))
    name = data.draw(st.sampled_from(sorted(before)))
    parts = name.split(".")
    prefix = ".".join(parts[: data.draw(st.integers(0, len(parts)))])
    found = dict(leaves(subtree(skeleton, prefix)))
    start = f"{prefix}." if prefix else ""
    below = {other.removeprefix(start): leaf for other, leaf in before.items() if other.startswith(start)}
    assert found == (below or {"": before[prefix]})
    with pytest.raises(TensorNotFoundError):
        subtree(skeleton, f"{prefix}.no" if prefix else "no")


def test_nothing_that_was_given_is_changed():
    """The manifest's skeleton serves the next load too."""

    def skeleton() -> Json:
        return {
            "m": module({"a.w": {"$tensor": "1"}, "b.w": {"$tensor": "2"}}, {"a": 2}),
            "l": [{"x": 1}],
            "o": optimizer(["m.a.w"]),
        }

    given_one = skeleton()
    renamed = rename(given_one, {"m.a": "n.c", "l.0.x": "m.y"}, ["m", "n"], strict=True)
    assert given_one == skeleton()
    assert renamed["n"] == module({"c.w": {"$tensor": "1"}}, {"c": 2})
    assert renamed["m"] == module({"b.w": {"$tensor": "2"}, "y": 1})
    assert renamed["o"]["$optimizer"]["param_groups"][0]["params"] == ["n.c.w"]
    assert list(renamed["o"]["$optimizer"]["state"]) == ["n.c.w"]


def test_a_container_moves_before_what_moves_out_of_it():
    """So it is still the list, or the kind of dict, that it was."""
    skeleton = {"a": [{"x": {"$tensor": "1"}, "k": 5}], "o": {"$ordered": [["x", 1], ["k", 2]]}}
    key_map = {"a": "m.n", "a.0.x": "m.n.0.y.z", "o": "m.p", "o.x": "m.p.y.z"}
    assert rename(skeleton, key_map, None, strict=True) == {
        "m": {"n": [{"k": 5, "y": {"z": {"$tensor": "1"}}}], "p": {"$ordered": [["k", 2], ["y", {"z": 1}]]}}
    }


def test_two_parameters_of_an_optimizer_on_one_name():
    """Optimizer state has no module beside it to find the clash."""
    with pytest.raises(UsageError, match=r"parameters 'a\.w' and 'b\.w' of the optimizer at 'o'"):
        rename({"o": optimizer(["a.w", "b.w"])}, {"a": "b"}, None, strict=True)


def test_parameters_without_names_keep_their_places():
    """A function that puts a prefix before everything must not take what is found by its order for a name."""
    node = {"o": optimizer(["param_groups.0.0"])}
    renamed = rename(node, lambda name: f"x.{name}", None, strict=True)
    assert renamed == {"x": node}
