"""``overlap="step"`` through a Trainer: forward and backward run beside the copy, which is that of the save."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import toy

import shardckpt
from gates import Gate, gate, same
from shardckpt.lightning import ShardedCheckpointIO

OPTIONS = {"filename": "{step}", "every_n_train_steps": 2, "save_top_k": -1, "save_last": True}
SAVED = {"last.ckpt", *(f"step={step}.ckpt" for step in (2, 4, 6, 8, 10, 12))}


def train(lightning: Any, module: Any, folder: Path, callbacks: list[Any], **options: Any) -> Any:
    """An epoch with a checkpoint every two of its twelve steps."""
    lightning.seed_everything(5, verbose=False)
    io = ShardedCheckpointIO(timeout=30, commit_timeout=60, overlap=options.pop("overlap"))
    made = toy.trainer(
        lightning, folder, checkpoint=OPTIONS, callbacks=callbacks, plugins=[io], max_epochs=1, **options
    )
    made.fit(module(), toy.loader(), toy.loader(32))
    return made


@contextmanager
def opened_when_asked() -> Iterator[Gate]:
    """A gate that opens once somebody waits for what is behind it; callbacks close it again before each save."""
    with gate() as held:
        held.opens_when_asked = True
        yield held


def closing(lightning: Any, held: Gate) -> Any:
    """A callback that closes the gate before each save, and notes after which a backward ended beside the copy."""

    class Closing(lightning.callbacks.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.beside: list[int] = []

        def on_train_batch_end(self, *_: Any) -> None:
            held.asked.clear()
            held.open.clear()

        def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
            latest = trainer.strategy.checkpoint_io._latest
            if latest is not None and not latest.staged and not held.asked.is_set():
                self.beside.append(trainer.global_step)

        def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
            # Were a copy still to come, it would be made here and now.
            if (latest := trainer.strategy.checkpoint_io._latest) is not None:
                held.open.set()
                latest.wait_until_staged()

    return Closing()


class Manual:
    """Mixed into a module: it steps its optimizer itself, as for two losses."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.parametrize("how", ["automatic", "manual"])
def test_forward_and_backward_run_beside_the_copy(tmp_path: Path, lightning: Any, Toy: Any, how: str) -> None:
    """Every checkpoint is, bit for bit, the one that a run without overlap makes, and ``last`` still shares its files.

    Under automatic optimization forward and backward are in the closure that the step is given, so it waits there.
    """
    module = Toy if how == "automatic" else type("Toy", (Manual, Toy), {})
    with opened_when_asked() as held:
        seen = closing(lightning, held)
        train(lightning, module, tmp_path / "beside", [seen], overlap="step", limit_val_batches=0)
    assert seen.beside == [2, 4, 6, 8, 10]
    train(lightning, module, tmp_path / "before", [], overlap=None, limit_val_batches=0)
    check(tmp_path)
    (last,), (kept,) = toy.shards(tmp_path / "beside" / "last.ckpt"), toy.shards(tmp_path / "beside" / "step=12.ckpt")
    assert last.samefile(kept)


def check(folder: Path) -> None:
    for name in SAVED:
        left, right = (shardckpt.load(folder / run / name, weights_only=False) for run in ("beside", "before"))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state"):
            assert same(left.get(key), right.get(key)), f"{name}: {key}"


def test_weights_that_validation_swaps_are_saved_as_they_were(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """A callback that swaps weights behind torch's back, directly after a save, waits until they have been copied."""
    averaging = lightning.callbacks.weight_averaging.EMAWeightAveraging
    with opened_when_asked() as held:
        callbacks = [averaging(), closing(lightning, held)]
        train(lightning, Toy, tmp_path / "beside", callbacks, overlap="step", val_check_interval=2)
    train(lightning, Toy, tmp_path / "before", [averaging()], overlap=None, val_check_interval=2)
    check(tmp_path)
