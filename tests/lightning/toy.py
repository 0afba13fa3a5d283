"""A small training job for either flavour of Lightning, and what its state looks like from outside."""

import hashlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

FEATURES, CLASSES = 16, 4


def package(name: str) -> Any:
    """``lightning.pytorch`` or ``pytorch_lightning``, with the submodules that tests use."""
    for module in ("callbacks", "plugins", "strategies", "tuner", "plugins.io", "callbacks.weight_averaging"):
        importlib.import_module(f"{name}.{module}")
    return importlib.import_module(name)


def samples(count: int = 96) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, FEATURES, generator=generator)
    return torch.utils.data.TensorDataset(x, x[:, :CLASSES].argmax(1))


def loader(count: int = 96, **options: Any) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(samples(count), batch_size=8, **options)


def module_class(lightning: Any) -> Any:
    """A classifier with BatchNorm, AdamW and a scheduler, and `Counting`, a datamodule with state."""

    class Toy(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, width: int = 24, lr: float = 1e-2, note: object = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(
                nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, CLASSES)
            )

        def loss(self, batch: Any) -> torch.Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch), sync_dist=True)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch), sync_dist=True)

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0])

        def configure_optimizers(self) -> Any:
            decayed = [p for p in self.parameters() if p.ndim > 1]
            other = [p for p in self.parameters() if p.ndim <= 1]
            groups = [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"])
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    return Toy


def counting_class(lightning: Any) -> Any:
    class Counting(lightning.LightningDataModule):  # type: ignore[misc]
        def __init__(self, size: int = 96) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.handed_out = 0

        def train_dataloader(self) -> Any:
            self.handed_out += 1
            return loader(self.hparams["size"])

        def val_dataloader(self) -> Any:
            return loader(32)

        def state_dict(self) -> dict[str, Any]:
            return {"handed_out": self.handed_out, "shown": torch.arange(3)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.handed_out = state_dict["handed_out"]
            self.shown = state_dict["shown"]

    return Counting


def trainer(lightning: Any, folder: Path | str, *, checkpoint: dict[str, Any] | None = None, **options: Any) -> Any:
    """A quiet Trainer on the CPU, with a ModelCheckpoint of ``checkpoint`` options and the plugin."""
    from shardckpt.lightning import ShardedCheckpointIO

    callbacks = list(options.pop("callbacks", []))
    if checkpoint is not None:
        callbacks.append(lightning.callbacks.ModelCheckpoint(str(folder), **checkpoint))
    elif "enable_checkpointing" not in options:
        options["enable_checkpointing"] = any(isinstance(c, lightning.callbacks.Checkpoint) for c in callbacks)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "default_root_dir": None if "://" in str(folder) else str(folder),
    }
    if "plugins" not in options:
        options["plugins"] = [ShardedCheckpointIO(timeout=30, commit_timeout=60)]
    return lightning.Trainer(callbacks=callbacks, **(defaults | options))


def digests(trainer: Any) -> dict[str, str]:
    """A digest of everything that a resumed run must have back, by name."""
    return dict(_digests(trainer))


def _digests(trainer: Any) -> Iterator[tuple[str, str]]:
    names = {id(parameter): name for name, parameter in trainer.lightning_module.named_parameters()}
    for name, value in trainer.lightning_module.state_dict().items():
        yield f"model.{name}", digest(value)
    for number, optimizer in enumerate(trainer.optimizers):
        for parameter, state in optimizer.state.items():
            for key, value in (state or {}).items():
                yield f"optimizer{number}.{names[id(parameter)]}.{key}", digest(value)
        for index, group in enumerate(optimizer.param_groups):
            yield f"optimizer{number}.group{index}", digest({k: group[k] for k in sorted(group) if k != "params"})
    for index, config in enumerate(trainer.lr_scheduler_configs):
        yield f"scheduler{index}", digest(config.scheduler.state_dict())


def digest(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        kind = f"{value.dtype} {tuple(value.shape)} ".encode()
        return hashlib.sha256(kind + value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def recorder(lightning: Any, digests: Callable[[Any], dict[str, str]] = digests) -> Any:
    """A callback that keeps the digests and the position at the start and the end of training."""

    class Recorder(lightning.callbacks.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.start: dict[str, str] = {}
            self.end: dict[str, str] = {}
            self.position: tuple[int, int] = (-1, -1)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.start = digests(trainer)
            self.position = (trainer.current_epoch, trainer.global_step)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.end = digests(trainer)

    return Recorder()


def shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("rank-*.safetensors"))


def tensors(shard: Path) -> list[str]:
    """The names of the entries of a shard."""
    with safetensors.safe_open(shard, "pt") as opened:
        return list(opened.keys())


def complete(folder: Path) -> set[str]:
    """The names of the complete checkpoints in a folder."""
    return {path.parent.name for path in folder.glob("*/manifest.json")}
