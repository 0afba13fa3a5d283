"""Containers of a live state: kept, updated in place, and compared with what was saved."""

import collections
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import StateMismatchError


def reload(tmp_path: Any, saved: Any, live: Any, **options: Any) -> Any:
    shardckpt.save(saved, tmp_path / "ck")
    return shardckpt.load(tmp_path / "ck", live, **options)


def test_containers_keep_their_identity(tmp_path):
    """Whoever holds a reference to a dict or list of the state sees it restored."""
    live: dict[str, Any] = {
        "dict": {"inner": {"x": 0}},
        "list": [1, [2]],
        "longer": [1, 2, 3],
        "shorter": [],
        "counter": collections.Counter("ab"),
        "default": collections.defaultdict(list),
        "ordered": collections.OrderedDict(a=1),
    }
    saved = {
        "dict": {"inner": {"x": 1, "y": 2}},
        "list": [3, [4]],
        "longer": [5],
        "shorter": [6, 7],
        "counter": collections.Counter("bbb"),
        "default": collections.defaultdict(list, {"k": [1]}),
        "ordered": collections.OrderedDict(b=1, a=2),
    }
    held = dict(live) | {"inner": live["dict"]["inner"], "second": live["list"][1]}
    reload(tmp_path, saved, live)
    assert {key: dict(v) if isinstance(v, dict) else v for key, v in live.items()} == {
        key: dict(v) if isinstance(v, dict) else v for key, v in saved.items()
    }
    assert all(live[key] is held[key] for key in live)
    assert live["dict"]["inner"] is held["inner"]
    assert live["list"][1] is held["second"]


def test_plain_values_are_replaced_whatever_they_were(tmp_path):
    """A plain value becomes what was saved, of any type: None a tensor, a list a dict, a dict nothing."""
    live: dict[str, Any] = {
        "a": 1,
        "b": None,
        "c": [1],
        "d": {"x": 1},
        "e": (1, 2),
        "f": [1, 2],
        "g": (1,),
        "h": {1: 2},
    }
    saved = {
        "a": "text", "b": torch.ones(2), "c": {"k": torch.ones(1)}, "d": None, "e": [1, 2], "f": (3, 4), "g": (1, 2),
        "h": {3: torch.zeros(1)},
    }  # fmt: skip
    reload(tmp_path, saved, live)
    assert live.pop("b").tolist() == [1, 1]
    assert live["c"]["k"].item() == 1
    assert live["h"][3].item() == 0
    assert list(live["h"]) == [3]
    assert {key: live[key] for key in "adefg"} == {"a": "text", "d": None, "e": [1, 2], "f": (3, 4), "g": (1, 2)}


def test_a_nested_dict_of_plain_values_forgets_what_was_not_saved(tmp_path):
    """Going back to an older checkpoint in a running job: statistics that came since are gone, and no error."""
    live = {"seen": {"a": 5, "later": 1}, "model": {"w": torch.zeros(1), "n": 0}}
    seen = live["seen"]
    report = reload(tmp_path, {"seen": {"a": 3}, "model": {"w": torch.ones(1), "n": 1}}, live)
    assert live["seen"] is seen
    assert seen == {"a": 3}
    assert not report.missing


def test_top_level_keys(tmp_path):
    """What only the checkpoint has is skipped and reported; what only the live state has is missing."""
    saved = {"model": torch.ones(2), "optimizer": {"m": torch.ones(2)}, "step": 3}
    live = {"model": torch.zeros(2)}
    report = reload(tmp_path, saved, live)
    assert report.skipped == ["optimizer", "step"]
    assert report.restored == ["model"]
    assert live["model"].tolist() == [1, 1]
    live = {"model": torch.zeros(2), "step": 0, "epoch": 0}
    with pytest.raises(StateMismatchError, match="missing from the checkpoint: epoch"):
        shardckpt.load(tmp_path / "ck", live)
    assert live["step"] == 0
    assert live["model"].tolist() == [0, 0]
    report = shardckpt.load(tmp_path / "ck", live, strict=False)
    assert report.missing == ["epoch"]
    assert live["step"] == 3
    report = shardckpt.load(tmp_path / "ck", {})
    assert report.skipped == ["model", "optimizer", "step"]
    (word,) = (tmp_path / "ck").glob("rank-*.json")
    assert report.bytes_read == word.stat().st_size  # which the plain values are held against, and no tensor


def test_nested_tensors_are_not_lost_in_silence(tmp_path):
    """Below the top, a tensor that only one side has is a difference; plain values come along."""
    saved = {"m": {"w": torch.ones(1), "extra": torch.ones(1), "note": "n"}}
    live = {"m": {"w": torch.zeros(1)}}
    with pytest.raises(StateMismatchError, match=r"in the checkpoint only: m\.extra"):
        reload(tmp_path, saved, live)
    assert live["m"]["w"].item() == 0
    assert "note" not in live["m"]
    report = shardckpt.load(tmp_path / "ck", live, strict=False)
    assert report.unexpected == ["m.extra"]
    assert live["m"]["w"].item() == 1
    assert live["m"]["note"] == "n"


@pytest.mark.parametrize(
    ("saved", "live", "message"),
    [
        ([torch.ones(1)], [torch.zeros(1), torch.zeros(1)], "x: 2 items here, 1 in the checkpoint"),
        ([[torch.ones(1)]], [[torch.zeros(1), torch.zeros(1)]], r"x\.0: 2 items here, 1"),
        ((1, 2, 3), (torch.zeros(1), 2), "x: 2 items here, 3"),
        ("no list", [torch.zeros(1)], "x: 1 items here, no list"),
        ({"k": 1}, [nn.Linear(1, 1)], "x: 1 items here, no list"),
        (5, {"k": torch.zeros(1)}, "x: a dict here, something else"),
        ([1], nn.Linear(1, 1), "x: a module here, something else"),
        ({"k": 1}, torch.optim.SGD([nn.Parameter(torch.ones(1))]), "x: an optimizer here, something else"),
        (torch.eye(2).to_sparse(), torch.zeros(2, 2), "x: a tensor here, but a sparse tensor"),
        (range(3), torch.zeros(2, 2), "x: a tensor here, but a pickled object"),
        (5, torch.zeros(2, 2), "x: a tensor here, but a plain value"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds_that_do_not_match(tmp_path, saved, live, message):
    """Something live never becomes something else: strict says what, and strict=False leaves it alone."""
    state = {"x": live, "n": 0}
    with pytest.raises(StateMismatchError, match=message):
        reload(tmp_path, {"x": saved, "n": 1}, state)
    assert state == {"x": live, "n": 0}
    report = shardckpt.load(tmp_path / "ck", state, strict=False)
    assert len(report.mismatched) == 1
    assert state["x"] is live
    assert state["n"] == 1


def test_lists_and_tuples_of_live_things(tmp_path):
    """Tensors in sequences are filled in place, in a list saved as a tuple too."""
    first, second, third = torch.zeros(2), torch.zeros(()), nn.Linear(1, 1)
    live: dict[str, Any] = {"list": [first, 0], "tuple": (second, [third, "old"])}
    saved = {"list": (torch.ones(2), 5), "tuple": [torch.ones(()), [nn.Linear(1, 1), "new"]]}
    reload(tmp_path, saved, live)
    assert live["list"][0] is first
    assert first.tolist() == [1, 1]
    assert live["list"][1] == 5
    assert live["tuple"][0] is second
    assert isinstance(live["tuple"], tuple)
    assert live["tuple"][1] == [third, "new"]
    assert torch.equal(third.weight, saved["tuple"][1][0].weight)


def test_the_report_says_what_happened(tmp_path):
    """Names, bytes and seconds of a load, and a repr that a person reads."""
    model = nn.Linear(64, 64)
    saved = shardckpt.save({"model": model, "n": 1}, tmp_path / "ck")
    report = shardckpt.load(tmp_path / "ck", {"model": nn.Linear(64, 64)})
    assert report.restored == ["model.weight", "model.bias"]
    assert (report.missing, report.unexpected, report.mismatched, report.skipped) == ([], [], [], ["n"])
    assert report.save_id == saved.save_id
    assert report.world_size == 1
    assert report.bytes_read >= model.weight.nbytes
    assert report.seconds > 0
    assert "2 tensor(s)" in repr(report)
    assert "skipped=['n']" in repr(report)


def test_only_what_is_restored_is_read(tmp_path):
    """Restoring a small part of a big checkpoint costs the small part."""
    shardckpt.save({"big": torch.zeros(8 << 20), "small": torch.ones(4)}, tmp_path / "ck")
    report = shardckpt.load(tmp_path / "ck", {"small": torch.zeros(4)})
    assert report.bytes_read < 3 << 20


def test_an_unhappy_loader_is_reported_as_a_partial_restore(tmp_path):
    """User code that raises after tensors were written: the message says that the state may be half restored."""

    class Unhappy:
        def state_dict(self) -> dict[str, Any]:
            return {"v": 1}

        def load_state_dict(self, _: Any) -> None:
            raise KeyError("not mine")

    with pytest.raises(shardckpt.LoadFailedError, match="partly restored"):
        reload(tmp_path, {"w": torch.ones(2), "u": Unhappy()}, {"w": torch.zeros(2), "u": Unhappy()})


def test_a_deep_state_and_a_cyclic_live_state(tmp_path):
    """A hundred containers deep works both ways; a live state that holds itself does not hang a load."""

    def deep(value: Any, depth: int) -> Any:
        for _ in range(depth):
            value = [value, {"k": (1,)}]
        return value

    live: dict[str, Any] = {"x": deep(torch.zeros(1), 90), "keys": {1: {2: {3: 0}}}}
    reload(tmp_path, {"x": deep(torch.ones(1), 90), "keys": {1: {2: {3: 4}}}}, live)
    item = live["x"]
    while isinstance(item, list):
        item = item[0]
    assert item.item() == 1
    cyclic: dict[str, Any] = {"x": {}, "keys": []}
    cyclic["x"]["again"] = cyclic
    cyclic["keys"].append(cyclic["keys"])
    shardckpt.load(tmp_path / "ck", cyclic, strict=False)


def test_a_sparse_tensor_is_not_replaced_by_another_kind(tmp_path):
    """A live sparse tensor takes a stored one of its layout and shape, and nothing else unasked."""
    dense, sparse = torch.eye(3), torch.eye(3).to_sparse()
    shardckpt.save({"a": dense, "b": sparse, "c": sparse}, tmp_path / "ck")
    live = {"a": sparse * 0, "b": sparse * 0, "c": torch.zeros(3, 4).to_sparse()}
    with pytest.raises(
        shardckpt.StateMismatchError, match=r"a: sparse_coo of shape \(3, 3\) here, no sparse"
    ) as caught:
        shardckpt.load(tmp_path / "ck", live)
    assert "c: sparse_coo of shape (3, 4) here, sparse_coo of shape (3, 3) in the checkpoint" in str(caught.value)
    assert "b:" not in str(caught.value)
    assert len(shardckpt.load(tmp_path / "ck", live, strict=False).mismatched) == 2
    assert torch.equal(live["b"].to_dense(), dense)
    assert live["a"].is_sparse


def test_a_load_that_finds_nothing_says_so(tmp_path, caplog):
    """With ``strict=False`` a mistyped key would otherwise train from scratch in silence."""
    shardckpt.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "ck")
    shardckpt.load(tmp_path / "ck", {"net": torch.nn.Linear(2, 2)}, strict=False)
    assert "no tensor was restored" in caplog.text
