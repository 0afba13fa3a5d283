"""Loads by another number of ranks, and across axes: what another layout costs per byte.

Two ranks save by rows. What is compared: loaded by rows on 1 and on 3 ranks, against what 1 and 3 ranks load of a
checkpoint that as many saved, so that nothing but the layout differs; and by columns and as replicas on 2 ranks. Every
load is cold, and checked element by element. ``--storage throttled`` gives every request of every rank 25 MB/s, as a
network file system would, with and without sharing of reads.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast
from unittest import mock

import torch
from torch.distributed.tensor import Placement, Replicate, Shard

from benchmarks.bench import Bench
from benchmarks.contenders import Contender, Dcp, Shardckpt
from benchmarks.options import Launch, Options, size_text
from benchmarks.record import Target
from benchmarks.states import WIDTH, State, sharded
from shardckpt import loading
from shardckpt.storage import Storage, open_storage

BYTES_PER_SECOND = 25e6
"""Of each request to the throttled storage."""
LOADS: dict[str, tuple[int, int, Placement]] = {
    "1 -> 1, rows": (1, 1, Shard(0)),
    "2 -> 1, rows": (2, 1, Shard(0)),
    "3 -> 3, rows": (3, 3, Shard(0)),
    "2 -> 3, rows": (2, 3, Shard(0)),
    "2 -> 2, rows": (2, 2, Shard(0)),
    "2 -> 2, rows to columns": (2, 2, Shard(1)),
    "2 -> 2, rows to replicas": (2, 2, Replicate()),
}
"""By name: how many saved, how many load, and what each of them wants."""
OURS = "shardckpt"
TARGETS = (
    *(
        Target(f"{what} ≤ 1.15x {same}", (what, OURS), (same, OURS), at_most=1.15)
        for what, same in (("2 -> 1, rows", "1 -> 1, rows"), ("2 -> 3, rows", "3 -> 3, rows"))
    ),
    *(Target(f"{what} ≤ 1/2 of DCP's", (what, OURS), (what, "DCP"), at_most=1 / 2) for what in LOADS if " to " in what),
)


def launches(options: Options) -> Iterable[Launch]:
    throttled = options.storage == "throttled"
    for gib in options.sizes(small=1 / 16, full=(1 / 4,) if throttled else (2,)):
        loads = [what for what in LOADS if not throttled or " to " in what]
        for saved in sorted({LOADS[what][0] for what in loads}):
            yield Launch(saved, {"gib": gib})
        # Jobs of other sizes cannot take turns within one job, so the jobs do, in two passes. Each has its warm-up.
        repeats = list(range(1, options.repeats + 1))
        half = len(repeats) // 2
        for number, part in enumerate(filter(None, (repeats[:half], repeats[half:]))):
            for what in loads if number else reversed(loads):
                if options.ranks in (None, LOADS[what][1]):
                    yield Launch(LOADS[what][1], {"gib": gib, "what": what, "repeats": part})


def work(bench: Bench, *, gib: float, what: str = "", repeats: Sequence[int] = ()) -> None:
    """Save, or do the load ``what``."""
    torch.set_num_threads(1)
    names = [f"layers.{number}.weight" for number in range(max(1, round(gib * 64)))]
    contenders: dict[str, Contender] = {OURS: Shardckpt()}
    if bench.options.storage != "throttled":  # which stands before our own storage only
        contenders["DCP"] = Dcp(bench.dcp_group, 1)
    if bench.options.storage != "local":
        contenders |= {f"{OURS}, share_reads={share}": Shardckpt(share_reads=share) for share in (True, False)}
    contenders = {name: contender for name, contender in contenders.items() if bench.options.wants(name)}
    if not what:
        state = sharded(names, Shard(0), whole)
        for name, contender in contenders.items():
            if "share_reads" not in name:
                contender.save(state, bench.place(f"{_saver(name)}-by-{bench.world}"))
        return
    saved, _, placement = LOADS[what]
    state = sharded(names, placement, None)
    setting = f"{size_text(gib)}, {bench.options.storage}"
    for repeat in (0, *repeats):
        bench.repeat = repeat
        turn = repeat % max(1, len(contenders))
        for name in [*contenders][turn:] + [*contenders][:turn]:
            place = bench.place(f"{_saver(name)}-by-{saved}")
            load_cold(bench, (what, setting, name), contenders[name], state, place, placement)


def _saver(name: str) -> str:
    return name.partition(",")[0]


def load_cold(
    bench: Bench, key: tuple[str, str, str], contender: Contender, state: State, place: str, placement: Placement
) -> None:
    """One verified load."""
    state.scramble()
    bench.forget(place)
    throttle: Callable[[Storage], Storage] = (
        _throttled if bench.options.storage == "throttled" else lambda storage: storage
    )
    with (
        mock.patch.object(loading, "open_storage", lambda place, options: throttle(open_storage(place, options))),
        bench.timed(*key, nbytes=state.nbytes) as details,
    ):
        report = contender.load(state, place)
    if report is not None:
        details["bytes_read"] = bench.total(report.bytes_read)
    for number, (_, tensor) in enumerate(state.tensors()):
        expected = whole(number)
        if isinstance(placement, Shard):
            expected = torch.tensor_split(expected, bench.world, dim=placement.dim)[bench.rank]
        if not torch.equal(tensor.cpu(), expected):
            raise RuntimeError(f"{key} did not bring tensor {number} back")


def whole(number: int) -> torch.Tensor:
    """What is saved under a number: float32 that no two tensors and no two rows share."""
    rows = torch.arange(WIDTH, dtype=torch.float32)[:, None] * WIDTH
    return (rows + torch.arange(WIDTH, dtype=torch.float32)).mul_(1.0 + number)


class Throttled:
    """A storage whose every read takes the time that its bytes have at `BYTES_PER_SECOND`."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner
        self.read_cache = ""  # as of a network file system that each rank mounts on a host of its own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read_into(self, name: str, offset: int, into: memoryview, *, cached: bool = True) -> None:
        time.sleep(len(into) / BYTES_PER_SECOND)
        self._inner.read_into(name, offset, into, cached=cached)

    def in_cache(self, name: str, offset: int, nbytes: int) -> bool:
        return False


def _throttled(storage: Storage) -> Storage:
    return cast(Storage, Throttled(storage))
