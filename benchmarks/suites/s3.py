"""Saves and loads against an S3 server on this machine.

The server is moto, one process of Python that keeps objects in memory: it is the limit, and these figures compare
clients with each other, not with a real store.
"""

from collections.abc import Iterable

from benchmarks.bench import Bench
from benchmarks.options import Launch, Options
from benchmarks.record import Target
from benchmarks.suites import load, save

TARGETS: tuple[Target, ...] = ()


def launches(options: Options) -> Iterable[Launch]:
    for gib in options.sizes(small=1 / 32, full=(1 / 4,)):
        for direction in ("save", "load"):
            yield Launch(options.ranks or 2, {"direction": direction, "gib": gib})


def work(bench: Bench, *, direction: str, gib: float) -> None:
    (save if direction == "save" else load).work(bench, layout="sharded", gib=gib)
