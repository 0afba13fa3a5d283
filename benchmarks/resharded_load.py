"""Load what was saved by rows as columns, and whole on every rank: alone, by exchange, as "auto" decides, with dcp.

    torchrun --standalone --nproc-per-node 4 benchmarks/resharded_load.py

Places: the local disk, with the files dropped from the page cache before each load; and a storage of limited speed,
which is the same disk behind a bandwidth that every request of every rank gets (``--slow``), as a network file system
or an object store would give it. ``--s3 URL`` adds a bucket (``--s3-endpoint``, with credentials from the environment).

All contenders load the same tensors in the same run, one after the other in each repetition, in an order that rotates.
A time is that of the slowest rank; what was loaded is checked after each. The first repetition is a warm-up: recorded,
and left out of the medians. Between repetitions files and process groups stay, as between the loads of one job. The
record goes to ``benchmarks/results/``.
"""

import argparse
import datetime
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import shardckpt
from environment import keep, machine, versions
from raw_disk import drop_from_cache
from shardckpt import loading
from shardckpt.options import ShareReads
from shardckpt.storage import Storage, open_storage

WIDTH = 2048
"""Of the square tensors: 16 MiB of float32 each."""
SHARE: dict[str, ShareReads] = {"alone": False, "exchange": True, "auto": "auto"}
LAYOUTS: dict[str, Shard | Replicate] = {"rows to columns": Shard(1), "rows to replicas": Replicate()}


class Slow:
    """A storage whose every read takes the time that its bytes have at ``bytes_per_second``."""

    def __init__(self, inner: Storage, bytes_per_second: float) -> None:
        self._inner = inner
        self._bytes_per_second = bytes_per_second
        self.read_cache = ""  # as of a network file system that each rank mounts on a host of its own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read_into(self, name: str, offset: int, into: memoryview) -> None:
        time.sleep(len(into) / self._bytes_per_second)
        self._inner.read_into(name, offset, into)


class Bench:
    """Seconds by place, layout and contender, one element a repetition; and the bytes that came from storage."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.load = os.getloadavg()[0]
        """Of the machine over the last minute: a busy one measures something else."""
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.mesh: DeviceMesh = init_device_mesh("cpu", (self.world,))
        self.root: Path = args.dir
        self.slow = args.slow * 1e6
        self.s3: str | None = args.s3
        self.s3_options = {"client_kwargs": {"endpoint_url": args.s3_endpoint}} if args.s3_endpoint else {}
        self.names = [f"layers.{number}.weight" for number in range(max(1, args.mib // 16))]
        self.nbytes = len(self.names) * 4 * WIDTH * WIDTH
        self.seconds: dict[tuple[str, str, str], list[float]] = {}
        self.bytes_read: dict[tuple[str, str, str], list[int]] = {}
        self.checkpointers = {name: shardckpt.Checkpointer(share_reads=share) for name, share in SHARE.items()}

    def whole(self, number: int) -> torch.Tensor:
        """What is saved under a name: float32 that no two tensors and no two rows share."""
        rows = torch.arange(WIDTH, dtype=torch.float32)[:, None] * WIDTH
        return (rows + torch.arange(WIDTH, dtype=torch.float32)).mul_(1.0 + number)

    def state(self, placement: Shard | Replicate, *, fill: bool) -> dict[str, Any]:
        state = {}
        for number, name in enumerate(self.names):
            whole = self.whole(number) if fill else torch.zeros(WIDTH, WIDTH)
            local = whole
            if isinstance(placement, Shard):
                local = whole.chunk(self.world, dim=placement.dim)[self.rank].clone()
            state[name] = DTensor.from_local(local, self.mesh, [placement], run_check=False)
        return state

    def save(self) -> None:
        if self.rank == 0:
            shutil.rmtree(self.root, ignore_errors=True)
            self.root.mkdir(parents=True)
        dist.barrier()
        state = self.state(Shard(0), fill=True)
        self.checkpointers["alone"].save(state, self.root / "ours")
        if self.s3:
            self.checkpointers["alone"].save(state, self.s3, storage_options=self.s3_options)
        dcp_save(state, checkpoint_id=self.root / "dcp")

    def run(self, repetition: int) -> None:
        for layout, placement in LAYOUTS.items():
            live = self.state(placement, fill=False)
            contenders: list[tuple[str, str]] = [("disk", name) for name in (*SHARE, "dcp")]
            contenders += [("slow storage", name) for name in SHARE]
            contenders += [("s3", name) for name in SHARE if self.s3]
            turn = repetition % len(contenders)
            for place, name in contenders[turn:] + contenders[:turn]:
                with self.loading((place, layout, name), live):
                    if name == "dcp":
                        dcp_load(live, checkpoint_id=self.root / "dcp")
                        continue
                    with storage_made(self.wrapper(place)):
                        url = self.s3 if place == "s3" and self.s3 else self.root / "ours"
                        options = self.s3_options if place == "s3" else {}
                        report = self.checkpointers[name].load(url, live, storage_options=options)
                nbytes = torch.tensor(report.bytes_read)
                dist.all_reduce(nbytes)
                self.bytes_read.setdefault((place, layout, name), []).append(int(nbytes))

    def wrapper(self, place: str) -> Callable[[Storage], Storage]:
        def wrap(storage: Storage) -> Storage:
            return cast(Storage, Slow(storage, self.slow)) if place == "slow storage" else storage

        return wrap

    @contextmanager
    def loading(self, key: tuple[str, str, str], live: dict[str, Any]) -> Iterator[None]:
        """Seconds until the slowest rank is through: of files that are not in the cache, into wrong tensors."""
        for tensor in live.values():
            tensor.to_local().zero_()
        dist.barrier()
        if self.rank == 0:
            drop_from_cache(self.root)
        dist.barrier()
        start = time.perf_counter()
        yield
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        self.seconds.setdefault(key, []).append(float(seconds))
        for number, tensor in enumerate(live.values()):
            local = tensor.to_local()
            columns = local.shape[1]
            first = 0 if columns == WIDTH else self.rank * columns
            if not torch.equal(local, self.whole(number)[:, first : first + columns]):
                raise RuntimeError(f"{key} did not bring tensor {number} back")


@contextmanager
def storage_made(wrap: Callable[[Storage], Storage]) -> Iterator[None]:
    """Let loads read through what ``wrap`` makes of their storage."""
    with mock.patch.object(loading, "open_storage", lambda place, options: wrap(open_storage(place, options))):
        yield


def record(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, with everything needed to judge it."""
    medians = {key: median(seconds[1:] or seconds) for key, seconds in bench.seconds.items()}
    return {
        "benchmark": "resharded_load",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "config": {
            "ranks": bench.world,
            "state_bytes": bench.nbytes,
            "slow_storage_bytes_per_second_and_request": bench.slow,
            "load_average_before": bench.load,
            "repetitions": args.repeats,
            "warm_up": 1,
        },
        "machine": machine(args.dir.parent),
        "versions": versions(),
        "results": {
            ", ".join(key): {
                "median_seconds": medians[key],
                "seconds": bench.seconds[key],
                **({"bytes_read_by_all": bench.bytes_read[key]} if key in bench.bytes_read else {}),
            }
            for key in sorted(medians)
        },
        "ratios": ratios(medians),
    }


def ratios(medians: Mapping[tuple[str, str, str], float]) -> dict[str, float]:
    """How many times as long as the exchange reading alone takes, and as the better of the two "auto"."""
    found = {}
    for place, layout in sorted({key[:2] for key in medians}):
        alone, exchange, auto = (medians[place, layout, name] for name in SHARE)
        found[f"{place}, {layout}: alone / exchange"] = alone / exchange
        found[f"{place}, {layout}: auto / the better"] = auto / min(alone, exchange)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="size of the state in MiB, in tensors of 16")
    parser.add_argument("--repeats", type=int, default=3, help="counted repetitions, after one that is not")
    parser.add_argument("--slow", type=float, default=25.0, help="MB/s of each request to the slow storage")
    parser.add_argument("--s3", help="URL to save to and load from as well")
    parser.add_argument("--s3-endpoint", help="of the server behind it")
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmark"), help="emptied; on the disk to measure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON record")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    bench = Bench(args)
    bench.save()
    for repetition in range(args.repeats + 1):
        bench.run(repetition)
    if bench.rank == 0:
        shutil.rmtree(args.dir, ignore_errors=True)
        found = record(bench, args)
        for name, result in found["results"].items():
            seconds = result["median_seconds"]
            print(f"{name:50}{seconds:9.3f} s {bench.nbytes / seconds / 1e9:6.2f} GB/s")
        for name, ratio in found["ratios"].items():
            print(f"{name:60}{ratio:7.2f}x")
        keep(found, args.out / f"resharded_load-{args.mib}MiB-{bench.world}ranks.json")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
