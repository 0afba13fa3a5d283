"""One rank of the demonstration: ``examples/train_digits.py`` under the eyes of a witness.

The witness writes down, outside the checkpoints, what happened: every loss, how long each save blocked training, a
digest of the whole state when it was saved, and the same on every rank when it had been restored.
"""

import hashlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_digits


class Witness(L.Callback):
    """Appends one JSON object a line to ``<folder>/<phase>-rank<k>.jsonl``; a line that is written survives SIGKILL."""

    def __init__(self, folder: Path, phase: int) -> None:
        self._notes = (folder / f"{phase}-rank{os.environ['RANK']}.jsonl").open("a", buffering=1, encoding="utf-8")
        self._digesting = 0.0

    def _note(self, event: str, step: int, **what: Any) -> None:
        self._notes.write(json.dumps({"event": event, "step": step, **what}) + "\n")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        save = trainer.save_checkpoint

        def timed_save(*args: Any, **kwargs: Any) -> None:
            self._digesting = 0.0
            start = time.perf_counter()
            save(*args, **kwargs)
            # Our own digest is computed in the middle of it, and is not what a user would wait for.
            seconds = time.perf_counter() - start - self._digesting
            self._note("save", trainer.global_step, path=str(args[0]), seconds=seconds)

        trainer.save_checkpoint = timed_save  # type: ignore[method-assign]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        start = time.perf_counter()
        self._note("saved", trainer.global_step, digests=dict(digests(trainer)))
        self._digesting += time.perf_counter() - start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note("started", trainer.global_step, digests=dict(digests(trainer)), processes=trainer.world_size)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._note("step", trainer.global_step, loss=float(trainer.callback_metrics["loss"]), time=time.time())


def digests(trainer: L.Trainer) -> Iterator[tuple[str, str]]:
    """SHA-256 of every tensor and value of the training state, by name."""
    names = {id(parameter): name for name, parameter in trainer.lightning_module.named_parameters()}
    for name, value in trainer.lightning_module.state_dict().items():
        yield f"model.{name}", _sha256(value)
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                yield f"optimizer.{names[id(parameter)]}.{name}", _sha256(value)
        for index, group in enumerate(optimizer.param_groups):
            yield f"optimizer.group{index}", _sha256({key: group[key] for key in sorted(group) if key != "params"})
    for index, config in enumerate(trainer.lr_scheduler_configs):
        yield f"scheduler{index}", _sha256(config.scheduler.state_dict())


def _sha256(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        data = f"{value.dtype} {tuple(value.shape)} ".encode() + value.detach().cpu().contiguous().numpy().tobytes()
    else:
        data = repr(value).encode()
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    # What Lightning says at each start is the same three times over; the demonstration has its own headings.
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", message=r".*(treespec, LeafSpec|exists and is not empty)")
    witness = Witness(Path(os.environ["WITNESS_DIR"]), int(os.environ["WITNESS_PHASE"]))
    train_digits.main(callbacks=[witness])
