"""S3 over a link with latency and a cap on each connection: throughput, training beside an upload, shared reads.

The server of suite ``s3`` waits before each answer and lets each connection have so many bytes a second, in each
direction. What the link gives is connections x cap; raw HTTP moves the same bytes by as many connections through it.
Beside training the cap is low enough for the server to leave a core. Reads are shared with and without the link.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist

from benchmarks.bench import BUCKET, Bench
from benchmarks.contenders import AsyncContender, AsyncDcp, Shardckpt
from benchmarks.http_limit import CONNECTIONS, RawHttp
from benchmarks.options import Launch, Options, size_text
from benchmarks.record import Target
from benchmarks.s3_server import s3_server
from benchmarks.states import training
from benchmarks.suites import load, save
from benchmarks.suites.s3 import RAW, moving
from benchmarks.suites.steps import PYTHON, python_step, window

LATENCY = 0.05
"""Seconds from a request's head to its answer."""
CAP = 100e6
"""Bytes a second of each connection in each direction."""
CAP_BESIDE = 25e6
LIMIT = "connections x cap"
OVER_S3FS = "shardckpt over s3fs"
AUTO, ALONE, SHARED = "shardckpt", "shardckpt, share_reads=False", "shardckpt, share_reads=True"
TARGETS = (
    Target("save ≥ 0.8 of connections x cap", ("save", LIMIT), ("save", "shardckpt"), at_least=0.8),
    Target("save against raw HTTP through the link", ("save", RAW), ("save", "shardckpt")),
    Target("load ≥ 0.8 of connections x cap", ("load", LIMIT), ("load", "shardckpt"), at_least=0.8),
    Target("load against raw HTTP through the link", ("load", RAW), ("load", "shardckpt")),
    Target("training ≥ 0.95 of its rate", (f"{PYTHON}, of the rate without", "shardckpt"), at_least=0.95),
    Target("training beside s3fs", (f"{PYTHON}, of the rate without", OVER_S3FS)),
    Target("training beside DCP over s3fs", (f"{PYTHON}, of the rate without", "DCP, thread, kept stager")),
    Target(
        "share_reads='auto' ≤ 1.1x reading alone", ("load of replicas", AUTO), ("load of replicas", ALONE), at_most=1.1
    ),
    Target("share_reads=True against reading alone", ("load of replicas", SHARED), ("load of replicas", ALONE)),
)
_FOR_S3FS = {"s3_additional_kwargs": {"ContentType": "application/octet-stream"}}
"""An option that obstore has no word for, so that s3fs does the work."""


def launches(options: Options) -> Iterable[Launch]:
    for gib in options.sizes(small=1 / 32, full=(1,)):
        for direction in ("save", "load"):
            yield Launch(1, {"kind": direction, "gib": gib, "latency": LATENCY, "cap": CAP})
        yield Launch(1, {"kind": "beside", "gib": gib, "latency": LATENCY, "cap": CAP_BESIDE})
        for latency, cap in ((0.0, 0.0), (LATENCY, CAP)):
            yield Launch(options.ranks or 2, {"kind": "replicas", "gib": gib, "latency": latency, "cap": cap})


def work(bench: Bench, *, kind: str, gib: float, latency: float, cap: float) -> None:
    with ExitStack() as stack:
        # One server for all ranks, in place of the one without a link that every run with S3 has.
        said: list[Any] = [stack.enter_context(s3_server(latency, cap)) if bench.rank == 0 else None]
        dist.broadcast_object_list(said)
        os.environ.update(said[0])
        link = f"{latency * 1000:g} ms and {cap / 1e6:g} MB/s a connection" if cap else "no link"
        if kind == "beside":
            beside(bench, gib, link)
        elif kind == "replicas":
            replicas(bench, gib, link)
        else:
            through(bench, kind, gib, link, cap)
        dist.barrier()


def through(bench: Bench, direction: str, gib: float, link: str, cap: float) -> None:
    """A save or a load of one rank, and raw HTTP, by `CONNECTIONS` connections each."""
    made = save.setting_and_state(bench, "sharded", gib)
    if made is None:
        return
    setting, state = f"{made[0]}, {link}", made[1]
    bench.clear()
    contender = Shardckpt()
    raw = RawHttp(BUCKET.removeprefix("s3://"), state.nbytes)
    acts: dict[str, Callable[[], None]] = {}
    if direction == "save":
        acts["shardckpt"] = save.saving(bench, "shardckpt", setting, contender, state)
    else:
        if bench.options.wants("shardckpt"):
            contender.save(state, bench.place("shardckpt"))
        acts["shardckpt"] = load.loading(bench, "shardckpt", setting, contender, state)
    acts[RAW] = moving(bench, RAW, setting, raw, direction, state.nbytes)
    acts[LIMIT] = lambda: bench.note(direction, setting, LIMIT, state.nbytes / (CONNECTIONS * cap), nbytes=state.nbytes)
    bench.rounds(acts)
    contender.close()


def beside(bench: Bench, gib: float, link: str) -> None:
    """Steps of bytecode beside uploads, and as long without; see suite ``steps``."""
    state = training("sharded", gib)
    made: dict[str, Callable[[], AsyncContender]] = {
        "shardckpt": Shardckpt,
        OVER_S3FS: lambda: Shardckpt(storage_options=_FOR_S3FS),
        "DCP, thread, kept stager": lambda: AsyncDcp(bench.dcp_group, process=False, keep=True),
    }
    contenders = {name: make() for name, make in made.items() if bench.options.wants(name)}
    setting = f"1 rank, {size_text(gib)}, {link}"
    step = python_step(state)
    bench.rounds(
        {name: window(bench, (PYTHON, setting, name), contender, state, step) for name, contender in contenders.items()}
    )
    for contender in contenders.values():
        contender.close()


def replicas(bench: Bench, gib: float, link: str) -> None:
    """All ranks load all of what DDP replicates: reading for each other where that is faster, never and always."""
    made = save.setting_and_state(bench, "replicated", gib)
    if made is None:
        return
    setting, state = f"{made[0]}, {link}", made[1]
    bench.clear()
    expected = state.fingerprint()
    ways = {AUTO: Shardckpt(), ALONE: Shardckpt(share_reads=False), SHARED: Shardckpt(share_reads=True)}
    place = bench.place("checkpoint")
    ways[AUTO].save(state, place)

    def loading(name: str) -> Callable[[], None]:
        def once() -> None:
            state.scramble()
            with bench.timed("load of replicas", setting, name, nbytes=state.nbytes) as details:
                report = ways[name].load(state, place)
            details["bytes_read"] = report.bytes_read
            save.check(state, expected, name)

        return once

    bench.rounds({name: loading(name) for name in ways})
    for way in ways.values():
        way.close()
