"""Saves and loads against an S3 server on this machine.

The server keeps objects in memory, and takes and gives them faster than the clients can: it shows what the clients
cost. Raw HTTP and obstore move the same bytes by the same number of connections, with nothing done to them.
"""

from collections.abc import Callable, Iterable

from benchmarks.bench import BUCKET, Bench
from benchmarks.contenders import loaders, savers
from benchmarks.http_limit import BareObstore, RawHttp
from benchmarks.options import Launch, Options
from benchmarks.record import Target
from benchmarks.suites import load, save

RAW, BARE = "raw HTTP", "bare obstore"
TARGETS = (
    Target("save ≥ 0.8 of raw HTTP", ("save", RAW), ("save", "shardckpt"), at_least=0.8),
    Target("save ≥ 0.8 of bare obstore", ("save", BARE), ("save", "shardckpt"), at_least=0.8),
    Target("save ≥ 5x DCP over s3fs", ("save", "DCP"), ("save", "shardckpt"), at_least=5.0),
    Target("load ≥ 0.65 of raw HTTP", ("load", RAW), ("load", "shardckpt"), at_least=0.65),
    Target("load ≥ 3x DCP over s3fs", ("load", "DCP"), ("load", "shardckpt"), at_least=3.0),
)


def launches(options: Options) -> Iterable[Launch]:
    for gib in options.sizes(small=1 / 32, full=(2,)):
        for direction in ("save", "load"):
            yield Launch(options.ranks or 2, {"direction": direction, "gib": gib})


def work(bench: Bench, *, direction: str, gib: float) -> None:
    made = save.setting_and_state(bench, "sharded", gib)
    if made is None:
        return
    setting, state = made
    bench.clear()
    bucket, nbytes = BUCKET.removeprefix("s3://"), -(-state.nbytes // bench.world)
    limits: dict[str, RawHttp | BareObstore] = {RAW: RawHttp(bucket, nbytes), BARE: BareObstore(bucket, nbytes)}
    acts: dict[str, Callable[[], None]] = {}
    if direction == "save":
        for name, contender in savers(bench.dcp_group, "s3").items():
            acts[name] = save.saving(bench, name, setting, contender, state)
    else:
        for name, contender in loaders(bench.dcp_group, "s3").items():
            if bench.options.wants(name):
                contender.save(state, bench.place(name))
            acts[name] = load.loading(bench, name, setting, contender, state)
    for name, limit in limits.items():
        acts[name] = moving(bench, name, setting, limit, direction, state.nbytes)
    bench.rounds(acts)


def moving(
    bench: Bench, name: str, setting: str, limit: RawHttp | BareObstore, direction: str, nbytes: int
) -> Callable[[], None]:
    """The same bytes by the same processes with nothing done to them."""
    stored = f"{name.rsplit(maxsplit=1)[-1]}-{bench.rank}"
    if direction == "load" and bench.options.wants(name):
        limit.write(stored)

    def once() -> None:
        if direction == "save":
            bench.clear()
        with bench.timed(direction, setting, name, nbytes=nbytes):
            (limit.write if direction == "save" else limit.read)(stored)

    return once
