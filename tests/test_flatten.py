"""Flattening: names, skeleton and digests of a state, without copying or changing anything."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from shardckpt.state import Flattened, ModuleState, OptimizerState, flatten, merge, parameter_names


def flat(state: Any, *, replicated: bool | Sequence[str] = False, **options: Any) -> Flattened:
    include, exclude = options.get("include"), options.get("exclude")
    return flatten(state, replicated=replicated, include=include, exclude=exclude, rank=options.get("rank", 0))


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_names_are_the_places_of_tensors():
    """A tensor is called by its path; optimizer state by the name of its parameter."""
    model, optimizer = stepped()
    tensors = flat({"model": model, "opt": optimizer, "x": [torch.ones(1), {2: torch.ones(1)}]}).tensors
    assert {"model.0.weight", "model.1.running_mean", "x.0", "x.1.2"} < tensors.keys()
    assert {"opt.state.model.0.weight.exp_avg", "opt.state.model.1.bias.step"} < tensors.keys()


def test_tensors_are_views_not_copies():
    """Flattening costs no memory: every view is the live tensor's own memory."""
    model, optimizer = stepped()
    live = {*(t.data_ptr() for t in model.state_dict().values())}
    live |= {t.data_ptr() for state in optimizer.state.values() for t in state.values()}
    leaves = flat({"model": model, "opt": optimizer}).tensors.values()
    assert {view.data_ptr() for leaf in leaves for view in leaf.views} == live
    assert not any(view.requires_grad for leaf in leaves for view in leaf.views)


def test_what_may_be_split_over_ranks():
    """Parameters and optimizer state are equal on all ranks; buffers and loose tensors only if declared so."""
    model, optimizer = stepped()
    state = {"model": model, "opt": optimizer, "loose": torch.ones(1), "ema": {"w": torch.zeros(1)}}

    def split(**options: Any) -> set[str]:
        return {name for name, leaf in flat(state, **options).tensors.items() if leaf.split}

    everything = set(flat(state).tensors)
    loose = {"loose", "ema.w", "model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked"}
    assert split() == everything - loose
    assert split(replicated=["ema.*"]) == everything - loose | {"ema.w"}
    assert split(replicated=True) == everything


def test_digests_of_structure():
    """The structure is equal while a plan stays good, the outline while the places do; values are part of neither."""

    def digests(state: Any) -> tuple[str, str]:
        flattened = flat(state)
        return flattened.structure, flattened.outline

    shared = torch.zeros(2)
    base = digests({"a": torch.ones(2), "b": torch.ones(2), "n": 1})
    assert digests({"a": torch.zeros(2), "b": torch.zeros(2), "n": 2}) == base
    assert digests({"a": torch.zeros(3), "b": torch.zeros(2), "n": 2})[0] != base[0]
    assert digests({"a": torch.zeros(3), "b": torch.zeros(2), "n": 2})[1] == base[1]
    assert digests({"a": torch.zeros(2).double(), "b": torch.zeros(2), "n": 2})[0] != base[0]
    assert digests({"a": shared, "b": shared, "n": 1})[0] != base[0]
    assert digests({"a": torch.ones(2), "b": torch.ones(2), "n": 1, "m": 1})[1] != base[1]
    assert digests({"a": torch.ones(2), "b": torch.ones(2), "n": [1]})[1] != base[1]


def test_states_that_somebody_took_already():
    """A ModuleState and an OptimizerState have the names, and the splitting, of the live objects."""
    model, optimizer = stepped()
    taken = {
        "model": ModuleState(model, model.state_dict()),
        "opt": OptimizerState(optimizer, optimizer.state_dict()),
    }
    expected = flat({"model": model, "opt": optimizer})
    found = flat(taken)
    assert found.skeleton == expected.skeleton
    assert found.structure == expected.structure
    alone = OptimizerState(optimizer, optimizer.state_dict(), {"model": model})
    assert flat({"opt": alone}).skeleton["opt"] == expected.skeleton["opt"]


def test_parameter_names_of_shared_and_nested_modules():
    """The first name of a parameter counts, and different parameters never have one name."""
    inner = nn.Linear(1, 1)
    state = {"a": nn.ModuleDict({"x": inner, "y": inner}), "b": [inner, nn.Linear(1, 1)], "a.x": nn.Linear(1, 1)}
    names = parameter_names(state)
    assert names[id(inner.weight)] == "a.x.weight"
    assert names[id(state["b"][1].weight)] == "b.1.weight"
    assert names[id(state["a.x"].weight)] == "a.x.weight~2"
    assert len(set(names.values())) == len(names) == 6


def optimizer(*options, params):
    """The node of an optimizer without state; the names of each group's parameters are separated by spaces."""
    groups = [{"params": names.split(), "options": own} for names, own in zip(params, options, strict=True)]
    return {"$optimizer": {"state": {}, "param_groups": groups}}


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ({"a": 1}, {"a": 2, "b": 3}, {"a": 1, "b": 3}),
        ({"$dict": [[0, "x"]]}, {"$dict": [[1, "y"]]}, {"$dict": [[0, "x"], [1, "y"]]}),
        ({}, {"$dict": [[1, "y"]]}, {"$dict": [[1, "y"]]}),
        ({"$dict": [[1, "y"]]}, {"k": 2}, {"$dict": [[1, "y"], ["k", 2]]}),
        ([{"$tensor": "a"}], [{"$tensor": "a"}, {"$tensor": "b"}], [{"$tensor": "a"}, {"$tensor": "b"}]),
        ([1], [1, 2], [1]),
        ([1], [1, {"$per_rank": "1"}], [1, {"$per_rank": "1"}]),
        ({"$tuple": [{"a": 1}]}, {"$tuple": [{"b": 2}]}, {"$tuple": [{"a": 1, "b": 2}]}),
        ({"$set": [1]}, {"$set": [2]}, {"$set": [1]}),
        ({"$int": "1"}, {"$float": "nan"}, {"$int": "1"}),
        (
            {"$optimizer": {"state": {"a": {}}, "param_groups": [{"params": ["a"], "options": {"lr": 1}}]}},
            {"$optimizer": {"state": {"b": {}}, "param_groups": [{"params": ["b"], "options": {"lr": 1}}]}},
            {"$optimizer": {"state": {"a": {}, "b": {}}, "param_groups": [
                {"params": ["a", "b"], "options": {"lr": 1}}
            ]}},
        ),
        (
            optimizer({"lr": 1}, {"lr": 2}, {"lr": 2}, params=["a", "b", "c"]),
            optimizer({"lr": 2}, {"lr": 1}, {"lr": 2}, {"lr": 3}, params=["d", "e", "f", "a"]),
            optimizer({"lr": 1}, {"lr": 2}, {"lr": 2}, params=["a e", "b d", "c f"]),
        ),
        (
            optimizer({"lr": 1, "param_names": ["x"]}, params=["a"]),
            optimizer({"lr": 1, "param_names": ["y", "z"]}, {"lr": 2, "param_names": ["w"]}, params=["a b", "c"]),
            optimizer({"lr": 1, "param_names": ["x", "z"]}, {"lr": 2, "param_names": ["w"]}, params=["a b", "c"]),
        ),
        (
            optimizer({"lr": 1}, params=["a"]),
            optimizer({"lr": 1}, {"lr": 2}, params=["b", ""]),
            optimizer({"lr": 1}, {"lr": 2}, params=["a b", ""]),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_skeletons_of_ranks_merge(first, second, merged):
    """Everything of the lowest rank, and of the others the places that it lacks: pipeline stages, uneven lists."""
    assert merge(first, second) == merged
