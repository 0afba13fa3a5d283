"""The checkpoints of one run, in one process: what is kept, what is found again, and what failures leave."""

from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardckpt
from shardckpt import CheckpointManager, CorruptCheckpointError, SaveFailedError, UsageError
from shardckpt.errors import StorageError
from shardckpt.retention import Kept, Retention
from shardckpt.storage import LocalStorage


def state_of(step: int) -> dict[str, Any]:
    return {"weight": torch.full((5,), float(step)), "step": step}


def there(root: Path) -> set[int]:
    """The steps that lie there complete."""
    return {int(path.name.partition("=")[2]) for path in root.glob("step=*") if shardckpt.is_checkpoint(path)}


def run(manager: CheckpointManager, metrics: dict[int, float | None]) -> None:
    for step, loss in metrics.items():
        manager.save(step, state_of(step), None if loss is None else {"loss": loss})
    manager.wait()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_the_newest_are_kept_and_the_newest_comes_back(root: Path) -> None:
    """What a loop of one's own is written around: save by step, and go on from the last one, in another process too."""
    with CheckpointManager(root, keep_last=2) as manager:
        assert manager.restore(state_of(0)) is None
        assert manager.latest() is None
        run(manager, dict.fromkeys((10, 20, 30, 40)))
        assert there(root) == {30, 40}
    again = CheckpointManager(root, keep_last=2)
    state = state_of(0)
    assert again.restore(state) == 40
    assert state["step"] == 40
    assert torch.equal(state["weight"], torch.full((5,), 40.0))
    assert again.steps() == [30, 40]
    assert again.latest() == again.path(40)
    assert again.restore(state, 30) == 30
    assert state["step"] == 30
    with pytest.raises(shardckpt.CheckpointNotFoundError, match="step 20"):
        again.restore(state, 20)
    run(again, {50: None})
    assert there(root) == {40, 50}


def test_looking_waits_for_what_is_under_way(root: Path) -> None:
    """Right after a save, what it replaces is still being removed: it must neither be counted nor be looked into."""
    with CheckpointManager(root, keep_last=1) as manager:
        for step in range(5):
            manager.save(step, state_of(step))
            assert manager.steps() == [step]
            assert there(root) == {step}


def test_the_best_and_the_multiples_stay(root: Path) -> None:
    """Retention by metric and by period holds beside that by number, across processes: the metrics are saved."""
    with CheckpointManager(root, keep_last=1, keep_every=100, metric="loss") as manager:
        run(manager, {50: 0.1, 100: 0.9, 150: float("nan"), 160: None, 170: 0.5})
        assert there(root) == {50, 100, 170}
        assert manager.best() == manager.path(50)
    with CheckpointManager(root, keep_last=1, keep_every=100, metric="loss") as again:
        run(again, {180: 0.05, 190: 0.7})
        assert there(root) == {100, 180, 190}
        assert again.best() == again.path(180)
    assert CheckpointManager(root, metric="loss", mode="max").best() == again.path(100)
    assert CheckpointManager(root, metric="accuracy").best() is None


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A rotten byte costs steps, not the run; and where nothing is sound, nobody starts from scratch unawares."""
    manager = CheckpointManager(root)
    run(manager, dict.fromkeys((1, 2, 3)))
    for step in (3, 2):
        (shard,) = (root / f"step={step}").glob("*.safetensors")
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    state = state_of(0)
    assert manager.restore(state) == 1
    assert state["step"] == 1
    assert caplog.text.count("skipping a damaged checkpoint") == 2
    (root / "step=1" / "manifest.json").write_bytes(b"{")
    with pytest.raises(CorruptCheckpointError, match="step=3"):
        manager.restore(state)
    for step in (2, 3):
        (root / f"step={step}" / "manifest.json").write_bytes(b"{")
    with pytest.raises(CorruptCheckpointError, match="manifest"):
        CheckpointManager(root).restore(state)


def test_a_failed_save_costs_no_older_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was to be removed for a save that failed is kept, and goes with the next one that does not."""
    manager = CheckpointManager(root, keep_last=1)
    run(manager, {1: None})
    whole = LocalStorage.put

    def put(self: LocalStorage, name: str, *args: Any, **options: Any) -> None:
        if name == "manifest.json":
            raise StorageError("the disk is gone")
        whole(self, name, *args, **options)

    with monkeypatch.context() as broken:
        broken.setattr(LocalStorage, "put", put)
        manager.save(2, state_of(2))
        with pytest.raises(SaveFailedError, match="the disk is gone"):
            manager.wait()
    assert there(root) == {1}
    run(manager, {3: None})
    assert there(root) == {3}
    assert manager.steps() == [3]


def test_a_run_that_was_taken_back_keeps_what_it_saves(root: Path) -> None:
    """The newest is what was saved last, though an abandoned branch of the run had gone to higher steps."""
    with CheckpointManager(root, keep_last=2) as manager:
        run(manager, dict.fromkeys((100, 200, 110)))
        assert there(root) == {200, 110}
        assert manager.restore(state_of(0)) == 110
        run(manager, dict.fromkeys((120, 120)))
        assert there(root) == {110, 120}


def test_what_others_put_there_is_left_alone(root: Path) -> None:
    """Only checkpoints under the manager's own names are counted or removed."""
    shardckpt.save(state_of(7), root / "final")
    shardckpt.save(state_of(5), root / "step=5")
    (root / "step=6").mkdir()
    with CheckpointManager(root, keep_last=1, metric="loss") as manager:
        assert manager.steps() == [5]
        assert manager.best() is None
        run(manager, {8: 1.0})
    assert there(root) == {8}
    assert shardckpt.is_checkpoint(root / "final")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep_last": 0}, "keep_last"), ({"keep_every": 1.5}, "keep_every"), ({"keep_best": True}, "keep_best")],
)
def test_options_that_make_no_sense_are_refused(root: Path, options: dict[str, Any], message: str) -> None:
    """The option is named before anything is saved."""
    with pytest.raises(UsageError, match=message):
        CheckpointManager(root, **options)


def test_arguments_that_make_no_sense_are_refused(root: Path) -> None:
    """A step or a state that could not be found again is not saved."""
    manager = CheckpointManager(root)
    for step, state, metrics, message in (
        (-1, state_of(1), None, "a step"),
        (1, {**state_of(1), "manager": 1}, None, "'manager'"),
        (1, [1], None, "a dict"),
        (1, state_of(1), {"loss": "low"}, "'loss' is no number"),
        (1, state_of(1), 0.5, "metrics is a dict or None"),
    ):
        with pytest.raises(UsageError, match=message):
            manager.save(step, state, metrics)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(UsageError, match="metric"):
        manager.best()
    with pytest.raises(UsageError, match="mode"):
        CheckpointManager(root, mode="lowest")  # type: ignore[arg-type]  # that is the point
    assert not root.exists()


@given(
    steps=st.lists(st.tuples(st.integers(0, 40), st.none() | st.floats()), min_size=1, max_size=12),
    last=st.integers(1, 4),
    every=st.none() | st.integers(1, 9),
    mode=st.sampled_from(["min", "max"]),
    best=st.integers(1, 3),
)
def test_retention_keeps_what_is_asked_for_and_nothing_else(
    steps: list[tuple[int, float | None]], last: int, every: int | None, mode: Any, best: int
) -> None:
    """A checkpoint goes exactly when it is not among the newest, not at a multiple, and not among the best."""
    found = [
        Kept(f"{number:03}", step, "", {} if loss is None else {"loss": loss})
        for number, (step, loss) in enumerate(steps)
    ]
    gone = Retention.of(last, every, "loss", mode, best).superfluous(found)
    for one in found:
        loss = one.metrics.get("loss", float("nan"))
        better = 0
        for other in found:
            value = other.metrics.get("loss", float("nan"))
            beats = value < loss if mode == "min" else value > loss
            better += beats or (value == loss and other.save_id > one.save_id)
        is_best = not isnan(loss) and better < best
        is_new = sum(other.save_id > one.save_id for other in found) < last
        is_multiple = every is not None and one.step % every == 0
        assert (one in gone) == (not is_new and not is_multiple and not is_best)
    assert found[-1] not in gone
    assert Retention.of(None, None, None, mode, 1).superfluous(found) == []
