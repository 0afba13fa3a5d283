"""Storages that fail once in a save, and what ranks do when one of theirs does."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

import shardckpt
from shardckpt import Checkpointer
from shardckpt import checkpointer as module
from shardckpt.storage import Storage
from storage.wrappers import FaultyStorage

BROKEN = shardckpt.StorageError("the cable is out")

FOREGROUND = [("prepare", ""), ("get", "manifest.json"), ("put", "saving-")]
"""A call of the storage, and how the names begin for which it fails: before a save has returned."""
BACKGROUND = [("create", "rank-"), ("writer.write", "rank-"), ("put", "rank-"), ("put", "manifest.json")]
ON_ANY_RANK = BACKGROUND[:3]


@contextmanager
def failing(method: str, begin: str, *, here: bool = True) -> Iterator[None]:
    """Have the storages that are opened in here fail once each."""
    original = module.open_storage

    def opening(*arguments: Any) -> Storage:
        return FaultyStorage(original(*arguments), method, BROKEN, matching=lambda name: name.startswith(begin))

    if here:
        module.open_storage = opening
    try:
        yield
    finally:
        module.open_storage = original


class _Counting(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += 1


def goes_on(rank: int, root: str, broken: int, way: tuple[str, str]) -> dict[str, Any]:
    """Save, lose a save, have rank 0 ask for a removal, and save again; what this rank counted, logged and found."""
    log, handler = logging.getLogger("shardckpt"), _Counting()
    log.addHandler(handler)
    engine = Checkpointer(timeout=30, commit_timeout=30, on_save_error="warn")
    counts, values = [], []

    def look(name: str) -> None:
        engine.wait()
        dist.barrier()
        counts.append(engine.failed_saves)
        values.append(shardckpt.load(f"{root}/{name}")["w"][0].item())
        dist.barrier()

    try:
        engine.async_save({"w": torch.full((4 << 18,), 1.0)}, f"{root}/a")
        look("a")
        with failing(*way, here=rank == broken):
            engine.async_save({"w": torch.full((4 << 18,), 2.0)}, f"{root}/b")
            if rank == 0:
                engine.remove(f"{root}/a")
            engine.wait()
        look("a")
        engine.async_save({"w": torch.full((4 << 18,), 3.0)}, f"{root}/a")
        look("a")
    finally:
        log.removeHandler(handler)
    return {"counts": counts, "values": values, "logged": handler.seen}


def two_failures(rank: int, root: str) -> list[str]:
    """Each rank in turn has a state that cannot be saved while the other's storage fails; then neither."""
    engine = Checkpointer(timeout=30, commit_timeout=30, on_save_error="warn")
    original, fates = module.open_storage, []

    def broken(*arguments: Any) -> Storage:
        raise BROKEN

    for bad_state in (1, 0, None):
        state: dict[str, Any] = {"w": torch.ones(3)}
        if rank == bad_state:
            state["f"] = (value for value in ())
        elif bad_state is not None:
            module.open_storage = broken  # type: ignore[assignment]
        try:
            report = engine.save(state, f"{root}/a")
            fates.append("warned" if report.error else "saved")
        except shardckpt.ShardckptError:
            fates.append("raised")
        finally:
            module.open_storage = original
        dist.barrier()
    return fates
