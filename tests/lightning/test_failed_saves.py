"""Saves that fail in a Trainer that is told to go on: what is lost, what is kept, and what is cleared up later."""

from pathlib import Path
from typing import Any

import pytest
import toy

from shardckpt import SaveFailedError, StorageError, checkpointer, read_tensor
from shardckpt.lightning import ShardedCheckpointIO


def tolerant() -> dict[str, Any]:
    return {"plugins": [ShardedCheckpointIO(on_save_error="warn", timeout=30, commit_timeout=60)]}


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Places whose path holds one of these names cannot be opened: a save there fails before it has begun."""
    names: list[str] = []
    opened = checkpointer.open_storage

    def refusing(path: Any, *options: Any) -> Any:
        if any(name in str(path) for name in names):
            raise StorageError(f"no way to {path}")
        return opened(path, *options)

    monkeypatch.setattr(checkpointer, "open_storage", refusing)
    return names


@pytest.fixture(params=["failing", "unopened"])
def refused(request: pytest.FixtureRequest) -> list[str]:
    """Names of checkpoints whose saves fail: at their commit, or when they begin."""
    names: list[str] = request.getfixturevalue(request.param)
    return names


def test_the_last_good_one_survives_with_save_top_k_1(
    tmp_path: Path, lightning: Any, Toy: Any, refused: list[str], caplog: Any
) -> None:
    """Lightning asks for the old one's removal right after each save: after one that failed it stays, and resumes."""
    refused.append("epoch=1")
    there: list[set[str]] = []

    class Looking(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.strategy.checkpoint_io.wait()
            there.append(toy.complete(tmp_path))

    run = toy.trainer(
        lightning, tmp_path, checkpoint={"filename": "{epoch}"}, callbacks=[Looking()], max_epochs=4, **tolerant()
    )
    run.fit(Toy(), toy.loader())
    assert there == [set(), {"epoch=0.ckpt"}, {"epoch=0.ckpt"}, {"epoch=2.ckpt"}]
    assert toy.complete(tmp_path) == {"epoch=3.ckpt"}
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"epoch=3.ckpt"}
    assert run.strategy.checkpoint_io.failed_saves == 1
    assert [one.message for one in caplog.records if one.levelname == "ERROR" and "epoch=1.ckpt failed" in one.message]
    assert sum(one.levelname == "ERROR" for one in caplog.records) == 1


def test_a_run_whose_end_fails_resumes_from_before(
    tmp_path: Path, lightning: Any, Toy: Any, refused: list[str]
) -> None:
    """The failure of a run's last save raises nothing at its end either, and the one before is whole."""
    refused.append("epoch=1")
    first = toy.recorder(lightning)
    run = toy.trainer(lightning, tmp_path, checkpoint={"filename": "{epoch}"}, callbacks=[first], **tolerant())
    run.fit(Toy(), toy.loader())
    assert run.state.finished
    assert toy.complete(tmp_path) == {"epoch=0.ckpt"}
    second = toy.recorder(lightning)
    again = toy.trainer(lightning, tmp_path, max_epochs=2, callbacks=[second])
    again.fit(Toy(), toy.loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert second.position == (1, 12)


def test_last_stays_what_it_was(tmp_path: Path, lightning: Any, Toy: Any, refused: list[str]) -> None:
    """A ``last.ckpt`` that could not be replaced is the one before, also where it shares the shards of a lost save."""
    options = {"filename": "{epoch}", "save_last": True}
    run = toy.trainer(lightning, tmp_path, checkpoint=options, max_epochs=1)
    run.fit(Toy(), toy.loader())
    before = read_tensor(tmp_path / "last.ckpt", "state_dict.net.0.weight")
    refused += ["epoch=1", "last"]
    again = toy.trainer(lightning, tmp_path, checkpoint=options, max_epochs=2, **tolerant())
    again.fit(Toy(), toy.loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert toy.complete(tmp_path) == {"epoch=0.ckpt", "last.ckpt"}
    assert read_tensor(tmp_path / "last.ckpt", "state_dict.net.0.weight").equal(before)
    assert again.strategy.checkpoint_io.failed_saves == 2


def test_synchronous_saves_go_on_too(tmp_path: Path, lightning: Any, Toy: Any, refused: list[str]) -> None:
    """A save outside of ``fit``, for which its caller waits, is counted and raises nothing."""
    run = toy.trainer(lightning, tmp_path, max_epochs=1, **tolerant())
    run.fit(Toy(), toy.loader())
    refused.append("b.ckpt")
    for name in ("a", "b", "c"):
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
    assert toy.complete(tmp_path) == {"a.ckpt", "c.ckpt"}
    assert run.strategy.checkpoint_io.failed_saves == 1


def test_a_strategy_that_is_not_bound_keeps_the_last_good_one_too(tmp_path: Path, refused: list[str]) -> None:
    """Called on one rank, as the documented contract has it, a lost save keeps what it was to replace just so."""
    io = ShardedCheckpointIO(on_save_error="warn")
    refused.append("b.ckpt")
    io.save_checkpoint({"value": 1}, tmp_path / "a.ckpt")
    io.save_checkpoint({"value": 2}, tmp_path / "b.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert toy.complete(tmp_path) == {"a.ckpt"}
    assert io.failed_saves == 1
    io.save_checkpoint({"value": 3}, tmp_path / "c.ckpt")
    io.remove_checkpoint(tmp_path / "b.ckpt")
    assert toy.complete(tmp_path) == {"c.ckpt"}


def test_without_the_option_the_run_ends(tmp_path: Path, lightning: Any, Toy: Any, failing: list[str]) -> None:
    """By default a failed save is an error of the run, and the checkpoint that it was to replace is there."""
    failing.append("epoch=1")
    run = toy.trainer(lightning, tmp_path, checkpoint={"filename": "{epoch}"}, max_epochs=4)
    with pytest.raises(SaveFailedError, match="no room for"):
        run.fit(Toy(), toy.loader())
    assert toy.complete(tmp_path) == {"epoch=0.ckpt"}
