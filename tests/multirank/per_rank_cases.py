"""What the ranks do in the tests of values that differ by rank. Runs in the processes of `ranks`."""

import json
import logging
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import shardckpt
from shardckpt import Checkpointer, PerRank
from shardckpt.saving import series


class Loader:
    """A data loader that knows where it is."""

    def __init__(self, position: int) -> None:
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class MarkingLoader(Loader):
    """One that marks by itself what differs by rank, and counts epochs that are the same everywhere."""

    def __init__(self, position: int, epoch: int) -> None:
        super().__init__(position)
        self.epoch = epoch
        self.resize: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "at": [PerRank(self.position, resize=self.resize)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["at"][0].value


def rng(rank: int) -> torch.Tensor:
    return torch.Generator().manual_seed(1000 + rank).get_state()


def state_of(rank: int) -> dict[str, Any]:
    """Values of every kind, of another shape and structure on each rank, and tensors that are inside and outside."""
    shared = torch.arange(6.0)
    own: dict[str, Any] = {"counts": torch.full((rank + 1, 2), rank), "empty": torch.empty(0, rank)}
    own |= {"history": [rank] * rank, "tied": own["counts"]} | ({"object": Fraction(1, rank)} if rank else {})
    return {
        "shared": shared,
        "model": torch.nn.Linear(3, 2, bias=False),
        "rng": PerRank(rng(rank)),
        "position": PerRank(100 + rank),
        "loader": MarkingLoader(200 + rank, 5),
        "whole": PerRank(Loader(300 + rank)),
        "nested": [7, {"own": PerRank(own), "again": PerRank(shared)}],
        "some": {"step": 9} | ({"odd": PerRank(f"of {rank}")} if rank % 2 else {}),
    }


def fresh_state(rank: int) -> dict[str, Any]:
    """A live state that knows nothing yet, as a new process has it."""
    return {
        "shared": torch.zeros(6),
        "model": torch.nn.Linear(3, 2, bias=False),
        "rng": PerRank(torch.zeros_like(rng(0))),
        "position": PerRank(-1),
        "loader": MarkingLoader(-1, -1),
        "whole": PerRank(Loader(-1)),
        "nested": [0, {"own": PerRank(None), "again": PerRank(torch.zeros(6))}],
        "some": {"step": 0} | ({"odd": PerRank(None)} if rank % 2 else {}),
    }


def shown(value: Any) -> Any:
    """A state, or a part of one, as plain values that can be compared."""
    if isinstance(value, PerRank):
        return shown(value.value)
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), value.flatten().tolist()]
    if isinstance(value, MarkingLoader):
        return [value.epoch, value.position]
    if isinstance(value, Loader):
        return value.position
    if isinstance(value, torch.nn.Module):
        return None
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    return [shown(item) for item in value] if isinstance(value, list) else value


def save(rank: int, path: str, *, synchronously: bool) -> Any:
    state = state_of(rank)
    engine = Checkpointer(timeout=60, commit_timeout=60)
    pending = engine.async_save(state, path)
    if not synchronously:  # what is saved is the instant of the call
        state["rng"].value.zero_()
        state["position"].value = state["loader"].position = 0
        state["nested"][1]["own"].value["history"].append("later")
    pending.result(60)
    engine.close()
    dist.barrier()
    return sorted(os.listdir(path)) if rank == 0 else None


def load(rank: int, path: str) -> dict[str, Any]:
    """Load into a fresh state; what it is then, what was reported, and what was logged."""
    state = fresh_state(rank)
    live = state["rng"].value
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardckpt.loading").addHandler(handler)
    try:
        report = shardckpt.load(path, state, weights_only=False)
    finally:
        logging.getLogger("shardckpt.loading").removeHandler(handler)
    assert state["rng"].value is live
    return {"state": shown(state), "per_rank": shown(report.per_rank), "heard": heard, "text": repr(report)}


def resize(rank: int, path: str) -> Any:
    """Each rank takes over what was saved by the ranks that are ``rank`` modulo the new number of ranks."""
    asked = []

    def mine(values: list[Any], rank: int, world_size: int) -> Any:
        asked.append((len(values), rank, world_size))
        return shown(values[rank::world_size])

    state = fresh_state(rank)
    state["position"].resize = state["whole"].resize = state["nested"][1]["own"].resize = mine
    state["loader"].resize = lambda values, *_: max(values)
    report = shardckpt.load(path, state, weights_only=False)
    return {
        "asked": asked,
        "position": state["position"].value,
        "whole": state["whole"].value,
        "own": state["nested"][1]["own"].value,
        "loader": state["loader"].position,
        "offered": sorted(report.per_rank),
        "bytes": report.bytes_read,
    }


def failing_resize(rank: int, path: str) -> Any:
    """The callable of the last rank raises: what every rank is told, and what has become of the state."""

    def fail(values: list[Any], rank: int, world_size: int) -> Any:
        if rank == world_size - 1:
            raise ZeroDivisionError("no such share")
        return values[0]

    state = fresh_state(rank)
    state["position"].resize = fail
    before = shown(state)
    told = ""
    try:
        shardckpt.load(path, state, weights_only=False)
    except shardckpt.LoadFailedError as error:
        told = str(error)
    return told, shown(state) == before


def mismatches(rank: int, path: str) -> Any:
    """A plain value where the checkpoint has one by rank, and the reverse, on one rank alone."""
    state = fresh_state(rank)
    if rank == dist.get_world_size() - 1:
        state |= {"position": 3, "rng": torch.zeros_like(rng(0)), "shared": PerRank(torch.zeros(6)), "whole": Loader(4)}
        state["some"] = {"step": PerRank(0)}
        state["nested"][1].pop("again")
    before = shown(state)
    told = ""
    try:
        shardckpt.load(path, state, weights_only=False)
    except shardckpt.StateMismatchError as error:
        told = str(error)
    assert shown(state) == before
    report = shardckpt.load(path, state, weights_only=False, strict=False)
    return told, shown(state["position"]), report.mismatched, report.unexpected


def refused(rank: int, path: str) -> list[str]:
    """States that cannot be saved, each on every rank although only the last one is at fault."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    is_last = rank == dist.get_world_size() - 1
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    spread = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {"seed": PerRank(1)} if is_last else {"seed": 1}
    told = []
    for state in (
        {"a": PerRank({"b": PerRank(1)} if is_last else 1)},
        {"a": PerRank(spread if is_last else 1)},
        {"a": {PerRank(1)} if is_last else 1},
        {"optimizer": optimizer},
        {"a": PerRank(1) if is_last else 1},
        {"a": PerRank(torch.ones(1)), f"a.rank-{0 if is_last else 7}": torch.ones(1)},
        {"a": PerRank(torch.ones(1)), f"a.rank-{rank}": torch.ones(1)},
    ):
        try:
            Checkpointer(timeout=60, commit_timeout=60).save(state, path)
        except shardckpt.ShardckptError as error:
            told.append(f"{type(error).__name__}: {error}")
        else:
            told.append("saved")
        dist.barrier()
    return [*told, *(os.listdir(path) if os.path.isdir(path) else [])]


def documented(rank: int, path: str, text: str) -> Any:
    """Run the Python of docs/per_rank.md, but Lightning's; what its last load found."""
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    names: dict[str, Any] = {"path": path}
    for block in blocks[:-1]:
        exec(block, names)
        dist.barrier()
    found = names["shardckpt"].load(path)["data"]["position"]
    return names["position"], found, names["report"].per_rank, names["state"]["data"]["position"].value


def repeated(rank: int, root: str) -> Any:
    """Saves whose values by rank change, in shape even: how often the ranks described their tensors to each other."""
    described: list[int] = []
    exchange = series.exchange
    series.exchange = lambda *args: (described.append(1), exchange(*args))[1]
    engine = Checkpointer(timeout=60)
    try:
        for size in (1, 1, 2, 3):
            state = {"w": torch.ones(4), "own": PerRank({"t": torch.full((size + rank,), size), "n": size})}
            engine.save(state, f"{root}/{size}")
    finally:
        series.exchange = exchange
        engine.close()
    dist.barrier()
    words = [json.loads(file.read_bytes()) for file in sorted(Path(root, "3").glob("rank-*.json"))]
    loaded = shardckpt.load(f"{root}/3")["own"]
    return len(described), ["state" in word for word in words], shown(loaded)


def alias(rank: int, root: str) -> Any:
    """Two saves of one version share their shards, but not the values by rank that are no tensors."""
    engine = Checkpointer(timeout=60, commit_timeout=60)
    model, own = torch.nn.Linear(8, 8), torch.full((rank + 1,), rank)
    pending = [
        engine.async_save(
            {"model": model, "own": PerRank({"t": own, "n": [name, rank], "o": Fraction(rank, 7 + number)})},
            f"{root}/{name}",
            state_version=1,
        )
        for number, name in enumerate("ab")
    ]
    reports = [save.result(60) for save in pending]
    larger = {"model": model, "own": PerRank({"t": torch.ones(1) if rank else own})}
    reports.append(engine.async_save(larger, f"{root}/c", state_version=1).result(60))
    engine.close()
    dist.barrier()
    loaded = [shown(shardckpt.load(f"{root}/{name}", weights_only=False)["own"]) for name in "abc"]
    return [report.alias for report in reports], loaded, sorted(os.listdir(f"{root}/b"))
