"""Checkpoints of one process on storages without directories: S3, and what fsspec keeps in memory."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt import Checkpointer


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """A fresh place, and the options that reach it."""
    if request.param == "s3":
        found = request.getfixturevalue("s3_place")
        yield found.url, found.storage_options
        return
    import fsspec

    url = f"memory://{uuid.uuid4().hex}/run"
    yield url, None
    filesystem = fsspec.filesystem("memory")
    root = url.removeprefix("memory://").partition("/")[0]
    if filesystem.exists(f"/{root}"):
        filesystem.rm(f"/{root}", recursive=True)


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((300, 7000), value), "odd": complex, "step": value}


def names(url: str, options: dict[str, Any] | None) -> list[str]:
    return [stat.name for stat in shardckpt.checkpointer.open_storage(url, options).list()]


def test_whole_life(place):
    """Save, overwrite, share, load, read, find and remove work as on a disk, and leave nothing behind."""
    root, options = place
    engine = Checkpointer(storage_options=options)
    engine.save(state(1.0), f"{root}/a")
    before = names(f"{root}/a", options)
    pending = engine.async_save(state(2.0), f"{root}/a", state_version=1)
    assert shardckpt.is_checkpoint(f"{root}/a", options)
    alias = engine.async_save(state(2.0) | {"step": 3.0}, f"{root}/b", state_version=1)
    assert not pending.result(60).alias
    assert alias.result(60).alias
    after = names(f"{root}/a", options)
    assert len(before) == len(after) == 4
    assert set(before) & set(after) == {"manifest.json"}
    assert shardckpt.latest(root, options) == f"{root}/b"
    live = state(9.0)
    shardckpt.load(f"{root}/a", live, weights_only=False, storage_options=options)
    assert live["step"] == 2.0
    assert torch.equal(live["w"], state(2.0)["w"])
    engine.remove(f"{root}/a")
    assert not shardckpt.is_checkpoint(f"{root}/a", options)
    assert names(f"{root}/a", options) == []
    loaded = shardckpt.load(f"{root}/b", weights_only=False, storage_options=options)
    assert (loaded["step"], loaded["odd"]) == (3.0, complex)
    assert torch.equal(shardckpt.read_tensor(f"{root}/b", "w", storage_options=options), state(2.0)["w"])
    engine.remove(f"{root}/b")
    assert shardckpt.latest(root, options) is None


def test_missing_and_damaged(place):
    """What is not there, or not whole, is the same error as on a disk, and names the URL."""
    root, options = place
    engine = Checkpointer(storage_options=options)
    with pytest.raises(shardckpt.CheckpointNotFoundError, match=f"{root}/none.*nothing is there"):
        engine.load(f"{root}/none")
    engine.save(state(1.0), f"{root}/a")
    storage = shardckpt.checkpointer.open_storage(f"{root}/a", options)
    with pytest.raises(shardckpt.CheckpointNotFoundError, match=f"beside it is {root}/a"):
        engine.load(f"{root}/b")
    (shard,) = [name for name in names(f"{root}/a", options) if name.endswith(".safetensors")]
    storage.delete([shard])
    with pytest.raises(shardckpt.CorruptCheckpointError, match=f"missing.*{shard}"):
        engine.load(f"{root}/a", state(2.0), weights_only=False)
    storage.delete(["manifest.json"])
    with pytest.raises(shardckpt.CheckpointNotFoundError, match="cut short"):
        engine.load(f"{root}/a")
    engine.save(state(4.0), f"{root}/a")
    assert engine.load(f"{root}/a", weights_only=False)["step"] == 4.0
    assert len(names(f"{root}/a", options)) == 4
