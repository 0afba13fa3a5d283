"""What lies in a directory after a crash, looked at by a process that knows nothing of it."""

import os
import time
from pathlib import Path
from typing import Any

import torch

import shardckpt
from crashes.scenarios import ABSENT, NEW, SCENARIOS, state_of, tensors
from shardckpt import Checkpointer, filenames
from shardckpt.storage import TEMP_PREFIX


def inspect(root: Path, name: str, claims: dict[int, str]) -> list[str]:
    """What is wrong in ``root`` after scenario ``name``, where ranks that survived made ``claims``."""
    wrong: list[str] = []
    scenario = SCENARIOS[name]
    places = {*os.listdir(root), "a", "b", "c", *scenario.may}
    found = {place: value_at(root / place, wrong) for place in sorted(places)}
    for place, value in found.items():
        may = scenario.may.get(place, ({"a": 1, "b": 2}.get(place, ABSENT),))
        if value not in may:
            wrong.append(f"{place} holds {value}, and may hold {may}")
        if scenario.saves and "ok" in claims.values() and value != may[-1] is not ABSENT:
            wrong.append(f"a rank was told that all is well, but {place} holds {value}")
        first = next(iter(scenario.may)) if scenario.may else ""
        certain = any(claim in ("SaveFailedError", "RankTimeoutError") for claim in claims.values())
        if name in ("save", "overwrite", "compressed") and place == first and certain and value == NEW:
            wrong.append(f"a rank was told that nothing was committed, but {place} holds {value}: {claims}")
    if name == "replace" and found["b"] is ABSENT and found["c"] is ABSENT:
        wrong.append("the old one is gone and the new one is not there")
    newest = shardckpt.latest(root)
    order = [place for place in ("c", "b", "a") if found[place] == NEW] or ["b", "a"]
    if newest is None or Path(newest).name not in order or value_at(Path(newest), wrong) is ABSENT:
        wrong.append(f"the newest is said to be {newest}")
    _check_rubbish(root, wrong)
    _check_next_save(root, wrong)
    return wrong


def value_at(place: Path, wrong: list[str]) -> int | None:
    """Of which state the checkpoint at ``place`` is, bit for bit; `ABSENT` where it says itself that there is none."""
    try:
        loaded: Any = shardckpt.load(place)
    except shardckpt.CheckpointNotFoundError:
        if shardckpt.is_checkpoint(place):
            wrong.append(f"{place.name} is offered and cannot be found")
        return ABSENT
    except Exception as error:  # noqa: BLE001 - whatever it is, it is wrong
        wrong.append(f"{place.name} cannot be loaded: {type(error).__name__}: {error}")
        return ABSENT
    value = int(loaded["value"])
    for name, tensor in tensors(value).items():
        if not torch.equal(loaded[name], tensor):
            wrong.append(f"{name} in {place.name} is not that of state {value}")
    return value


def _check_rubbish(root: Path, wrong: list[str]) -> None:
    """After `prune` a place has what its commit record names, and nothing else, and is gone where it has none."""
    for place in sorted(Path(folder) for folder, below, _ in os.walk(root) if not below):
        for path in place.glob(f"{TEMP_PREFIX}*"):  # which only an age tells from one that is being written
            os.utime(path, times=(time.time() - 3600,) * 2)
        Checkpointer().prune(place)
        if not shardckpt.is_checkpoint(place):
            if place.exists():
                wrong.append(f"{place.name} is no checkpoint, and has after a prune: {os.listdir(place)}")
            continue
        named = set(Checkpointer(alone=True).open(place).manifest.file_names())
        if left := set(os.listdir(place)) - named - {filenames.MANIFEST}:
            wrong.append(f"{place.name} has after a prune, named by nothing: {sorted(left)}")
        value_at(place, wrong)


def _check_next_save(root: Path, wrong: list[str]) -> None:
    for place in ("b", "c"):
        shardckpt.save(state_of(0, 7) | {"of1": tensors(7)["of1"]}, root / place)
        if value_at(root / place, wrong) != 7:
            wrong.append(f"what was saved to {place} afterwards is not there")
        if len(os.listdir(root / place)) != 3:
            wrong.append(f"what was saved to {place} afterwards has company: {os.listdir(root / place)}")
