"""Values that differ by rank, on the ranks of one process: names, digests, what is restored where, what is refused."""

from collections import deque
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shardckpt
from shardckpt import PerRank, commit
from shardckpt import manifest as mf
from shardckpt.errors import ConflictingStateError, CorruptCheckpointError, StateMismatchError, UsageError
from shardckpt.manifest import FileEntry, Manifest, ObjectEntry, RankValues, TensorHead
from shardckpt.state import Flattened, Maker, Matching, flatten, walk
from shardckpt.state.per_rank import Here
from shardckpt.state.schema import MAX_DEPTH, check_skeleton
from test_values import STATES, same

MARK = object()
TREES = st.recursive(
    st.just(MARK) | st.integers(0, 9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["a", "b", "a.b", "0", "$x", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)


def flat(state: Any, *, rank: int = 0, **options: Any) -> Flattened:
    return flatten(state, replicated=False, **{"include": None, "exclude": None, "rank": rank} | options)


def planted(tree: Any, values: list[Any]) -> Any:
    """``tree`` with the next of ``values`` for each mark."""
    if tree is MARK:
        return PerRank(values.pop(0))
    if isinstance(tree, dict):
        return {key: planted(item, values) for key, item in tree.items()}
    return type(tree)(planted(item, values) for item in tree) if isinstance(tree, (list, tuple)) else tree


def marks(tree: Any) -> int:
    if isinstance(tree, (dict, list, tuple)):
        return sum(marks(item) for item in (tree.values() if isinstance(tree, dict) else tree))
    return int(tree is MARK)


def held(tree: Any) -> list[Any]:
    """The values that are marked in a state, in order; of what `Maker.new` made, where ``tree`` has marks, its own."""
    if isinstance(tree, PerRank):
        return [tree.value]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [value for item in items for value in held(item)]


def committed(found: list[Flattened]) -> Manifest:
    """What rank 0 makes of what the ranks of a job have flattened, read again; none has tensors."""
    save_id = "0" * 12
    files = [
        FileEntry(f"rank-{rank:05d}-{save_id}.safetensors", 1, f"rank-{rank:05d}-{save_id}.json", 1, "0" * 16)
        for rank in range(len(found))
    ]
    manifest = Manifest(
        save_id=save_id,
        created="",
        world_size=len(found),
        writer={},
        files=files,
        state=found[0].skeleton,
        tensors={},
    )
    values = {rank: None if one.own is None else RankValues(one.own.skeleton) for rank, one in enumerate(found)}
    manifest = mf.decode_manifest(mf.encode(commit.with_values(manifest, values)), "here")
    check_skeleton(manifest, "here")
    return manifest


def matching(manifest: Manifest, here: Here) -> Matching:
    return Matching(
        manifest, walk, parameters={}, convert_dtype=False, strict=True, relocate=lambda tensor, _: tensor, here=here
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_value_at_any_place_is_its_ranks(data):
    """Whatever ranks hold wherever in a state, each gets its own back, and everybody's are found by rank."""
    tree = {"x": data.draw(TREES)}
    size = data.draw(st.integers(1, 3))
    saved = [[data.draw(STATES) for _ in range(marks(tree))] for _ in range(size)]
    manifest = committed([flat(planted(tree, [*values]), rank=rank) for rank, values in enumerate(saved)])
    assert manifest.requires == (["per_rank"] if marks(tree) else [])
    assert len(manifest.per_rank) == marks(tree)
    for rank in range(size):
        live = planted(tree, [None] * marks(tree))
        match = matching(manifest, Here(rank, size))
        match.match(live, manifest.state, "")()
        match.differences.check("here", strict=True)
        assert same(held(live), saved[rank])
        assert match.offers == []
    for place, by_rank in zip(manifest.per_rank, map(list, zip(*saved, strict=True)), strict=True):
        assert same(Maker(manifest, lambda tensor, _: tensor).new({"$per_rank": place}, "")(), by_rank)
    live = planted(tree, [MARK] * marks(tree))
    match = matching(manifest, Here(0, size + 1))
    match.match(live, manifest.state, "")()
    assert [offer.place for offer in match.offers] == list(manifest.per_rank)
    assert held(live) == [MARK] * marks(tree)


def test_names_and_digests():
    """A rank's own tensors have names of their own, and are no part of what the ranks tell each other."""
    shared = torch.ones(2)

    def state(rank: int) -> dict[str, Any]:
        own = {"t": torch.ones(rank + 1), "again": shared, "b": {"c": torch.ones(1)}, "b.c": torch.ones(1)}
        return {"w": shared, "p": PerRank([own, 1j, object]), "a": {"b": PerRank(0)}, "a.b": PerRank(rank)}

    first, second = flat(state(0)), flat(state(1), rank=1)
    assert first.skeleton == {
        "w": {"$tensor": "w"},
        "p": {"$per_rank": "p"},
        "a": {"b": {"$per_rank": "a.b"}},
        "a.b": {"$per_rank": "a.b~2"},
    }
    assert second.skeleton == first.skeleton
    for found in (first, second):
        assert list(found.tensors) == ["w"]
        assert (found.aliases, found.objects) == ({}, {})
    assert (first.structure, first.outline, first.places) == (second.structure, second.outline, second.places)
    assert first.own is not None
    assert second.own is not None
    assert first.own.structure != second.own.structure
    assert list(second.own.skeleton) == ["p", "a.b", "a.b~2"]
    assert list(second.own.tensors) == [f"p.rank-1.0.{name}" for name in ("t", "again", "b.c", "b.c~2")]
    assert list(second.own.objects) == ["p.rank-1.2"]
    assert flat({"w": shared}).own is None
    assert flat({"w": shared, "p": PerRank(0)}).outline not in (first.outline, flat({"w": shared, "p": 0}).outline)


def test_patterns_choose_values_by_rank():
    """``include`` and ``exclude`` see a marked value by its place, and what is in it by its names."""
    state = {"w": torch.ones(1), "rng": {"cpu": PerRank(torch.ones(1)), "python": PerRank([1, {"x": 2}])}}

    def chosen(**options: Any) -> Any:
        found = flat(state, rank=3, **options)
        return found.skeleton, found.own and found.own.skeleton

    rng = {"$tensor": "rng.cpu.rank-3"}
    assert chosen(include=["rng"]) == (
        {"rng": {"cpu": {"$per_rank": "rng.cpu"}, "python": {"$per_rank": "rng.python"}}},
        {"rng.cpu": rng, "rng.python": [1, {"x": 2}]},
    )
    assert chosen(include=["rng.cpu"]) == ({"rng": {"cpu": {"$per_rank": "rng.cpu"}}}, {"rng.cpu": rng})
    assert chosen(exclude=["rng"]) == ({"w": {"$tensor": "w"}}, None)
    assert chosen(include=["rng.python.rank-3.1"])[1] == {"rng.python": [None, {"x": 2}]}


class Stateful:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Seeded(nn.Module):
    """A module with state of its own that differs by rank."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), float(seed)))
        self.seed = seed

    def get_extra_state(self) -> Any:
        return PerRank(self.seed)

    def set_extra_state(self, state: Any) -> None:
        self.seed = state.value


def test_what_restores_itself(tmp_path):
    """Modules and stateful objects in a mark, and marks in what they save, go through their own loading code."""
    inside, module = Stateful(3), nn.Linear(2, 2)
    state = {
        "in": PerRank([inside, module]),
        "out": Stateful({"own": PerRank(4), "all": 5}),
        "module": Seeded(6),
        "new": Stateful(PerRank((7, torch.ones(2)))),
    }
    shardckpt.save(state, tmp_path / "ck")
    live = {
        "in": PerRank([Stateful(0), nn.Linear(2, 2)]),
        "out": Stateful({"own": PerRank(0), "all": 0}),
        "module": Seeded(0),
        "new": Stateful(None),
    }
    pointer = live["in"].value[1].weight.data_ptr()
    shardckpt.load(tmp_path / "ck", live)
    assert live["in"].value[0].value == 3
    assert live["in"].value[1].weight.equal(module.weight)
    assert live["in"].value[1].weight.data_ptr() == pointer
    assert (live["out"].value["own"].value, live["out"].value["all"]) == (4, 5)
    assert live["module"].seed == 6
    assert live["module"].weight.tolist() == [6.0, 6.0]
    assert live["new"].value.value[0] == 7
    assert live["new"].value.value[1].equal(torch.ones(2))
    # A whole stateful object that was marked is not one that marks.
    with pytest.raises(StateMismatchError, match="in: one value for all ranks here"):
        shardckpt.load(tmp_path / "ck", {"in": Stateful(0)})


def test_values_are_restored_in_place(tmp_path):
    """Who holds a reference to a marked value's tensors and containers sees them restored; shapes are checked."""
    shardckpt.save({"p": PerRank({"t": torch.ones(3), "list": [1, 2], "n": None})}, tmp_path / "ck")
    tensor, items = torch.zeros(3), [0]
    live = {"p": PerRank({"t": tensor, "list": items, "n": 1})}
    value = live["p"].value
    report = shardckpt.load(tmp_path / "ck", live)
    assert live["p"].value is value
    assert (value["t"], value["list"], value["n"]) == (tensor, items, None)
    assert tensor.tolist() == [1, 1, 1]
    assert items == [1, 2]
    assert report.restored == ["p.rank-0.t"]
    with pytest.raises(StateMismatchError, match=r"p\.rank-0\.t: shape \(2,\) here, \(3,\) in the checkpoint"):
        shardckpt.load(tmp_path / "ck", {"p": PerRank({"t": torch.zeros(2)})})
    with pytest.raises(StateMismatchError, match=r"p: a dict here|p: one value for all ranks here"):
        shardckpt.load(tmp_path / "ck", {"p": {"t": torch.zeros(3)}})


def test_places_that_the_live_state_lacks(tmp_path):
    """A mark that is gone is a difference like any other; a new container is no place for everybody's values."""
    shardckpt.save({"top": PerRank(1), "in": {"own": PerRank(2), "n": 3}, "list": [PerRank(4)]}, tmp_path / "ck")
    live: dict[str, Any] = {"in": {"n": 0}, "list": []}
    with pytest.raises(
        StateMismatchError, match="  in.own: nothing here, a value of rank 0 in the checkpoint\n  list.0: one value"
    ):
        shardckpt.load(tmp_path / "ck", live)
    assert live == {"in": {"n": 0}, "list": []}
    live["list"] = [PerRank(0)]
    report = shardckpt.load(tmp_path / "ck", live, strict=False)
    assert report.mismatched == ["in.own: nothing here, a value of rank 0 in the checkpoint"]
    assert (report.unexpected, report.skipped, report.per_rank) == ([], ["top"], {})
    assert live["in"] == {"n": 3}
    assert live["list"][0].value == 4
    with pytest.raises(StateMismatchError, match=r"missing from the checkpoint: in\.new"):
        shardckpt.load(tmp_path / "ck", {"in": {"own": PerRank(0), "n": 0, "new": PerRank(0)}})


HEAD = TensorHead("float32", (1,))
ENTRY = ObjectEntry(f"objects-{'0' * 12}.pkl", 0, 1, "0" * 16)


def test_ranks_that_disagree_about_a_name():
    """What one rank calls its own no other may have for something else: both are named, and nothing is committed."""
    base = committed([flat({"p": PerRank(0)}), flat({"p": PerRank(1)}, rank=1)])
    with pytest.raises(ConflictingStateError, match="'p' is a PerRank on rank 1, but another value on a rank below"):
        commit.with_values(msgspec.structs.replace(base, state={"p": 5}), {0: None, 1: RankValues({"p": 1})})
    with pytest.raises(ConflictingStateError, match="'o' is the name of a value by rank of rank 0"):
        taken = msgspec.structs.replace(base, objects={"o": ENTRY})
        commit.with_values(taken, {0: RankValues({"p": {"$object": "o"}}, objects={"o": ENTRY})})
    with pytest.raises(UsageError, match=r"'p\.rank-0' is the name of a value by rank and of another"):
        flat({"p": PerRank(torch.ones(1)), "p.rank-0": torch.ones(1)})


def hostile(per_rank: dict[str, dict[int, Any]], state: Any) -> Manifest:
    return msgspec.structs.replace(committed([flat({"x": 1})] * 2), per_rank=per_rank, state=state)


@pytest.mark.parametrize(
    ("per_rank", "state", "named"),
    [
        ({}, {"a": {"$per_rank": "p"}}, "no such place"),
        ({"p": {0: 1}}, {"a": {"$per_rank": ["p"]}}, "no such place"),
        ({"p": {0: 1}}, {"a": 1}, "stands nowhere in the state"),
        ({"p": {0: 1}}, [{"$per_rank": "p"}, {"$per_rank": "p"}], "stand in the state twice"),
        ({"p": {0: [{"$per_rank": "p"}] * 2}}, {"$per_rank": "p"}, "twice, or within others"),
        ({"p": {0: {"$per_rank": "q"}}, "q": {0: 1}}, {"$per_rank": "p"}, "twice, or within others"),
        ({"p": {0: {"$tensor": "none"}}}, {"$per_rank": "p"}, "at 'rank-0', which means nothing"),
        ({"p": {1: {"$what": 1}}}, {"a": {"$per_rank": "p"}}, "at 'a.rank-1'"),
    ],
    ids=str,
)
def test_impossible_places_are_refused(per_rank, state, named):
    """A manifest cannot send us in circles, or hide values, through what differs by rank."""
    with pytest.raises(CorruptCheckpointError, match=named):
        check_skeleton(hostile(per_rank, state), "here")


def test_deep_values_by_rank_are_refused():
    """Containers around a mark and in it count together: restoring goes through both."""
    deep: Any = 1
    for _ in range(MAX_DEPTH // 2):
        deep = [deep]
    state: Any = {"$per_rank": "p"}
    for _ in range(MAX_DEPTH // 2 + 1):
        state = [state]
    check_skeleton(hostile({"p": {0: deep}}, [{"$per_rank": "p"}]), "here")
    with pytest.raises(CorruptCheckpointError, match="nested deeper"):
        check_skeleton(hostile({"p": {0: deep}}, state), "here")


def test_a_prefix_and_a_key_map_find_values_by_rank(tmp_path):
    """A marked value moves as a whole; what restores itself gets it at its own new place, and nothing else changes."""

    class Sampler:
        def __init__(self, position):
            self.position = PerRank(position)

        def state_dict(self):
            return {"at": {"x": self.position}}

        def load_state_dict(self, state_dict):
            self.position = state_dict["at"]["x"]

    own = {"t": torch.arange(3), "l": [1, {"k": torch.ones(2)}]}
    saved = {"rng": PerRank(own), "sampler": Sampler(4), "list": [PerRank(5)], "epoch": 6}
    shardckpt.save({"trainer": saved, "rng": PerRank(0), "seed": 0}, tmp_path / "ck")
    tensor = torch.zeros(3, dtype=torch.int64)
    live = {"seed": PerRank({"t": tensor, "l": [0, {"k": torch.zeros(2)}]}), "rng": Sampler(0), "list": [PerRank(0)]}
    names = {"rng": "seed", "sampler": "rng"}
    report = shardckpt.load(tmp_path / "ck", live, prefix="trainer", key_map=names)
    assert live["seed"].value["t"] is tensor
    assert repr(live["seed"].value) == repr(own)
    assert (live["rng"].position.value, live["list"][0].value) == (4, 5)
    assert report.skipped == ["epoch"]
    made = shardckpt.load(tmp_path / "ck", prefix="trainer", key_map=names)
    assert repr(made) == repr({"seed": [own], "rng": {"at": {"x": [4]}}, "list": [[5]], "epoch": 6})


@pytest.mark.parametrize("first", ("model", "optimizer"))
def test_an_optimizer_over_what_differs_by_rank_belongs_to_it(tmp_path, first):
    """Outside of the mark its state would be one rank's, or pieces of several ranks' put together, for all."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    state = {"model": PerRank(model), "optimizer": optimizer}
    with pytest.raises(UsageError, match=r"'optimizer' is over 'model\.rank-0\.weight', which differs by rank"):
        flat({key: state[key] for key in sorted(state, key=lambda key: key != first)})
    flat({"both": PerRank({"model": model, "optimizer": optimizer})})
    flat({"model": model, "copy": PerRank(model), "optimizer": optimizer})


def test_a_set_key_or_object_is_no_place_for_a_mark():
    """Where a mark could not be found again it is refused, not pickled with what is around it."""
    with pytest.raises(UsageError, match=r"'a\.rank-2\.0' lies within another PerRank"):
        flat({"a": PerRank([PerRank(1)])}, rank=2)
    for state in ({"a": {PerRank(1)}}, {"a": {PerRank(1): 1}}, {"a": deque([{"b": PerRank(1)}])}):
        with pytest.raises(shardckpt.UnserialisableError, match="'a'"):
            flat(state)
