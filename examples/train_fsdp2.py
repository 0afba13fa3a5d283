"""Train on images of digits under FSDP2: kill it at any time, and it goes on where it was, on any number of processes.

As in ``torchrun --nproc-per-node 4 examples/train_fsdp2.py runs/digits``, and then with ``--nproc-per-node 2``.
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.distributed.fsdp import fully_shard
from torch.nn import Linear, ReLU, Sequential

import shardckpt

BATCH = 96  # of all ranks together: how many there are does not change what is learned


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", help="where the checkpoints go: a directory that all nodes share, or s3://bucket/run")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="steps from one checkpoint to the next")
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()

    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = Sequential(Linear(64, 512), ReLU(), Linear(512, 512), ReLU(), Linear(512, 10))
    fully_shard(model.to(device))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, chosen.steps)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}

    with shardckpt.CheckpointManager(chosen.root, keep_last=2, keep_best=1, metric="loss") as manager:
        for step in range(manager.restore(state) or 0, chosen.steps):
            draw = torch.Generator().manual_seed(step)
            batch = torch.randint(len(images), (BATCH,), generator=draw)[rank::world_size]
            loss = torch.nn.functional.cross_entropy(model(images[batch].to(device)), labels[batch].to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if (step + 1) % chosen.every == 0:
                dist.all_reduce(mean := loss.detach() / world_size)
                manager.save(step + 1, state, {"loss": mean.item()})  # training goes on meanwhile
                if rank == 0:
                    print(f"step {step + 1} on {world_size} ranks: loss {mean.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
