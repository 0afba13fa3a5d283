"""Train a small convolutional network on scikit-learn's handwritten digits, with sharded asynchronous checkpoints.

    torchrun --standalone --nproc-per-node 2 examples/train_digits.py
    torchrun --standalone --nproc-per-node 3 examples/train_digits.py --resume last

Saved on two processes, resumed on three: nothing in this file says how many there are. What makes its checkpoints
sharded and asynchronous is one line, ``plugins=[ShardedCheckpointIO()]``.
"""

import argparse
import os
from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from shardckpt.lightning import ShardedCheckpointIO

Batch = tuple[Tensor, ...]  # images, labels


class Digits(L.LightningDataModule):
    """1,797 grey images of 8x8 pixels, ten classes. They come with scikit-learn: nothing is downloaded."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        data = TensorDataset(pixels, torch.tensor(labels))
        self.train, self.val = random_split(data, [0.8, 0.2], generator=torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.val, batch_size=256)


class Classifier(L.LightningModule):
    """Two convolutions and a head. ``width`` channels: 64 make 0.3 million parameters, 256 make 4.4 million."""

    def __init__(self, width: int = 128, lr: float = 3e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(width * 16, width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(width, 10),
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        correct = (self.net(images).argmax(1) == labels).float().mean()
        self.log("val_accuracy", correct, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.9)]


def main(argv: Sequence[str] | None = None, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", default="runs/digits", help="directory or s3:// prefix for the checkpoints")
    parser.add_argument("--resume", default=None, help='"last", "best", or the path of a checkpoint')
    parser.add_argument("--max-steps", type=int, default=600)
    parser.add_argument("--save-every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--width", type=int, default=128, help="channels of the network: how big a checkpoint is")
    args = parser.parse_args(argv)

    L.seed_everything(1, verbose=False)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun says how many it started here
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        max_steps=args.max_steps,
        plugins=[ShardedCheckpointIO()],
        callbacks=[
            ModelCheckpoint(
                dirpath=args.checkpoints,
                filename="{step}",
                every_n_train_steps=args.save_every,
                monitor="step",
                mode="max",
                save_top_k=2,
                save_last=True,
            ),
            TQDMProgressBar(refresh_rate=5),
            *callbacks,
        ],
        logger=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(width=args.width), Digits(), ckpt_path=args.resume)
    return trainer


if __name__ == "__main__":
    main()
