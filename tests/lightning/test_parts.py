"""The adapter's parts by themselves: dicts that read lazily, and what tells a save from the one before."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shardckpt.lightning.lazy import LazyDict
from shardckpt.lightning.snapshot import Produced, fingerprint, layout_of, share_of, split_off
from shardckpt.state import ModuleState, OptimizerState

CONTENTS = {"a": 1, "b": 2}


def as_arguments(**arguments: int) -> dict[str, int]:
    return arguments


def lazy() -> tuple[LazyDict, list[int]]:
    reads: list[int] = []

    def read() -> Mapping[str, int]:
        reads.append(1)
        return CONTENTS

    made = LazyDict()
    made.read_with(read)
    return made, reads


@pytest.mark.parametrize(
    "look",
    [
        lambda d: d["a"] == 1,
        lambda d: dict(d) == CONTENTS,
        lambda d: {**d} == CONTENTS,
        lambda d: as_arguments(**d) == CONTENTS,
        lambda d: OrderedDict(d) == CONTENTS,
        lambda d: list(d) == ["a", "b"],
        lambda d: list(reversed(d)) == ["b", "a"],
        lambda d: len(d) == 2,
        bool,
        lambda d: "a" in d,
        lambda d: list(d.keys()) == ["a", "b"],
        lambda d: list(d.values()) == [1, 2],
        lambda d: list(d.items()) == [("a", 1), ("b", 2)],
        lambda d: d.get("b") == 2,
        lambda d: d.pop("b") == 2,
        lambda d: d.popitem() == ("b", 2),
        lambda d: d.setdefault("a", 9) == 1,
        lambda d: d.copy() == CONTENTS,
        lambda d: copy.copy(d) == CONTENTS,
        lambda d: copy.deepcopy(d) == CONTENTS,
        lambda d: pickle.loads(pickle.dumps(d)) == CONTENTS,
        lambda d: (d | {"c": 3}) == {**CONTENTS, "c": 3},
        lambda d: ({"c": 3} | d) == {**CONTENTS, "c": 3},
        lambda d: {"c": 3}.update(d) is None,
        lambda d: d == CONTENTS,
        lambda d: not d != CONTENTS,  # noqa: SIM202 - both operators are under test
        lambda d: d.update(c=3) is None and d["a"] == 1,
        lambda d: d.__setitem__("a", 9) is None and dict(d) == {"a": 9, "b": 2},
        lambda d: d.__delitem__("a") is None and dict(d) == {"b": 2},
    ],
)
def test_looking_at_a_lazy_dict_fills_it(look: Callable[[Any], bool]) -> None:
    """Whatever a hook does to see or change the contents, it meets the contents, read once."""
    made, reads = lazy()
    assert made.is_untouched
    assert look(made)
    assert not made.is_untouched
    assert len(made) >= 1
    assert reads == [1]


def test_passing_a_lazy_dict_on_does_not_fill_it() -> None:
    """Storing it, asking its type and printing it read nothing: a log line must not cost a checkpoint's worth of it."""
    made, reads = lazy()
    holder = {"state_dict": made}
    assert isinstance(holder["state_dict"], dict)
    assert "not read yet" in repr(holder)
    assert reads == []


def test_a_failed_read_can_be_repeated() -> None:
    """An error of the storage leaves the dict as it was, so that it is not taken for an empty one afterwards."""
    answers: list[Any] = [OSError("first"), CONTENTS]

    def read() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    made = LazyDict()
    made.read_with(read)
    with pytest.raises(OSError, match="first"):
        len(made)
    assert made == CONTENTS


def job() -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any], Produced]:
    module = nn.Sequential(nn.Linear(70, 70), nn.BatchNorm1d(70))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(4, 70)).sum().backward()
    optimizer.step()
    produced = Produced()
    checkpoint = {
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {"x": {"best": torch.tensor(1.0), "seen": np.arange(3)}},
        "epoch": 1,
    }
    produced.module(ModuleState(module, checkpoint["state_dict"]))
    produced.optimizer(OptimizerState(optimizer, checkpoint["optimizer_states"][0], {"state_dict": module}))
    return module, optimizer, checkpoint, produced


@pytest.mark.parametrize(
    "change",
    [
        lambda m, o, c: m[0].weight.data.add_(1),
        lambda m, o, c: m[0].weight.detach().numpy().__iadd__(1),
        lambda m, o, c: m[0].bias.data.mul_(2),
        lambda m, o, c: o.state[m[0].weight]["exp_avg"].data.add_(1),
        lambda m, o, c: o.state[m[0].weight]["step"].data.add_(1),
        lambda m, o, c: c["callbacks"]["x"].update(best=torch.tensor(2.0)),
        lambda m, o, c: c["callbacks"]["x"]["seen"].__iadd__(1),
        lambda m, o, c: c.update(new=torch.zeros(1)),
        lambda m, o, c: c.pop("optimizer_states"),
    ],
)
def test_every_change_of_a_tensor_changes_the_fingerprint(change: Callable[..., Any]) -> None:
    """A change that bumps no version counter (``.data``, numpy, fused optimizers) is seen, or a save would lose it."""
    module, optimizer, checkpoint, _ = job()
    before = fingerprint(checkpoint, 0)
    checkpoint["epoch"] = 2
    assert fingerprint(checkpoint, 0) == before
    assert fingerprint(checkpoint, 1) != before
    change(module, optimizer, checkpoint)
    assert fingerprint(checkpoint, 0) != before


def test_unknown_tensors_have_no_fingerprint() -> None:
    """A tensor whose memory cannot be looked at is never taken for unchanged."""
    assert fingerprint({"w": torch.eye(3).to_sparse()}, 0) is None


def test_what_the_strategy_made_stands_for_the_live_state() -> None:
    """Untouched state dicts become the module's and the optimizers' state, for all ranks; the rest is rank 0's."""
    _, _, checkpoint, produced = job()
    state = split_off(checkpoint, produced)
    assert isinstance(state["state_dict"], ModuleState)
    assert isinstance(state["optimizer_states"][0], OptimizerState)
    assert layout_of(state) == {"state_dict": None, "optimizer_states": [0]}
    share = share_of(state, layout_of(state), with_buffers=False)
    assert set(share) == {"state_dict", "optimizer_states"}
    assert set(share["state_dict"].state_dict) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert share_of(state, {"state_dict": None}, with_buffers=True)["state_dict"].state_dict.keys() >= {"1.running_var"}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(state_dict=dict(c["state_dict"])),
        lambda c: c["state_dict"].update({"0.weight": torch.zeros(70, 70)}),
        lambda c: c["state_dict"].update({"0.weight": c["state_dict"]["0.weight"].half()}),
    ],
)
def test_what_a_hook_made_is_saved_as_it_is(change: Callable[[Any], Any]) -> None:
    """A state dict that a hook replaced, or put other tensors into, is rank 0's word, for it may differ by rank."""
    _, _, checkpoint, produced = job()
    change(checkpoint)
    state = split_off(checkpoint, produced)
    assert state["state_dict"] is checkpoint["state_dict"]
    assert layout_of(state) == {"optimizer_states": [0]}
