"""Where a checkpoint could be lost, or hold what it should not: edits between saves, emergencies, hooks that load."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from shardckpt import commit, read_tensor
from shardckpt.lightning import ShardedCheckpointIO


def weight(path: Path) -> torch.Tensor:
    return read_tensor(path, "state_dict.net.0.weight")


def test_a_single_element_changed_after_fit_is_saved(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """Two saves of the user's at one step share nothing: one element written behind torch's back is in the second."""
    run, model = toy.trainer(lightning, tmp_path, max_epochs=1), Toy(width=5000)
    run.fit(model, toy.loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    model.net[0].weight.data[3, 3] = 123.0
    run.save_checkpoint(tmp_path / "b.ckpt")
    model.net[0].weight.detach().numpy()[7, 7] = 77.0
    run.save_checkpoint(tmp_path / "c.ckpt")
    assert weight(tmp_path / "b.ckpt")[3, 3] == 123.0
    assert weight(tmp_path / "c.ckpt")[7, 7] == 77.0


@pytest.mark.parametrize("save_last", [False, True])
def test_two_callbacks_of_one_step_share_nothing(save_last: bool, tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """What a second ``ModelCheckpoint`` does to the weights before its own save of the same step is in its file."""

    class Editing(lightning.callbacks.ModelCheckpoint):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[0].weight.data[3] = 0.5
            super().on_train_epoch_end(trainer, pl_module)

    first = lightning.callbacks.ModelCheckpoint(str(tmp_path / "a"), filename="A", save_on_train_epoch_end=True)
    second = Editing(str(tmp_path / "b"), filename="B", save_on_train_epoch_end=True, save_last=save_last)
    toy.trainer(lightning, tmp_path, callbacks=[first, second], max_epochs=1).fit(Toy(width=5000), toy.loader())
    assert not weight(tmp_path / "a" / "A.ckpt")[3].eq(0.5).any()
    assert weight(tmp_path / "b" / "B.ckpt")[3].eq(0.5).all()
    if save_last:
        assert toy.shards(tmp_path / "b" / "last.ckpt")[0].samefile(toy.shards(tmp_path / "b" / "B.ckpt")[0])


def test_another_save_in_between_ends_the_sharing(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """``last`` shares with its own callback's save of the same trigger only: not with one that an edit may follow."""

    class Between(lightning.callbacks.ModelCheckpoint):  # type: ignore[misc]
        def _save_last_checkpoint(self, trainer: Any, monitor_candidates: Any) -> None:
            trainer.lightning_module.net[0].weight.data[3] = 0.5
            trainer.save_checkpoint(tmp_path / "between.ckpt")
            super()._save_last_checkpoint(trainer, monitor_candidates)

    callback = Between(str(tmp_path), filename="A", save_last=True)
    toy.trainer(lightning, tmp_path, callbacks=[callback], max_epochs=1).fit(Toy(width=5000), toy.loader())
    assert weight(tmp_path / "between.ckpt")[3].eq(0.5).all()
    assert weight(tmp_path / "last.ckpt")[3].eq(0.5).all()


def raising(lightning: Any) -> Any:
    class Raising(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                raise ZeroDivisionError("in training")

    return Raising()


@pytest.mark.parametrize("broken", [["epoch=0"], ["epoch=0", "on_exception"]])
def test_an_emergency_checkpoint_is_made_in_any_case(
    broken: list[str], tmp_path: Path, lightning: Any, Toy: Any, failing: list[str], caplog: Any
) -> None:
    """An earlier save that failed keeps neither the emergency's from being made nor the first error from being seen."""
    failing += broken
    callbacks = [raising(lightning), lightning.callbacks.OnExceptionCheckpoint(str(tmp_path))]
    run = toy.trainer(lightning, tmp_path, checkpoint={"filename": "{epoch}"}, callbacks=callbacks)
    with pytest.raises(ZeroDivisionError, match="in training"):
        run.fit(Toy(), toy.loader())
    assert toy.complete(tmp_path) == {"on_exception.ckpt"} - {f"{name}.ckpt" for name in broken}
    assert "epoch=0.ckpt" in caplog.text
    assert ("on_exception.ckpt was not saved" in caplog.text) == ("on_exception" in broken)


def test_slurm_saves_although_a_save_failed(
    tmp_path: Path, lightning: Any, Toy: Any, failing: list[str], monkeypatch: Any
) -> None:
    """A save that failed before does not keep a job that is about to be killed from saving and being queued again."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    at_requeue: list[set[str]] = []
    signals = lightning.trainer.connectors.signal_connector
    monkeypatch.setattr(signals, "call", lambda command: at_requeue.append(toy.complete(tmp_path)) or 0)
    failing.append("early")

    class Signalled(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "early.ckpt")
                trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)

    toy.trainer(lightning, tmp_path, callbacks=[Signalled()], max_epochs=1).fit(Toy(), toy.loader())
    assert at_requeue == [{"hpc_ckpt_1.ckpt"}]


def test_a_hook_loads_what_was_saved_a_moment_ago(
    tmp_path: Path, lightning: Any, Toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``load_from_checkpoint(best_model_path)`` within ``fit`` waits for the save in flight."""
    publish, found = commit.publish, []

    def slow(*args: Any) -> None:
        time.sleep(0.5)
        publish(*args)

    class Loading(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            found.append(Toy.load_from_checkpoint(trainer.checkpoint_callback.best_model_path))

    monkeypatch.setattr(commit, "publish", slow)
    run = toy.trainer(lightning, tmp_path, checkpoint={"filename": "a"}, callbacks=[Loading()], max_epochs=1)
    run.fit(Toy(), toy.loader())
    assert torch.equal(found[0].net[0].weight, run.lightning_module.net[0].weight)


def test_a_warm_up_that_fails_does_not_end_training(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """An optimizer whose ``state_dict`` cannot be had in mid-training costs the warm-up, not the run."""

    class Shy(torch.optim.SGD):
        asked = 0

        def state_dict(self) -> dict[str, Any]:
            type(self).asked += 1
            if type(self).asked == 1:
                raise KeyError("not now")
            return super().state_dict()

    class Model(Toy):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            return Shy(self.parameters(), lr=0.1)

    toy.trainer(lightning, tmp_path, checkpoint={"filename": "a"}, max_epochs=1).fit(Model(), toy.loader())
    assert Shy.asked > 1
    assert toy.complete(tmp_path) == {"a.ckpt"}


def test_a_part_that_a_hook_keeps_outlives_the_trainer_and_is_saved_plainly(
    tmp_path: Path, lightning: Any, Toy: Any
) -> None:
    """A state dict that a hook kept can be read when the run is over, and is saved as a dict of tensors."""

    class Keeping(Toy):  # type: ignore[misc, valid-type]
        kept: Any = None

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.kept = checkpoint["state_dict"]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if self.kept is not None:
                checkpoint["before"] = {"list": [self.kept]}

    first = toy.trainer(lightning, tmp_path, checkpoint={"filename": "a"}, max_epochs=1)
    first.fit(Toy(), toy.loader())
    model = Keeping()
    second = toy.trainer(lightning, tmp_path, checkpoint={"filename": "b"}, max_epochs=2)
    second.fit(model, toy.loader(), ckpt_path=tmp_path / "a.ckpt")
    loaded = ShardedCheckpointIO().load_checkpoint(tmp_path / "b.ckpt")
    assert loaded is not None
    assert torch.equal(loaded["before"]["list"][0]["net.0.weight"], weight(tmp_path / "a.ckpt"))
    other = Keeping()
    run = toy.trainer(lightning, tmp_path)
    run.validate(other, toy.loader(32), ckpt_path=tmp_path / "a.ckpt")
    run.strategy.checkpoint_io.teardown()
    assert torch.equal(other.kept["net.0.weight"], weight(tmp_path / "a.ckpt"))
