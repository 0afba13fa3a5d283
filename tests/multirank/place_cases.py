"""Places that are not the same for all ranks, or not at once. Runs in the processes of `ranks`."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import shardckpt
from faults import LateStorage
from shardckpt import Checkpointer
from shardckpt import checkpointer as module
from shardckpt.commit import visibility
from shardckpt.storage import Storage
from storage.wrappers import CountingStorage


@contextmanager
def opening(change: Callable[..., Storage]) -> Iterator[None]:
    """In here storages are opened by ``change``, which is given how they are, and the arguments."""
    original = module.open_storage
    module.open_storage = lambda *arguments: change(original, *arguments)  # type: ignore[assignment]
    try:
        yield
    finally:
        module.open_storage = original


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    before = visibility.LATE_SECONDS
    visibility.LATE_SECONDS = seconds  # type: ignore[misc]
    try:
        yield
    finally:
        visibility.LATE_SECONDS = before  # type: ignore[misc]


def state(rank: int, value: float) -> dict[str, Any]:
    return {"t": torch.full((5,), value), "own": shardckpt.PerRank(torch.full((4,), value + rank))}


def own_disks(rank: int, root: str, apart: list[int], how: str) -> dict[str, Any]:
    """Some ranks have another directory behind the same path; what this one was told, and what is on its disk."""
    path = f"{root}/shared/ck"
    disk = f"{root}/of-{rank}/ck" if rank in apart else path
    engine = Checkpointer(timeout=30, commit_timeout=30, on_save_error=how)
    with patience(0.2), opening(lambda opens, _, *options: opens(disk, *options)):
        try:
            pending = engine.async_save(state(rank, 1.0), path)
            told = str(pending.outcome()) if how == "warn" else ""
            kind = type(pending.outcome()).__name__
        except shardckpt.ShardckptError as error:
            told, kind = str(error), type(error).__name__
        dist.barrier()
    left = sorted(file.name for file in Path(disk).rglob("*")) if Path(disk).exists() else []
    dist.barrier()
    engine.save(state(rank, 2.0), f"{root}/well/ck")
    found = state(rank, 0.0)
    engine.load(f"{root}/well/ck", found)
    return {"kind": kind, "told": told, "left": left, "value": found["t"][0].item()}


def late(rank: int, root: str, looks: int) -> float:
    """Rank 1 sees what others have written later than they; so does rank 0."""
    path = f"{root}/ck"
    engine = Checkpointer(timeout=30, commit_timeout=30)

    elsewhere = "saving-" if rank else "rank-00001"

    def change(opens: Callable[..., Storage], *arguments: Any) -> Storage:
        return LateStorage(opens(*arguments), looks, matching=lambda name: name.startswith(elsewhere))

    with opening(change):
        engine.save(state(rank, 3.0), path)
    dist.barrier()
    found = state(rank, 0.0)
    engine.load(path, found)
    assert found["own"].value.tolist() == [3.0 + rank] * 4
    return found["t"][0].item()


def looks_of_saves(rank: int, root: str) -> list[int]:
    """How often this rank looks for a marker, in each of several saves."""
    engine = Checkpointer(timeout=30, commit_timeout=30)
    counts = []
    for name in ("run/one", "run/two", "run/two", "other/one"):
        storages: list[_Looks] = []

        def change(opens: Callable[..., Storage], *arguments: Any, made: Any = storages) -> Storage:
            made.append(_Looks(opens(*arguments)))
            return made[-1]  # type: ignore[no-any-return]

        with opening(change):
            engine.save(state(rank, 4.0), f"{root}/{name}")
        counts.append(sum(storage.markers["size"] for storage in storages))
    return counts


def refused(rank: int, path: str) -> tuple[str, str]:
    """What a save to a path is told where that cannot be."""
    try:
        Checkpointer(timeout=30, commit_timeout=30).save(state(rank, 1.0), path)
    except shardckpt.ShardckptError as error:
        return type(error).__name__, ascii(str(error))
    return "none", ""


class _Looks(CountingStorage):
    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.markers: Counter[str] = Counter()

    def called(self, method: str, name: str, nbytes: int) -> None:
        super().called(method, name, nbytes)
        if name.startswith("saving-"):
            self.markers[method] += 1
