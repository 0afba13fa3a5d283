"""What ModelCheckpoint and its relatives leave on disk, and when."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from shardckpt import SaveFailedError, commit
from shardckpt.lightning import ShardedCheckpointIO, plugin


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Commits wait for this event, as on a slow disk; it is set at the end in any case."""
    opened = threading.Event()
    publish = commit.publish

    def waiting(*args: Any) -> None:
        assert opened.wait(30)
        publish(*args)

    monkeypatch.setattr(commit, "publish", waiting)
    yield opened
    opened.set()


def test_last_shares_the_files_of_the_checkpoint_before(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """``save_last=True`` costs no second write: its shards are hard links to those of the same step."""
    toy.trainer(lightning, tmp_path, checkpoint={"filename": "a", "save_last": True}).fit(Toy(), toy.loader())
    (last,), (kept,) = toy.shards(tmp_path / "last.ckpt"), toy.shards(tmp_path / "a.ckpt")
    assert last.samefile(kept)
    assert (tmp_path / "last.ckpt" / "manifest.json").read_bytes() != (
        tmp_path / "a.ckpt" / "manifest.json"
    ).read_bytes()
    shutil.rmtree(tmp_path / "a.ckpt")
    toy.trainer(lightning, tmp_path).validate(Toy(), toy.loader(32), ckpt_path=tmp_path / "last.ckpt")


def test_a_change_between_two_saves_is_not_lost(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """Two saves at one step share nothing if the weights were changed between them, even behind torch's back."""

    class Saving(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "before.ckpt")
            pl_module.net[0].weight.data.add_(1)  # bumps no version counter
            trainer.save_checkpoint(tmp_path / "after.ckpt")

    toy.trainer(lightning, tmp_path, callbacks=[Saving()], max_epochs=1).fit(Toy(), toy.loader())
    before, after = (Toy.load_from_checkpoint(tmp_path / name) for name in ("before.ckpt", "after.ckpt"))
    assert torch.equal(before.net[0].weight + 1, after.net[0].weight)


def test_linked_last(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """``save_last="link"`` works while saves are in flight, also on top of a real ``last.ckpt``, and resumes."""
    toy.trainer(lightning, tmp_path, checkpoint={"save_last": True}, max_epochs=1).fit(Toy(), toy.loader())
    options = {"filename": "{epoch}", "save_last": "link", "save_top_k": -1, "enable_version_counter": False}
    run = toy.trainer(lightning, tmp_path, checkpoint=options)
    run.fit(Toy(), toy.loader())
    assert os.readlink(tmp_path / "last.ckpt") == "epoch=1.ckpt"
    again = toy.trainer(lightning, tmp_path, max_epochs=2, checkpoint=options)
    again.fit(Toy(), toy.loader(), ckpt_path="last")
    assert again.global_step == 24


def test_saving_to_a_link_spares_its_target(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """A run that saves to ``last.ckpt``, left as a link by another, replaces the link and not what it points to."""
    options = {"filename": "{epoch}", "save_last": "link"}
    toy.trainer(lightning, tmp_path, checkpoint=options, max_epochs=1).fit(Toy(), toy.loader())
    before = (tmp_path / "epoch=0.ckpt" / "manifest.json").read_bytes()
    run = toy.trainer(lightning, tmp_path, max_epochs=1)
    run.fit(Toy(), toy.loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert (tmp_path / "epoch=0.ckpt" / "manifest.json").read_bytes() == before
    run.strategy.remove_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").symlink_to("epoch=0.ckpt")
    run.strategy.remove_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert toy.complete(tmp_path) == {"epoch=0.ckpt"}


def test_versions_count_checkpoints_in_flight(tmp_path: Path, lightning: Any, Toy: Any, gate: threading.Event) -> None:
    """A path exists when the save returns, so two checkpoints of one name get two versions, as ever."""

    class Saving(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "here.ckpt")
            assert (tmp_path / "here.ckpt").exists()
            assert toy.complete(tmp_path) == set()
            gate.set()

    toy.trainer(lightning, tmp_path, callbacks=[Saving()], max_epochs=1).fit(Toy(), toy.loader())
    options = {"filename": "here", "every_n_epochs": 1, "save_top_k": -1}
    toy.trainer(lightning, tmp_path, checkpoint=options).fit(Toy(), toy.loader())
    assert toy.complete(tmp_path) == {"here.ckpt", "here-v1.ckpt"}


def test_every_n_steps_and_retention(tmp_path: Path, lightning: Any, Toy: Any, monkeypatch: Any) -> None:
    """Old checkpoints go only when the one that replaces them is complete: there is never none."""
    seen: list[set[str]] = []
    remove = commit.remove

    def watching(storage: Any, **options: Any) -> None:
        remove(storage, **options)
        seen.append(toy.complete(tmp_path))

    monkeypatch.setattr(commit, "remove", watching)
    options = {"filename": "{step}", "every_n_train_steps": 3, "monitor": "loss", "save_top_k": 2, "mode": "min"}
    toy.trainer(lightning, tmp_path, checkpoint=options).fit(Toy(), toy.loader())
    assert len(seen) >= 2
    assert all(len(names) >= 2 for names in seen)
    assert len(toy.complete(tmp_path)) == 2


def test_a_failed_save_surfaces_and_costs_nothing_else(
    tmp_path: Path, lightning: Any, Toy: Any, failing: list[str]
) -> None:
    """The error of a save in the background is raised at the next one, and what it was to replace is kept."""
    failing.append("epoch=1")
    options = {"filename": "{epoch}", "save_top_k": 1}
    with pytest.raises(SaveFailedError, match=r"epoch=1\.ckpt"):
        toy.trainer(lightning, tmp_path, checkpoint=options, max_epochs=4).fit(Toy(), toy.loader())
    assert toy.complete(tmp_path) == {"epoch=0.ckpt"}


def test_the_last_save_surfaces_at_the_end(tmp_path: Path, lightning: Any, Toy: Any, failing: list[str]) -> None:
    """A failure of the very last save fails ``fit`` itself, and a plugin that has told it can be used again."""
    failing.append("epoch=1")
    io = ShardedCheckpointIO()
    options = {"checkpoint": {"filename": "{epoch}", "save_top_k": -1}, "plugins": [io]}
    with pytest.raises(SaveFailedError, match=r"epoch=1\.ckpt"):
        toy.trainer(lightning, tmp_path, **options).fit(Toy(), toy.loader())
    failing.clear()
    io.teardown()
    toy.trainer(lightning, tmp_path, **options).fit(Toy(), toy.loader())
    assert "epoch=1.ckpt" in toy.complete(tmp_path)


def test_what_went_wrong_first_is_not_hidden(
    tmp_path: Path, lightning: Any, Toy: Any, failing: list[str], caplog: Any
) -> None:
    """If training raises while a save fails, the user gets training's error, and the save's in the log."""

    class Raising(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                raise ZeroDivisionError("in training")

    failing.append("epoch=0")
    run = toy.trainer(lightning, tmp_path, checkpoint={"filename": "{epoch}"}, callbacks=[Raising()])
    with pytest.raises(ZeroDivisionError, match="in training"):
        run.fit(Toy(), toy.loader())
    assert "a checkpoint was not saved" in caplog.text


def test_exceptions_leave_a_checkpoint(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """``OnExceptionCheckpoint`` is complete when the exception leaves fit, resumes, and tidies up after."""

    class Raising(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 12:
                assert toy.complete(tmp_path) == set()
                raise ZeroDivisionError

    def run(*callbacks: Any) -> Any:
        return toy.trainer(
            lightning, tmp_path, callbacks=[lightning.callbacks.OnExceptionCheckpoint(str(tmp_path)), *callbacks]
        )

    with pytest.raises(ZeroDivisionError):
        run(Raising()).fit(Toy(), toy.loader())
    assert toy.complete(tmp_path) == {"on_exception.ckpt"}
    again = run()
    again.fit(Toy(), toy.loader())
    assert again.global_step == 24
    assert again.ckpt_path == str(tmp_path / "on_exception.ckpt")
    assert not (tmp_path / "on_exception.ckpt").exists()


def test_saved_outside_fit_is_committed_on_return(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """After ``fit``, and in hooks that run when nobody waits any more, a save is over when the call returns."""

    class Saving(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "hook.ckpt", storage_options={})
            assert toy.complete(tmp_path) == {"hook.ckpt"}

    run = toy.trainer(lightning, tmp_path, callbacks=[Saving()], max_epochs=1)
    run.fit(Toy(), toy.loader())
    run.save_checkpoint(tmp_path / "after.ckpt")
    run.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    assert toy.complete(tmp_path) == {"hook.ckpt", "after.ckpt"}
    assert "optimizer_states" not in ShardedCheckpointIO().load_checkpoint(tmp_path / "after.ckpt")


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, lightning: Any, Toy: Any, gate: threading.Event
) -> None:
    """A save in ``fit`` returns before its commit, and holds the weights of its call although they changed since."""

    class Watching(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                self.then = toy.digests(trainer)
                trainer.save_checkpoint(tmp_path / "early.ckpt")
            if trainer.global_step == 9:
                assert toy.complete(tmp_path) == set()
                gate.set()

    watching = Watching()
    toy.trainer(lightning, tmp_path, callbacks=[watching], max_epochs=1).fit(Toy(), toy.loader())
    saved = Toy.load_from_checkpoint(tmp_path / "early.ckpt").state_dict()
    assert {f"model.{name}": toy.digest(value) for name, value in saved.items()}.items() <= watching.then.items()


def test_slurm_requeues_only_a_complete_checkpoint(tmp_path: Path, lightning: Any, Toy: Any, monkeypatch: Any) -> None:
    """SLURM's signal handler saves, then has the job killed at once: the save is committed before that."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    signals = lightning.trainer.connectors.signal_connector
    at_requeue: list[set[str]] = []
    monkeypatch.setattr(signals, "call", lambda command: at_requeue.append(toy.complete(tmp_path)) or 0)

    class Signalled(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)

    run = toy.trainer(lightning, tmp_path, callbacks=[Signalled()], max_epochs=1)
    run.fit(Toy(), toy.loader())
    assert at_requeue == [{"hpc_ckpt_1.ckpt"}]
    again = toy.trainer(lightning, tmp_path, max_epochs=1)
    again.fit(Toy(), toy.loader(), ckpt_path="hpc")
    assert again.global_step == 12


def test_a_signal_during_a_save(tmp_path: Path, lightning: Any, Toy: Any, monkeypatch: Any) -> None:
    """A handler that saves while its own thread is inside another save does not hang, and both are complete."""
    from shardckpt.saving import halves

    stage = halves.stage

    class Saving(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            def interrupted(*args: Any, **kwargs: Any) -> None:
                monkeypatch.setattr(halves, "stage", stage)
                trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
                stage(*args, **kwargs)

            monkeypatch.setattr(halves, "stage", interrupted)
            trainer.save_checkpoint(tmp_path / "outer.ckpt")

    toy.trainer(lightning, tmp_path, callbacks=[Saving()], max_epochs=1).fit(Toy(), toy.loader())
    assert toy.complete(tmp_path) == {"hpc_ckpt_1.ckpt", "outer.ckpt"}


def test_a_signal_during_a_save_over_an_ordinary_file(
    tmp_path: Path, lightning: Any, Toy: Any, monkeypatch: Any
) -> None:
    """A save inside another leaves alone what has made way for that one, and which save removals wait for."""
    from shardckpt.saving import series

    write = series.write
    latest: list[Any] = []

    class Saving(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            io = trainer.strategy.checkpoint_io
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "before.ckpt")
                latest.append(io._latest)
            if batch_idx == 2:

                def interrupted(*args: Any, **kwargs: Any) -> Any:
                    monkeypatch.setattr(series, "write", write)
                    trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
                    latest.append(io._latest)
                    return write(*args, **kwargs)

                monkeypatch.setattr(series, "write", interrupted)
                trainer.save_checkpoint(tmp_path / "outer.ckpt")

    (tmp_path / "outer.ckpt").write_bytes(b"ordinary")
    toy.trainer(lightning, tmp_path, callbacks=[Saving()], max_epochs=1).fit(Toy(), toy.loader())
    assert toy.complete(tmp_path) == {"before.ckpt", "hpc_ckpt_1.ckpt", "outer.ckpt"}
    assert latest[0] is latest[1] is not None
    assert not list(tmp_path.glob("*.replaced"))


def test_a_removal_that_did_not_happen_can_be_asked_for_again() -> None:
    """How a checkpoint was saved is still known after a removal was dropped because the save before it failed."""
    from shardckpt.lightning.places import Places

    places = Places({"a": 1}, None)
    places.wrote("memory://x/epoch=0.ckpt", {"b": 2})
    places.removed("memory://x/epoch=0.ckpt")
    assert places.options_for("memory://x/epoch=0.ckpt/") == {"a": 1, "b": 2}
    assert places.options_for("memory://x/epoch=1.ckpt") == {"a": 1}


def test_without_checkpointing_nothing_happens(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """``enable_checkpointing=False`` saves nothing, and the plugin costs nothing."""
    run = toy.trainer(lightning, tmp_path, enable_checkpointing=False, max_epochs=1)
    run.fit(Toy(), toy.loader())
    assert list(tmp_path.iterdir()) == []
    assert run.strategy.checkpoint_io._checkpointer is None


def test_trainers_without_the_plugin_are_untouched(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """A Trainer of the same process that was not given the plugin saves ordinary files, by its own strategy."""
    io = ShardedCheckpointIO()
    run = toy.trainer(lightning, tmp_path, checkpoint={"filename": "a"}, plugins=[], max_epochs=1)
    run.fit(Toy(), toy.loader())
    assert (tmp_path / "a.ckpt").is_file()
    assert type(run.strategy).__name__ == "SingleDeviceStrategy"
    assert io in plugin.living


def test_the_callback_leaves_no_trace(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """A checkpoint names only callbacks that the user added, and loads where ours is not."""
    toy.trainer(lightning, tmp_path, checkpoint={"filename": "a"}, max_epochs=1).fit(Toy(), toy.loader())
    loaded = ShardedCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert loaded is not None
    assert [key.partition("{")[0] for key in loaded["callbacks"]] == ["ModelCheckpoint"]


def test_an_asynchronous_wrapper_is_taken_off(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """``AsyncCheckpointIO(ShardedCheckpointIO())`` works as the plugin alone does, without a second copy."""
    wrapped = lightning.plugins.io.AsyncCheckpointIO(ShardedCheckpointIO())
    run = toy.trainer(lightning, tmp_path, checkpoint={"filename": "a"}, plugins=[wrapped], max_epochs=1)
    run.fit(Toy(), toy.loader())
    assert isinstance(run.strategy.checkpoint_io, ShardedCheckpointIO)
    assert toy.complete(tmp_path) == {"a.ckpt"}


def test_an_ordinary_file_in_the_way_is_kept_until_replaced(
    tmp_path: Path, lightning: Any, Toy: Any, failing: list[str]
) -> None:
    """A project that switches to the plugin resumes from its ordinary ``last.ckpt`` and overwrites it safely."""
    options = {"filename": "{epoch}", "save_last": True}
    toy.trainer(lightning, tmp_path, checkpoint=options, plugins=[], max_epochs=1).fit(Toy(), toy.loader())
    assert (tmp_path / "last.ckpt").is_file()
    failing.append("last.ckpt")
    with pytest.raises(SaveFailedError):
        run = toy.trainer(lightning, tmp_path, checkpoint=options, max_epochs=2)
        run.fit(Toy(), toy.loader(), ckpt_path="last")
    assert (tmp_path / "last.ckpt").is_file()
    failing.clear()
    run = toy.trainer(lightning, tmp_path, checkpoint=options, max_epochs=2)
    run.fit(Toy(), toy.loader(), ckpt_path="last")
    assert run.global_step == 24
    assert "last.ckpt" in toy.complete(tmp_path)
    assert not list(tmp_path.glob("*.replaced"))


def test_ordinary_checkpoints_go_when_their_successor_is_complete(
    tmp_path: Path, lightning: Any, Toy: Any, failing: list[str]
) -> None:
    """Retention that began with stock files goes on with the plugin, and never removes the last good one."""
    options = {"filename": "{epoch}", "save_top_k": 1}
    toy.trainer(lightning, tmp_path, checkpoint=options, plugins=[], max_epochs=1).fit(Toy(), toy.loader())
    shutil.copy(tmp_path / "epoch=0.ckpt", tmp_path / "other.ckpt")

    def resume() -> None:
        run = toy.trainer(lightning, tmp_path, checkpoint=options, max_epochs=2)
        run.fit(Toy(), toy.loader(), ckpt_path=tmp_path / "other.ckpt")

    failing.append("epoch=1")
    with pytest.raises(SaveFailedError):
        resume()
    assert (tmp_path / "epoch=0.ckpt").is_file()
    failing.clear()
    resume()
    assert toy.complete(tmp_path) == {"epoch=1.ckpt"}
    assert not (tmp_path / "epoch=0.ckpt").exists()


def test_saving_twice_to_one_path(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """A callback that saves to one path at every step, and twice at some, leaves one whole checkpoint: the last."""

    class Saving(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            for _ in range(1 + trainer.global_step % 2):
                trainer.save_checkpoint(tmp_path / "same.ckpt")

    run = toy.trainer(lightning, tmp_path, callbacks=[Saving()], max_epochs=1)
    run.fit(Toy(), toy.loader())
    assert len(list((tmp_path / "same.ckpt").iterdir())) == 3
    loaded = Toy.load_from_checkpoint(tmp_path / "same.ckpt").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in run.lightning_module.state_dict().items())
