"""What is kept between two saves of one structure: only what follows from the structure, and never a value."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import Checkpointer, PerRank, planner
from shardckpt.options import SaveOptions
from shardckpt.saving import entries, structure

State = dict[str, Any]


def _state() -> State:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "loose": torch.arange(5.0),
        "own": PerRank({"rng": torch.arange(4, dtype=torch.uint8), "at": 1}),
        "step": 1,
    }


def _in_place(state: State) -> None:
    state["model"][0].weight.data.add_(1)
    state["own"].value["rng"].add_(1)


def _data_replaced(state: State) -> None:
    state["model"][0].weight.data = torch.full((4, 3), 7.0)


def _new_parameter(state: State) -> None:
    state["model"][0].weight = nn.Parameter(torch.full((4, 3), 8.0))


def _tied(state: State) -> None:
    state["model"][1].bias = state["model"][2].bias


def _another_shape(state: State) -> None:
    state["loose"] = torch.arange(7.0)


def _another_dtype(state: State) -> None:
    state["loose"] = state["loose"].to(torch.bfloat16)


def _transposed(state: State) -> None:
    state["model"][1].weight.data = torch.arange(12.0).view(4, 3).t()


def _plain_values(state: State) -> None:
    state["step"] = 2
    state["optimizer"].param_groups[0]["lr"] = 0.25
    state["own"].value["at"] = 2


def _optimizer_state_replaced(state: State) -> None:
    kept = state["optimizer"].state[state["model"][0].weight]
    kept["exp_avg"] = torch.full_like(kept["exp_avg"], 9)


def _hook(state: State) -> None:
    def doubled(module: nn.Module, found: State, prefix: str, local: State) -> None:
        found[f"{prefix}0.weight"] = found[f"{prefix}0.weight"] * 2

    state["model"].register_state_dict_post_hook(doubled)


def _own_grows(state: State) -> None:
    state["own"].value["rng"] = torch.arange(9, dtype=torch.uint8)


def _own_goes(state: State) -> None:
    state["own"].value = {"at": 3}


def _key_renamed(state: State) -> None:
    state["renamed"] = state.pop("loose")


CHANGES = [
    _in_place,
    _data_replaced,
    _new_parameter,
    _tied,
    _another_shape,
    _another_dtype,
    _transposed,
    _plain_values,
    _optimizer_state_replaced,
    _hook,
    _own_grows,
    _own_goes,
    _key_renamed,
]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("change", CHANGES)
def test_a_second_save_holds_what_the_state_is_then(change: Callable[[State], None], tmp_path: Path) -> None:
    """A stale tensor, name or value in a checkpoint loses training silently; another Checkpointer has kept nothing."""
    state, kept = _state(), Checkpointer()
    kept.save(state, tmp_path / "first")
    kept.save(state, tmp_path / "again")
    change(state)
    kept.save(state, tmp_path / "kept")
    Checkpointer().save(state, tmp_path / "anew")
    saved, expected = shardckpt.load(tmp_path / "kept"), shardckpt.load(tmp_path / "anew")
    assert _same(saved, expected)
    assert not _same(saved, shardckpt.load(tmp_path / "first"))
    assert _same(saved["model"]["0.weight"], state["model"].state_dict()["0.weight"])


def test_untied_weights_are_two(tmp_path: Path) -> None:
    """Of weights that are no longer tied each has its own values, though structure and addresses may seem the same."""
    weight = torch.ones(4)
    state: State = {"a": weight, "b": weight}
    kept = Checkpointer()
    kept.save(state, tmp_path / "1")
    state["b"] = torch.zeros(4)
    kept.save(state, tmp_path / "2")
    found = shardckpt.load(tmp_path / "2")
    assert found["a"].tolist() == [1] * 4
    assert found["b"].tolist() == [0] * 4


def test_another_selection_is_another_structure(tmp_path: Path) -> None:
    """Options may change from save to save, and what they select with them."""
    state, kept = {"a": torch.ones(2), "b": torch.zeros(2)}, Checkpointer()
    kept.save(state, tmp_path / "1")
    kept.save(state, tmp_path / "2", save_options=SaveOptions.of(None, False, None, ["a"], None))
    assert set(shardckpt.load(tmp_path / "2")) == {"b"}


@pytest.fixture
def calls() -> Iterator[dict[str, mock.Mock]]:
    """Counts of what depends on the structure alone."""
    with (
        mock.patch.object(structure, "plan_save", side_effect=planner.plan_save) as plan,
        mock.patch.object(entries, "entry_key", side_effect=entries.entry_key) as key,
        mock.patch.object(entries, "listed_of", side_effect=entries.listed_of) as listed,
    ):
        yield {"plan": plan, "key": key, "listed": listed}


def test_a_save_of_the_same_structure_reuses_what_follows_from_it(calls: dict[str, mock.Mock], tmp_path: Path) -> None:
    """Planning 20,000 tensors takes a third of a second, for which training would wait at each save."""
    state, kept = _state(), Checkpointer()
    kept.save(state, tmp_path / "1")
    counts = {name: call.call_count for name, call in calls.items()}
    assert all(counts.values())
    for change in (_in_place, _data_replaced, _optimizer_state_replaced, _plain_values):
        change(state)
        kept.save(state, tmp_path / change.__name__)
    assert {name: call.call_count for name, call in calls.items()} == counts
    _own_grows(state)
    kept.save(state, tmp_path / "own")
    assert calls["plan"].call_count == counts["plan"]
    assert calls["listed"].call_count == counts["listed"] + 1
