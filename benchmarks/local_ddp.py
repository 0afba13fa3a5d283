"""Save and load a DDP training state on a local disk: shardckpt, torch.distributed.checkpoint, torch.save, raw disk.

    torchrun --standalone --nproc-per-node 2 benchmarks/local_ddp.py --gib 1

All contenders save and load the same model and AdamW state, in the same run, one after the other in each repetition, in
an order that rotates. A time is that of the slowest rank. Every save is durable when its time ends (files are fsynced).
Every load begins with the files dropped from the page cache and ends with the state in the live model and optimizer.
The first repetition is a warm-up: recorded, and left out of the medians. The record goes to ``benchmarks/results/``.
"""

import argparse
import datetime
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.nn.parallel import DistributedDataParallel

import shardckpt
from environment import keep, machine, versions
from raw_disk import RawDisk, drop_from_cache

WIDTH = 2048
"""Of the square layers: 16 MiB of float32 each, 48 MiB with their optimizer state."""
SAVE_LIMIT, LOAD_LIMIT = "raw disk, write", "raw disk, read"
ASYNC_FIRST, ASYNC_AGAIN = "async_save blocks, first", "async_save blocks, again"


class Training:
    """A model under DDP and its optimizer, with state of ``nbytes`` on every rank, about ``gib`` GiB."""

    def __init__(self, gib: float) -> None:
        layers = max(1, round(gib * 2**30 / (3 * 4 * WIDTH * WIDTH)))
        torch.manual_seed(0)
        self.model = DistributedDataParallel(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (parameter.detach() for parameter in self.model.parameters())
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def fingerprint(self) -> list[float]:
        """One number a tensor that any wrong or missing part would change."""
        return [float(tensor.double().sum()) for tensor in self.tensors()]

    def scramble(self) -> None:
        """Overwrite the state, so that a load that does nothing is found out."""
        for tensor in self.tensors():
            tensor.zero_()


class Bench:
    """Contenders by name, and the seconds that each took, one element a repetition."""

    def __init__(self, training: Training, root: Path) -> None:
        self.training, self.root = training, root
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.seconds: dict[str, list[float]] = {}
        # dcp's background thread runs collectives: on the group that the barriers here use, the two get crossed.
        self.dcp_group = dist.new_group(backend="gloo")
        self.disk = RawDisk()
        self.checkpointer = shardckpt.Checkpointer()
        self.expected = training.fingerprint()

    def run(self, repetition: int) -> None:
        contenders = [self.raw, self.ours, self.ours_async, self.dcp, self.dcp_async, self.torch_save]
        turn = repetition % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            if self.rank == 0:
                shutil.rmtree(self.root, ignore_errors=True)
                self.root.mkdir(parents=True)
                os.sync()
            dist.barrier()
            contender()

    def raw(self) -> None:
        share = -(-self.training.nbytes // self.world)
        with self.timed(SAVE_LIMIT):
            self.disk.write(self.root / f"raw-{self.rank}", share)
        self.forget()
        # Each byte comes off the disk once. A load needs every byte on every rank, and may find in the page cache what
        # another rank has just read: no load can be faster than this, however it shares.
        with self.timed(LOAD_LIMIT):
            self.disk.read(self.root / f"raw-{self.rank}")

    def ours(self) -> None:
        state = {"model": self.training.model, "optimizer": self.training.optimizer}
        with self.timed("shardckpt save"):
            self.checkpointer.save(state, self.root / "ours")
        with self.loading("shardckpt load"):
            self.checkpointer.load(self.root / "ours", state)

    def ours_async(self) -> None:
        state = {"model": self.training.model, "optimizer": self.training.optimizer}
        checkpointer = shardckpt.Checkpointer()
        for name in (ASYNC_FIRST, ASYNC_AGAIN):
            with self.timed(f"shardckpt {name}"):
                pending = checkpointer.async_save(state, self.root / "ours")
            pending.result()
        checkpointer.close()

    def dcp(self) -> None:
        with self.timed("dcp save"):
            dcp_save(self.dcp_state(), checkpoint_id=self.root / "dcp", process_group=self.dcp_group)

        def load() -> None:
            state = self.dcp_state()
            dcp_load(state, checkpoint_id=self.root / "dcp", process_group=self.dcp_group)
            set_state_dict(
                self.training.model,
                self.training.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )

        with self.loading("dcp load"):
            load()

    def dcp_async(self) -> None:
        # Its default, which allocates anew at each save, and the stager that it offers to those who keep one.
        with self.timed(f"dcp {ASYNC_FIRST}"):
            pending = self.dcp_start("dcp0", None)
        pending.result()
        stager = DefaultStager(StagingOptions(False, False, False, False))
        self.dcp_start("dcp1", stager).result()
        with self.timed(f"dcp {ASYNC_AGAIN}"):
            pending = self.dcp_start("dcp2", stager)
        pending.result()
        stager.close()

    def dcp_start(self, name: str, stager: DefaultStager | None) -> Future[Any]:
        pending = dcp_async_save(
            self.dcp_state(), checkpoint_id=self.root / name, process_group=self.dcp_group, async_stager=stager
        )
        return pending.upload_completion if isinstance(pending, AsyncSaveResponse) else pending

    def torch_save(self) -> None:
        path = self.root / "rank0.pt"
        with self.timed("torch.save save"):
            if self.rank == 0:
                with path.open("wb") as file:
                    model, optimizer = self.training.model.module, self.training.optimizer
                    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
                    file.flush()
                    os.fsync(file.fileno())
        with self.loading("torch.save load"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.training.model.module.load_state_dict(state["model"])
            self.training.optimizer.load_state_dict(state["optimizer"])

    def dcp_state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.training.model, self.training.optimizer)
        return {"model": model, "optimizer": optimizer}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Seconds until the slowest rank is through."""
        dist.barrier()
        start = time.perf_counter()
        yield
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        self.seconds.setdefault(name, []).append(float(seconds))

    @contextmanager
    def loading(self, name: str) -> Iterator[None]:
        """The same for a load: of files that are not in the cache, into a state that is wrong before."""
        self.training.scramble()
        self.forget()
        with self.timed(name):
            yield
        if self.training.fingerprint() != self.expected:
            raise RuntimeError(f"{name} did not bring the state back")

    def forget(self) -> None:
        dist.barrier()
        if self.rank == 0:
            drop_from_cache(self.root)
        dist.barrier()


def record(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, with everything needed to judge it."""
    nbytes = bench.training.nbytes
    results: dict[str, dict[str, Any]] = {}
    for name, seconds in sorted(bench.seconds.items()):
        middle = median(seconds[1:] or seconds)
        limit = LOAD_LIMIT if name.endswith(("load", "read")) else SAVE_LIMIT
        results[name] = {"median_seconds": middle, "seconds": seconds}
        if "async_save" not in name:
            results[name] |= {
                "gb_per_second": nbytes / middle / 1e9,
                "share_of_raw_disk": median(bench.seconds[limit][1:] or bench.seconds[limit]) / middle,
            }
    return {
        "benchmark": "local_ddp",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "config": {"ranks": bench.world, "state_bytes": nbytes, "repetitions": args.repeats, "warm_up": 1},
        "machine": machine(args.dir.parent),
        "versions": versions(),
        "results": results,
        "ratios": ratios({name: result["median_seconds"] for name, result in results.items()}),
    }


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """How many times as long the others took."""
    return {
        f"{other} / shardckpt, {what}": seconds[f"{other} {what}"] / seconds[f"shardckpt {what}"]
        for other in ("dcp", "torch.save")
        for what in ("save", "load", ASYNC_FIRST, ASYNC_AGAIN)
        if f"{other} {what}" in seconds
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state in GiB")
    parser.add_argument("--repeats", type=int, default=5, help="counted repetitions, after one that is not")
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmark"), help="emptied; on the disk to measure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON record")
    args = parser.parse_args()

    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    bench = Bench(Training(args.gib), args.dir)
    for repetition in range(args.repeats + 1):
        bench.run(repetition)
    bench.checkpointer.close()
    if bench.rank == 0:
        shutil.rmtree(args.dir, ignore_errors=True)
        found = record(bench, args)
        for name, result in found["results"].items():
            speed = f"{result['gb_per_second']:6.2f} GB/s" if "gb_per_second" in result else ""
            print(f"{name:40}{result['median_seconds']:9.3f} s {speed}")
        for name, ratio in found["ratios"].items():
            print(f"{name:60}{ratio:7.1f}x")
        keep(found, args.out / f"local_ddp-{args.gib:g}GiB-{bench.world}ranks.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
