"""A real Trainer under DDP: how long each checkpoint holds the training loop up, and what it writes.

``save_last=True`` beside ``save_top_k`` makes Lightning save twice at each trigger. The stall is the time that
ModelCheckpoint's hook takes in a batch that saves, both saves together; the first of a fit and the later ones apart.
Bytes written are those that the ranks handed to the disk during the fit, by trigger. Lightning's own plugins do not
sync their files, so that their checkpoints may be lost with the machine; ours are durable at the end of the fit. The
last checkpoint is compared with the model that was trained.
"""

import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import nn
from torch.utils.data import DataLoader

import shardckpt
from benchmarks import process
from benchmarks.bench import Bench
from benchmarks.options import GIB, Launch, Options, size_text
from benchmarks.record import Target
from benchmarks.states import WIDTH
from shardckpt.lightning import ShardedCheckpointIO

OURS, TORCH, ASYNC = "ShardedCheckpointIO", "TorchCheckpointIO", "AsyncCheckpointIO"
FIRST, STEADY, FIT = "stall of a trigger, first", "stall of a trigger, steady", "fit"
WRITTEN = "bytes written a trigger"
ONE_SAVE = f"{OURS}, save_top_k alone"
TRIGGERS = 4
BETWEEN = 4
"""Steps from one trigger to the next."""
TARGETS = (
    Target("save_last beside save_top_k: one stall a trigger", (STEADY, OURS), (STEADY, ONE_SAVE), at_most=1.2),
    Target("save_last beside save_top_k: one write a trigger", (WRITTEN, OURS), (WRITTEN, ONE_SAVE), at_most=1.05),
    Target("save_last beside save_top_k: the bytes of the state once", (WRITTEN, OURS), at_most=1.05, per_byte=True),
    Target("stall shorter than AsyncCheckpointIO's", (STEADY, OURS), (STEADY, ASYNC), at_most=1.0),
)


def launches(options: Options) -> Iterable[Launch]:
    names = [name for name in (OURS, ONE_SAVE, TORCH, ASYNC) if options.wants(name)]
    for gib in options.sizes(small=1 / 16, full=(2,)):
        for repeat in range(1, options.repeats + 1):
            turn = repeat % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                yield Launch(options.ranks or 2, {"gib": gib, "name": name, "repeat": repeat})


class Model(L.LightningModule):
    """Square layers, of which each batch uses one: the state is large, and the step is quick."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layers(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class TimedCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that remembers how long it held each saving batch up."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stalls: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        dist.barrier()
        start = time.perf_counter()
        super().on_train_batch_end(trainer, *args, **kwargs)
        seconds = time.perf_counter() - start
        if trainer.global_step % BETWEEN == 0:
            self.stalls.append(seconds)


def work(bench: Bench, *, gib: float, name: str, repeat: int) -> None:
    bench.repeat = repeat
    setting = f"DDP, {size_text(gib)}, {bench.world} ranks"
    # The state, its gradients with their buckets; and AsyncCheckpointIO's clone of the state for each save under way.
    if not bench.room_for(int(gib * GIB * 1.7 + (gib * GIB if name == ASYNC and bench.rank == 0 else 0)), setting):
        return
    bench.clear()
    warnings.filterwarnings("ignore", module="lightning")
    layers = max(1, round(gib * GIB / (3 * 4 * WIDTH * WIDTH)))
    plugin = {OURS: ShardedCheckpointIO, ONE_SAVE: ShardedCheckpointIO, TORCH: TorchCheckpointIO}.get(name)
    checkpoint = TimedCheckpoint(
        dirpath=bench.place("checkpoints"), every_n_train_steps=BETWEEN, save_top_k=1, save_last=name != ONE_SAVE
    )
    trainer = L.Trainer(
        accelerator="gpu" if bench.device.type == "cuda" else "cpu",
        strategy="ddp",
        devices=bench.world,
        max_steps=TRIGGERS * BETWEEN,
        plugins=[plugin() if plugin else AsyncCheckpointIO(TorchCheckpointIO())],
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=bench.options.folder,
    )
    model = Model(layers)
    samples: Any = [torch.rand(WIDTH) for _ in range(2 * TRIGGERS * BETWEEN)]
    batches: DataLoader[torch.Tensor] = DataLoader(samples, batch_size=1)
    written = process.bytes_written()
    start = time.perf_counter()
    trainer.fit(model, batches)
    seconds = time.perf_counter() - start
    written = process.bytes_written() - written
    state_bytes = layers * 3 * 4 * WIDTH * WIDTH
    first, _, *steady = checkpoint.stalls
    bench.note(FIRST, setting, name, first, nbytes=state_bytes)
    # One figure a job: those of one job are no repeats of each other.
    bench.note(STEADY, setting, name, median(steady), nbytes=state_bytes, details={"stalls": steady})
    bench.note(FIT, setting, name, seconds)
    triggers = len(checkpoint.stalls)
    bench.note(WRITTEN, setting, name, bench.total(written) / triggers, unit="B", nbytes=state_bytes)
    verify(bench, model, checkpoint, name)


def verify(bench: Bench, model: Model, checkpoint: TimedCheckpoint, name: str) -> None:
    """Raise unless the newest checkpoint has the trained weights."""
    path = Path(checkpoint.best_model_path)
    if path.is_dir():
        saved = shardckpt.load(path)["state_dict"]
    else:
        saved = torch.load(path, weights_only=True, mmap=True)["state_dict"]
    if not all(torch.equal(saved[key], value.cpu()) for key, value in model.state_dict().items()):
        raise RuntimeError(f"{name} did not keep the model on rank {bench.rank}")
