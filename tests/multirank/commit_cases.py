"""What the ranks do in the multi-rank tests of the commit: one rank's storage or code fails at the worst moment."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import shardckpt
from shardckpt import Checkpointer, PerRank, manifest
from shardckpt import checkpointer as module
from shardckpt.saving import halves, jobs, series
from shardckpt.storage import Storage
from storage.wrappers import WrapperStorage

BROKEN = shardckpt.StorageError("the cable is out")


def save_beside(
    rank: int, path: str, failing: int, wrap: Callable[[Storage], Storage], timeout: float = 30.0
) -> dict[str, Any]:
    """Overwrite a checkpoint while one rank's storage is what ``wrap`` makes of it; what this rank saw."""
    engine = Checkpointer(timeout=30, commit_timeout=timeout, replicated=True)
    engine.save({"w": torch.ones(4 << 18)}, path)
    original = module.open_storage
    if rank == failing:
        module.open_storage = lambda *a: wrap(original(*a))  # type: ignore[assignment]
    told: dict[str, Any] = {"error": None}
    started = time.monotonic()
    try:
        pending = engine.async_save({"w": torch.zeros(4 << 18)}, path)
    finally:
        module.open_storage = original
    try:
        pending.result(60)
    except shardckpt.SaveFailedError as error:
        told["error"] = type(error).__name__, str(error)
    told["seconds"] = time.monotonic() - started
    dist.barrier()
    told["sum"] = shardckpt.load(path)["w"].sum().item()
    dist.barrier()
    engine.save({"w": torch.full((4 << 18,), 2.0)}, path)
    dist.barrier()
    told["after"] = shardckpt.load(path)["w"].sum().item()
    dist.barrier()
    return told


class _SilentAtCommit(WrapperStorage):
    lands = True
    silent = False

    def called(self, method: str, name: str, nbytes: int) -> None:
        if self.silent:
            raise BROKEN

    def put(self, name: str, data: bytes, *, replace: bool | bytes, durable: bool = True) -> None:
        if name != "manifest.json" or self.lands:
            super().put(name, data, replace=replace, durable=durable)
        if name == "manifest.json":
            self.silent = True
            raise BROKEN


class _NothingLands(_SilentAtCommit):
    lands = False


class _SilentAfterCommit(WrapperStorage):
    committed = False

    def called(self, method: str, name: str, nbytes: int) -> None:
        if self.committed:
            raise RuntimeError("a bug")
        self.committed = (method, name) == ("put", "manifest.json")


def silent_at_commit(rank: int, path: str, lands: bool) -> dict[str, Any]:
    return save_beside(rank, path, 0, _SilentAtCommit if lands else _NothingLands)


def silent_after_commit(rank: int, path: str) -> dict[str, Any]:
    return save_beside(rank, path, 0, _SilentAfterCommit)


def failing_writer(rank: int, path: str, failing: int) -> dict[str, Any]:
    """One rank cannot even begin its shard, after all have agreed to save."""
    original = halves.ShardWriter

    def broken(*args: Any, **options: Any) -> Any:
        if rank == failing and "rank-" in args[1] and broken.armed:  # type: ignore[attr-defined]
            broken.armed = False  # type: ignore[attr-defined]
            raise shardckpt.UsageError("too many tensors for one file")
        return original(*args, **options)

    engine_saves = iter([False, True, False])
    broken.armed = False  # type: ignore[attr-defined]

    class Counting:
        def __init__(self, *args: Any, **options: Any) -> None:
            broken.armed = next(engine_saves)  # type: ignore[attr-defined]
            self._inner = broken(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    halves.ShardWriter = Counting  # type: ignore[assignment, misc]
    try:
        return save_beside(rank, path, failing, lambda storage: storage, timeout=60.0)
    finally:
        halves.ShardWriter = original  # type: ignore[misc]


class _First(WrapperStorage):
    """Fails as soon as the shard is to be written."""

    def called(self, method: str, name: str, nbytes: int) -> None:
        if method == "create":
            raise BROKEN


class _OfThat(WrapperStorage):
    """Finds its files gone once another rank, which has failed, has cleared up."""

    cleared: Path

    def called(self, method: str, name: str, nbytes: int) -> None:
        if method == "create":
            while not self.cleared.exists():
                time.sleep(0.005)
            raise shardckpt.ObjectNotFoundError("somebody has removed my file")


def one_failure_after_the_other(rank: int, path: str) -> dict[str, Any]:
    """Rank 0 fails and clears up, and that is what makes rank 1 fail."""
    abandon = jobs.commit.abandon
    _OfThat.cleared = Path(f"{path}.cleared")

    def seen(*args: Any, **options: Any) -> None:
        abandon(*args, **options)
        _OfThat.cleared.touch()

    jobs.commit.abandon = seen
    try:
        return save_beside(rank, path, rank, _OfThat if rank else _First)
    finally:
        jobs.commit.abandon = abandon


def interrupted_before_its_job(rank: int, path: str, interrupted: int) -> tuple[str, float, float, int]:
    """Ctrl-C on one rank directly after all have agreed to save: what this rank hears, how soon, and what is left."""
    engine = Checkpointer(timeout=30, commit_timeout=60)
    engine.save({"w": torch.ones(3)}, path)
    order = series.Order

    def interrupt(**_: Any) -> Any:
        raise KeyboardInterrupt

    told, started = "", time.monotonic()
    if rank == interrupted:
        series.Order = interrupt  # type: ignore[assignment, misc]
    try:
        engine.save({"w": torch.zeros(3)}, path)
    except (KeyboardInterrupt, shardckpt.SaveFailedError) as error:
        told = f"{type(error).__name__}: {error}"
    finally:
        series.Order = order  # type: ignore[misc]
    seconds = time.monotonic() - started
    dist.barrier()
    kept = shardckpt.load(path)["w"].sum().item()
    dist.barrier()
    engine.save({"w": torch.zeros(3)}, path)
    dist.barrier()
    return told, seconds, kept, len(os.listdir(path))


class _Bug:
    """An object whose loading fails with an error that is none of ours."""

    def state_dict(self) -> dict[str, int]:
        return {"a": 1}

    def load_state_dict(self, _: dict[str, int]) -> None:
        raise ZeroDivisionError("a bug of the user's")


class _Fine(_Bug):
    def load_state_dict(self, _: dict[str, int]) -> None: ...


def bug_while_loading(rank: int, path: str) -> tuple[str, str, float]:
    """Rank 1's own code raises in mid-load: what this rank is told, and how soon; then both go on together."""
    Checkpointer(timeout=30).save({"w": torch.ones(3), "odd": _Fine()}, path)
    started = time.monotonic()
    told = ("", "")
    try:
        shardckpt.load(path, {"w": torch.zeros(3), "odd": _Bug() if rank == 1 else _Fine()})
    except shardckpt.ShardckptError as error:
        told = (type(error).__name__, str(error))
    seconds = time.monotonic() - started
    state = {"w": torch.zeros(3), "odd": _Fine()}
    shardckpt.load(path, state)
    assert state["w"].sum() == 3
    return (*told, seconds)


def removed_behind_our_back(rank: int, path: str) -> list[bool]:
    """An alias whose source rank 0 has removed is written anew, though only rank 0 knows."""
    engine = Checkpointer(timeout=30)
    state = {"w": torch.ones(1000)}
    aliases = [engine.save(state, f"{path}/a", state_version=1).alias]
    dist.barrier()
    if rank == 0:
        engine.remove(f"{path}/a")
    dist.barrier()
    aliases += [engine.save(state, f"{path}/{name}", state_version=1).alias for name in "bc"]
    dist.barrier()
    assert shardckpt.load(f"{path}/c")["w"].sum() == 1000
    dist.barrier()
    return aliases


@contextmanager
def parsing() -> Iterator[list[str]]:
    """Which rank manifests are parsed meanwhile, by name."""
    parsed: list[str] = []
    inner = manifest.decode_rank_manifest

    def noted(data: bytes, where: str, **options: Any) -> Any:
        parsed.append(where)
        return inner(data, where, **options)

    # A save looks the function up in its module.
    with mock.patch.object(manifest, "decode_rank_manifest", noted):
        yield parsed


def own_layouts_again(rank: int, path: str) -> dict[str, Any]:
    """Saves of one plan with tensors by rank: how many rank manifests each parsed, and what each brings back here."""
    engine = Checkpointer(timeout=30, replicated=["shared"])
    counts, found = [], []
    # The plan that all ranks keep knows nothing of rank 1's own tensor.
    for number, own in enumerate((2, 2, 5, 5, 2)):
        mine = PerRank(torch.full((own if rank else 2,), float(10 * number + rank)))
        state = {"shared": torch.full((100,), float(number)), "mine": mine}
        with parsing() as parsed:
            engine.save(state, f"{path}/{number}")
        counts.append(len(parsed))
    dist.barrier()
    for number in range(len(counts)):
        loaded = shardckpt.load(f"{path}/{number}")
        found.append((loaded["shared"].sum().item(), loaded["mine"][rank].tolist()))
    dist.barrier()
    return {"counts": counts, "found": found}


def plan_again(rank: int, path: str, compression: str | None) -> dict[str, Any]:
    """Saves of what all ranks hold alike: how many rank manifests each parsed, and what each brings back."""
    engine = Checkpointer(timeout=30, replicated=True, compression=compression)
    counts, found = [], []
    for number in range(3):
        with parsing() as parsed:
            # More of it is compressed well with each save.
            state = {"w": torch.arange(1000.0) // (1 + number), "b": torch.ones(1000), "step": number}
            engine.save(state, f"{path}/{number}")
        counts.append(len(parsed))
    dist.barrier()
    for number in range(len(counts)):
        loaded = shardckpt.load(f"{path}/{number}")
        found.append((loaded["step"], torch.equal(loaded["w"], torch.arange(1000.0) // (1 + number))))
    dist.barrier()
    return {"counts": counts, "found": found}
