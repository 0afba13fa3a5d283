"""A run that ends while a save is in flight, by a signal or an error: the save is finished, or cleanly abandoned."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import toy

from shardckpt import commit


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, failing: list[str]) -> list[str]:
    """Commits take a moment, so that the run goes on before they are over; what was being committed when."""
    publish, begun = commit.publish, []

    def slowly(storage: Any, *args: Any) -> None:
        begun.append(Path(storage.url).name)
        time.sleep(0.5)
        publish(storage, *args)

    monkeypatch.setattr(commit, "publish", slowly)
    return begun


def saving_and(lightning: Any, folder: Path, act: Any) -> Any:
    """A callback that saves ``early.ckpt``, and ``act``s while that is in flight."""

    class Saving(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(folder / "early.ckpt")
                assert toy.complete(folder) == {"before.ckpt"}
                act()

    return Saving()


def raising() -> None:
    raise ZeroDivisionError("in training")


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def folder(tmp_path: Path, lightning: Any, Toy: Any) -> Path:
    """With a checkpoint in it, ``before.ckpt``."""
    run = toy.trainer(lightning, tmp_path, max_epochs=1)
    run.fit(Toy(), toy.loader())
    run.save_checkpoint(tmp_path / "before.ckpt")
    return tmp_path


def no_rubbish(folder: Path) -> bool:
    """Whether each checkpoint there has its three files, and nothing else is there."""
    return all(len(list(place.iterdir())) == 3 for place in folder.glob("*.ckpt"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_save_in_flight_survives_preemption(
    fails: bool, folder: Path, lightning: Any, Toy: Any, slow: list[str], failing: list[str], caplog: Any
) -> None:
    """SIGTERM while a save is in flight: the process ends when that is committed, or has left nothing behind."""
    failing += ["early"] if fails else []
    run = toy.trainer(lightning, folder, callbacks=[saving_and(lightning, folder, terminated)])
    with pytest.raises(SystemExit):
        run.fit(Toy(), toy.loader())
    assert slow == ["early.ckpt"]
    assert toy.complete(folder) == {"before.ckpt"} | (set() if fails else {"early.ckpt"})
    assert no_rubbish(folder)
    assert ("no room for" in caplog.text) == fails
    record = toy.recorder(lightning)
    again = toy.trainer(lightning, folder, callbacks=[record])
    again.fit(Toy(), toy.loader(), ckpt_path=folder / ("before.ckpt" if fails else "early.ckpt"))
    assert record.position[1] == (12 if fails else 5)


@pytest.mark.parametrize("fails", [[], ["early"], ["on_exception"], ["early", "on_exception"]])
@pytest.mark.parametrize("act", [raising, terminated])
def test_an_emergency_save_follows_the_one_in_flight(
    act: Any, fails: list[str], folder: Path, lightning: Any, Toy: Any, slow: list[str], failing: list[str]
) -> None:
    """``OnExceptionCheckpoint`` waits for the save in flight, takes nothing from it, and hides no error by its own."""
    failing += fails
    callbacks = [saving_and(lightning, folder, act), lightning.callbacks.OnExceptionCheckpoint(str(folder))]
    run = toy.trainer(lightning, folder, callbacks=callbacks)
    with pytest.raises(ZeroDivisionError if act is raising else SystemExit):
        run.fit(Toy(), toy.loader())
    assert slow == ["early.ckpt", "on_exception.ckpt"]
    assert toy.complete(folder) == {"before.ckpt", "early.ckpt", "on_exception.ckpt"} - {f"{x}.ckpt" for x in fails}
    assert no_rubbish(folder)


def test_an_emergency_save_to_the_path_of_the_one_in_flight(
    folder: Path, lightning: Any, Toy: Any, slow: list[str]
) -> None:
    """The emergency's checkpoint replaces the one that is being written to its path, once that is committed."""
    emergency = lightning.callbacks.OnExceptionCheckpoint(str(folder), filename="early")
    run = toy.trainer(lightning, folder, callbacks=[saving_and(lightning, folder, raising), emergency])
    with pytest.raises(ZeroDivisionError):
        run.fit(Toy(), toy.loader())
    assert slow == ["early.ckpt"] * 2
    assert toy.complete(folder) == {"before.ckpt", "early.ckpt"}
    assert no_rubbish(folder)
