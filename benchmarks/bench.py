"""One rank's side of a benchmark: clocks that all ranks share, and what they showed."""

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist

from benchmarks import process
from benchmarks.options import Options
from benchmarks.raw_disk import drop_from_cache, part_in_cache, read_into_cache
from benchmarks.record import Measurement

BUCKET = "s3://shardckpt-benchmarks"


def device() -> torch.device:
    """Where the tensors live: the one place that decides."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def synchronise() -> None:
    """Until the device has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Bench:
    """Measures on all ranks together. A time is that of the slowest rank, from a barrier on."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = device()
        self.repeat = 0
        self.measured: list[Measurement] = []
        self.skipped: dict[str, str] = {}
        # DCP's background thread runs collectives: on the group that the barriers here use, the two would get crossed.
        self.dcp_group = dist.new_group(backend="gloo")

    # -- places -----------------------------------------------------------------------------------------------------

    def place(self, name: str) -> str:
        """A path or URL for a checkpoint."""
        return f"{BUCKET}/{name}" if self.options.storage == "s3" else str(self.options.folder / name)

    def clear(self) -> None:
        """Empty the place for checkpoints, and let the disk come to rest."""
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(self.options.folder, ignore_errors=True)
            self.options.folder.mkdir(parents=True)
            if self.options.storage == "s3":
                bucket, _ = fsspec.core.url_to_fs(BUCKET)
                bucket.invalidate_cache()
                if bucket.exists(BUCKET):
                    bucket.rm(BUCKET, recursive=True)
                bucket.mkdir(BUCKET)
            os.sync()
        dist.barrier()

    def forget(self, place: str) -> None:
        """Drop what is stored at ``place`` from the page cache."""
        self._on_files(place, drop_from_cache)

    def warm(self, place: str) -> None:
        """Bring what is stored at ``place`` into the page cache, all of it."""
        self._on_files(place, read_into_cache)

    def part_in_cache(self, place: str) -> float:
        """Which part of what is stored at ``place`` the page cache of rank 0's host has."""
        part = torch.zeros((), dtype=torch.float64)
        if self.rank == 0 and "://" not in place:
            part.fill_(part_in_cache(Path(place)))
        dist.broadcast(part, 0)
        return float(part)

    def _on_files(self, place: str, act: Callable[[Path], None]) -> None:
        dist.barrier()
        if self.rank == 0 and "://" not in place:
            act(Path(place))
        dist.barrier()

    # -- measuring --------------------------------------------------------------------------------------------------

    def rounds(self, contenders: Mapping[str, Callable[[], None]]) -> None:
        """Every contender once in each repeat, the first of which is the warm-up.

        In an order of chance, the same in every run: by turns, each would always come after the same one, and find the
        disk and the page cache as that one leaves them.
        """
        chosen = [act for name, act in contenders.items() if self.options.wants(name)]
        for repeat in range(self.options.repeats + 1):
            self.repeat = repeat
            for act in random.Random(repeat).sample(chosen, len(chosen)):
                act()

    @contextmanager
    def timed(self, what: str, setting: str, contender: str, *, nbytes: int = 0) -> Iterator[dict[str, Any]]:
        """Record the seconds that the block takes, with what it used. What it yields becomes the record's details."""
        details: dict[str, Any] = {}
        process.forget_peak()
        synchronise()
        before, cpu = process.resident(), process.cpu_seconds()
        dist.barrier()
        start = time.perf_counter()
        yield details
        synchronise()
        seconds = time.perf_counter() - start
        self.note(
            what,
            setting,
            contender,
            seconds,
            nbytes=nbytes,
            cpu_seconds=process.cpu_seconds() - cpu,
            peak_memory=max(0, process.peak_resident() - before),
            details=details,
        )

    def note(
        self,
        what: str,
        setting: str,
        contender: str,
        value: float,
        *,
        unit: str = "s",
        nbytes: int = 0,
        cpu_seconds: float = 0.0,
        peak_memory: int = 0,
        details: dict[str, Any] | None = None,
    ) -> None:
        """Record a figure: the largest of all ranks, and the processor time of all."""
        figures = torch.tensor([value, float(peak_memory)], dtype=torch.float64)
        dist.all_reduce(figures, op=dist.ReduceOp.MAX)
        total = torch.tensor(cpu_seconds, dtype=torch.float64)
        dist.all_reduce(total)
        value, peak = figures.tolist()
        # The caller may add to the details until the record is made.
        details = {} if details is None else details
        self.measured.append(
            Measurement(what, setting, contender, self.repeat, value, unit, nbytes, float(total), int(peak), details)
        )

    def total(self, value: int) -> int:
        """Of all ranks."""
        whole = torch.tensor(value)
        dist.all_reduce(whole)
        return int(whole)

    def skip(self, what: str, why: str) -> None:
        """Say in the record that something was left out."""
        self.skipped[what] = why

    def room_for(self, nbytes: int, what: str) -> bool:
        """Whether every rank can have ``nbytes`` more of memory and leave a tenth of the machine's; else say so."""
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        figures = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        wanted = self.total(nbytes) + figures["MemTotal"] // 10
        enough = self.total(int(wanted <= figures["MemAvailable"])) == self.world
        if not enough:
            self.skip(
                what, f"needs {wanted / 2**30:.1f} GiB of memory of this machine's {figures['MemTotal'] / 2**30:.1f}"
            )
        return enough
