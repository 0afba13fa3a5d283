"""What two ranks do when they are killed, what may lie there afterwards, and what must.

Before each there are the checkpoints ``a`` and ``b`` in a directory, of the states 1 and 2.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import shardckpt
from shardckpt import Checkpointer

ABSENT = None
NEW = 5


def tensors(value: float) -> dict[str, torch.Tensor]:
    """Those of the state ``value``, by name: one that both ranks hold, and one of each."""
    return {
        "both": torch.arange(30_000, dtype=torch.float64) * value,
        "of0": torch.arange(20_011, dtype=torch.float32) + value,
        "of1": torch.arange(20_023, dtype=torch.float32) - value,
    }


def state_of(rank: int, value: float) -> dict[str, Any]:
    all_of_it = tensors(value)
    return {"both": all_of_it["both"], f"of{rank}": all_of_it[f"of{rank}"], "value": value, "odd": {1, 2}}


def _save(engine: Checkpointer, rank: int, root: str) -> None:
    engine.async_save(state_of(rank, NEW), f"{root}/c").result()


def _save_deep(engine: Checkpointer, rank: int, root: str) -> None:
    """Below directories that somebody has made who did not sync them, and others that have yet to be made."""
    if rank == 0:
        os.makedirs(f"{root}/deep/run")
    engine.async_save(state_of(rank, NEW), f"{root}/deep/run/few/c").result()


def _overwrite(engine: Checkpointer, rank: int, root: str) -> None:
    engine.async_save(state_of(rank, NEW), f"{root}/b").result()


def _compressed(engine: Checkpointer, rank: int, root: str) -> None:
    shardckpt.save(state_of(rank, NEW), f"{root}/b", compression="zstd")


def _replace(engine: Checkpointer, rank: int, root: str) -> None:
    """Lightning's order of events: the removal of the old one is asked for while the new one is in flight."""
    pending = engine.async_save(state_of(rank, NEW), f"{root}/c")
    if rank == 0:
        engine.remove(f"{root}/b")
    pending.result()
    engine.wait()


def _alias(engine: Checkpointer, rank: int, root: str) -> None:
    """Lightning's ``last`` beside a ``save_top_k``: the second shares the shards of the first."""
    engine.async_save(state_of(rank, NEW), f"{root}/c", state_version=1)
    engine.async_save(state_of(rank, NEW), f"{root}/b", state_version=1)
    engine.wait()


def _remove(engine: Checkpointer, rank: int, root: str) -> None:
    if rank == 0:
        engine.remove(f"{root}/b")


def _prune(engine: Checkpointer, rank: int, root: str) -> None:
    if rank == 0:
        engine.prune(f"{root}/b")
        engine.prune(f"{root}/rubbish")


def _load(engine: Checkpointer, rank: int, root: str) -> None:
    state = state_of(rank, 0)
    engine.load(f"{root}/b", state)
    assert state["value"] == 2
    for name, tensor in tensors(2).items():
        assert name not in state or torch.equal(state[name], tensor)


@dataclass(frozen=True)
class Scenario:
    act: Callable[[Checkpointer, int, str], None]
    may: dict[str, tuple[int | None, ...]]
    """By checkpoint: of which state it may be afterwards, the one it ends with last; `ABSENT` if it may be no more."""
    saves: bool = True
    """Whether all ranks learn whether what they did was done."""


SCENARIOS = {
    "save": Scenario(_save, {"c": (ABSENT, NEW)}),
    "deep": Scenario(_save_deep, {"deep/run/few/c": (ABSENT, NEW)}),
    "overwrite": Scenario(_overwrite, {"b": (2, NEW)}),
    "compressed": Scenario(_compressed, {"b": (2, NEW)}),
    "replace": Scenario(_replace, {"b": (2, ABSENT), "c": (ABSENT, NEW)}),
    "alias": Scenario(_alias, {"b": (2, NEW), "c": (ABSENT, NEW)}),
    "remove": Scenario(_remove, {"b": (2, ABSENT)}, saves=False),
    "prune": Scenario(_prune, {}, saves=False),
    "load": Scenario(_load, {}, saves=False),
}
