"""Checkpoints that are overwritten or removed while somebody reads them: a run does so to its ``last.ckpt`` all day."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
import shardckpt
from multirank import hang_cases
from shardckpt import (
    Checkpointer,
    CheckpointManager,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    commit,
    loading,
    tools,
)
from shardckpt.commit import reading
from shardckpt.storage import Storage
from storage.wrappers import WrapperStorage

OLD, NEW = 1.0, 2.0


def state(value: float, names: str = "ab") -> dict[str, Any]:
    return {name: torch.full((5000,), value) for name in names} | {"step": int(value)}


def save(path: Path, value: float, names: str = "ab") -> None:
    Checkpointer(alone=True).save(state(value, names), path)


class Meanwhile:
    """Does something once, between reading the manifest and reading what it names, or before a read of a shard."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], *, at: int | None = None) -> None:
        self._act = act
        self._left = at
        self._done = False
        read, opened = commit.read_for_all, reading.open_storage
        if at is None:

            def read_and(*args: Any) -> Any:
                found = read(*args)
                self.happen()
                return found

            monkeypatch.setattr(commit, "read_for_all", read_and)
        else:
            monkeypatch.setattr(reading, "open_storage", lambda *args: _Watched(opened(*args), self))

    def happen(self) -> None:
        if not self._done:
            self._done = True
            self._act()

    def count(self) -> None:
        assert self._left is not None
        self._left -= 1
        if self._left < 0:
            self.happen()


class _Watched(WrapperStorage):
    def __init__(self, inner: Storage, meanwhile: Meanwhile) -> None:
        super().__init__(inner)
        self._meanwhile = meanwhile

    def called(self, method: str, name: str, nbytes: int) -> None:
        if method == "read_into" and nbytes >= 5000:
            self._meanwhile.count()


def whole(found: dict[str, Any]) -> float:
    """Of which save a state is; fails if it is a mixture."""
    values = {float(one) for name in found if name != "step" for one in found[name].unique()} | {float(found["step"])}
    assert len(values) == 1, f"a mixture: {values}"
    return values.pop()


READERS: dict[str, Callable[[Path], float]] = {
    "load": lambda path: whole(shardckpt.load(path)),
    "read_tensor": lambda path: float(shardckpt.read_tensor(path, "b").unique()),
    "prefix": lambda path: float(shardckpt.load(path, prefix="b").unique()),
}


def in_place(path: Path, **options: Any) -> dict[str, Any]:
    live = state(0.0)
    shardckpt.load(path, live, **options)
    return live


@pytest.mark.parametrize("at", (None, 0, 1))
@pytest.mark.parametrize("reader", ("in place", *READERS))
def test_what_is_overwritten_while_it_is_read_is_read_anew(tmp_path, monkeypatch, reader, at):
    """Its files go with the commit that replaces it; whoever had read the old manifest gets the new one's bytes."""
    save(tmp_path / "ck", OLD)
    Meanwhile(monkeypatch, lambda: save(tmp_path / "ck", NEW), at=at)
    read = READERS.get(reader, lambda path: whole(in_place(path)))
    assert read(tmp_path / "ck") in ({NEW} if at is None else {OLD, NEW})


@pytest.mark.parametrize("remove", (lambda path: Checkpointer(alone=True).remove(path), shutil.rmtree))
@pytest.mark.parametrize("reader", READERS)
def test_what_is_removed_while_it_is_read_is_said_to_be(tmp_path, monkeypatch, reader, remove):
    """No damage is reported where there is none, but nothing any more."""
    save(tmp_path / "ck", OLD)
    Meanwhile(monkeypatch, lambda: remove(tmp_path / "ck"))
    with pytest.raises(CheckpointNotFoundError, match="removed while it was read"):
        READERS[reader](tmp_path / "ck")


def test_a_removal_leaves_the_state_alone(tmp_path, monkeypatch):
    """In place, what was removed before a byte of it was placed has changed nothing, and the error says so."""
    save(tmp_path / "ck", OLD)
    Meanwhile(monkeypatch, lambda: Checkpointer(alone=True).remove(tmp_path / "ck"))
    live = state(0.0)
    with pytest.raises(CheckpointNotFoundError, match=r"removed while it was read.*Nothing was changed"):
        shardckpt.load(tmp_path / "ck", live)
    assert whole(live) == 0


def test_no_state_is_a_mixture_of_two_saves(tmp_path, monkeypatch):
    """What the new save lacks would stay as the old one has it, so it is no new start once a byte has been placed."""
    save(tmp_path / "ck", OLD)
    read = loading.read_together

    def partly(*args: Any, **options: Any) -> None:
        read(*args, **options)
        save(tmp_path / "ck", NEW, "a")
        raise CorruptCheckpointError("a file of the checkpoint is missing")

    monkeypatch.setattr(loading, "read_together", partly)
    with pytest.raises(CorruptCheckpointError, match=r"partly restored.*Another save, of other tensors"):
        in_place(tmp_path / "ck", strict=False)


def test_before_the_first_byte_any_new_save_will_do(tmp_path, monkeypatch):
    """Nothing has been changed then, so that what the new save lacks stays as it was in the state."""
    save(tmp_path / "ck", OLD)
    Meanwhile(monkeypatch, lambda: save(tmp_path / "ck", NEW, "a"))
    live = in_place(tmp_path / "ck", strict=False)
    assert [float(live[name][0]) for name in "ab"] == [NEW, 0.0]


def test_damage_is_damage(tmp_path, monkeypatch):
    """A file that is missing without another save being there is what it was: a damaged checkpoint."""
    save(tmp_path / "ck", OLD)
    (shard,) = (tmp_path / "ck").glob("*.safetensors")
    Meanwhile(monkeypatch, shard.unlink)
    with pytest.raises(CorruptCheckpointError, match="missing"):
        shardckpt.load(tmp_path / "ck")


def test_a_copy_of_what_is_overwritten_is_of_the_new_one(tmp_path, monkeypatch):
    """The command-line's ``cp`` beside a training gives a whole checkpoint."""
    save(tmp_path / "ck", OLD)
    read, saves = commit.read, [NEW]

    def read_and(*args: Any) -> Any:
        found = read(*args)
        while saves:
            save(tmp_path / "ck", saves.pop())
        return found

    monkeypatch.setattr(commit, "read", read_and)
    report = tools.copy(tmp_path / "ck", tmp_path / "copy")
    assert whole(shardckpt.load(tmp_path / "copy")) == NEW
    assert report.save_id == tools.inspect(tmp_path / "copy").save_id
    assert shardckpt.verify(tmp_path / "copy").ok


def test_a_copy_of_what_is_removed_leaves_nothing(tmp_path, monkeypatch):
    """What is removed while it is copied is an error, and half a copy stays nowhere."""
    save(tmp_path / "ck", OLD)
    read = commit.read

    def read_and(*args: Any) -> Any:
        found = read(*args)
        Checkpointer(alone=True).remove(tmp_path / "ck")
        return found

    monkeypatch.setattr(commit, "read", read_and)
    with pytest.raises((CorruptCheckpointError, shardckpt.ObjectNotFoundError)):
        tools.copy(tmp_path / "ck", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_manager_takes_the_next_of_what_is_removed(tmp_path, monkeypatch):
    """Another job's retention may take the newest away while it is being restored: the one before it will do."""
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, state(float(step)))
    manager = CheckpointManager(tmp_path)
    (newest,) = tmp_path.glob("*2*")
    restored = loading.OpenCheckpoint.restore

    def restore(self: loading.OpenCheckpoint, *args: Any, **options: Any) -> Any:
        if Path(self.path) == newest:
            shutil.rmtree(newest, ignore_errors=True)
        return restored(self, *args, **options)

    monkeypatch.setattr(loading.OpenCheckpoint, "restore", restore)
    live = state(0.0)
    assert manager.restore(live) == 1
    assert whole(live) == 1


@pytest.mark.multiprocess
@pytest.mark.parametrize("share", (True, False))
@pytest.mark.parametrize("at", ("manifest", "exchange"))
def test_all_ranks_start_again_together(tmp_path, at, share):
    """One rank finds a file gone that the others have read already: all of them end with the new save's bytes."""
    for found in ranks.world(2).run(hang_cases.overwritten_load, str(tmp_path / "ck"), at, share):
        assert found == 2.0
