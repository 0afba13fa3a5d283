"""20,000 tensors of 4 KiB: saves and loads, and what planning them costs the caller.

Planning is measured where there is nearly nothing to copy: 20,000 tensors of 4 bytes. Counted are what the caller of
`async_save` waits for (flattening, the exchange between the ranks, planning and the hand-over) and, of what follows in
the background, encoding and decoding the manifests and assembling them. Each repeat is a process of its own: "first" is
the first save of a process, "again" its third. Seconds are of the slowest rank, processor time is that of the threads
that do the work.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import nn

from benchmarks.bench import Bench
from benchmarks.contenders import Contender, Shardckpt, TorchSave, savers
from benchmarks.options import Launch, Options
from benchmarks.record import Target
from benchmarks.states import State, small
from benchmarks.suites.save import check
from shardckpt import commit, manifest
from shardckpt.commit import publishing
from shardckpt.saving import series

COUNT, NBYTES = 20_000, 4096
SAVE, LOAD = "save", "load, cold"
FIRST, SECOND, AGAIN = "planning and manifest, first", "planning and manifest, second", "planning and manifest, again"
DICT, MODULE, FLATTENED = "shardckpt, a dict", "shardckpt, a module", "shardckpt, already flattened"
TARGETS = (
    Target("save of many small tensors ≥ 5x DCP's", (SAVE, "DCP"), (SAVE, "shardckpt"), at_least=5),
    Target("load of many small tensors ≥ 5x DCP's", (LOAD, "DCP"), (LOAD, "shardckpt"), at_least=5),
    Target("planning and manifest, flattened, first ≤ 0.3 s", (FIRST, FLATTENED), at_most=0.3),
    Target("planning and manifest, flattened, again ≤ 0.02 s", (AGAIN, FLATTENED), at_most=0.02),
    Target("planning and manifest, with flattening, again ≤ 0.15 s", (AGAIN, MODULE), at_most=0.15),
)


def launches(options: Options) -> Iterable[Launch]:
    count = COUNT if options.size == "full" else COUNT // 20
    yield Launch(options.ranks or 2, {"count": count, "part": "bytes"})
    for repeat in range(1, options.repeats + 1):
        for name in (DICT, MODULE) if repeat % 2 else (MODULE, DICT):
            if options.wants(name):
                yield Launch(options.ranks or 2, {"count": count, "part": name, "repeat": repeat})


def work(bench: Bench, *, count: int, part: str, repeat: int = 0) -> None:
    if part == "bytes":
        state = small(count, NBYTES)
        setting = f"{count} tensors of {NBYTES} bytes, {bench.world} ranks"
        contenders = savers(bench.dcp_group, bench.options.storage)
        bench.rounds({name: moving(bench, name, setting, who, state) for name, who in contenders.items()})
        return
    flat = small(count, 4).live
    bench.repeat = repeat
    setting = f"{count} tensors of 4 bytes, {bench.world} ranks"
    if part == DICT:
        planning(bench, part, setting, flat)
        return
    module = nn.Module()
    for name, tensor in flat.items():
        module.register_parameter(name.replace(".", "_"), nn.Parameter(tensor))
    planning(bench, part, setting, {"model": module})


def moving(bench: Bench, name: str, setting: str, contender: Contender, state: State) -> Callable[[], None]:
    """One save, and one cold load of it."""
    expected = state.fingerprint()

    def once() -> None:
        bench.clear()
        place = bench.place("checkpoint")
        with bench.timed(SAVE, setting, name, nbytes=state.nbytes):
            contender.save(state, place)
        state.scramble()
        bench.forget(place)
        loads = "torch.load" if isinstance(contender, TorchSave) else name
        with bench.timed(LOAD, setting, loads, nbytes=state.nbytes):
            contender.load(state, place)
        check(state, expected, name)

    return once


class Clock:
    """Seconds and processor seconds that functions of the library take while they are watched."""

    def __init__(self) -> None:
        self.spent: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def running(self, part: str) -> Iterator[None]:
        start, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            seconds, used = time.perf_counter() - start, time.thread_time() - cpu
            with self._lock:
                before = self.spent.get(part, (0.0, 0.0))
                self.spent[part] = (before[0] + seconds, before[1] + used)

    def watch(self, part: str, owner: Any, name: str) -> AbstractContextManager[Any]:
        inner = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            with self.running(part):
                return inner(*args, **options)

        return mock.patch.object(owner, name, timed)


WATCHED = (
    ("flatten", series, "flatten"),
    ("plan", series, "exchange"),
    ("plan", series, "plan"),
    ("manifest", manifest, "encode"),
    ("manifest", manifest, "decode_rank_manifest"),
    ("manifest", publishing, "layout_of"),
    ("manifest", commit, "tables"),
    ("manifest", commit, "assemble"),
)


def planning(bench: Bench, name: str, setting: str, live: dict[str, Any]) -> None:
    """The first saves of a process."""
    contender = Shardckpt()
    for what in (FIRST, SECOND, AGAIN):
        bench.clear()
        clock = Clock()
        with ExitStack() as stack:
            for part, owner, function in WATCHED:
                stack.enter_context(clock.watch(part, owner, function))
            dist.barrier()
            with clock.running("call"):
                pending = contender.start(State(live, 0), bench.place("checkpoint"))
            pending.result()
        spent = {part: clock.spent.get(part, (0.0, 0.0)) for part in ("call", "flatten", "plan", "manifest")}
        whole = tuple(sum(both) for both in zip(spent["call"], spent["manifest"], strict=True))
        rows = {name: whole} | {f"{name}: {part}": spent[part] for part in ("flatten", "plan", "manifest")}
        if name == DICT:
            rows[FLATTENED] = tuple(all_ - flat for all_, flat in zip(whole, spent["flatten"], strict=True))
        for row, (seconds, cpu) in rows.items():
            bench.note(what, setting, row, seconds, cpu_seconds=cpu)
    contender.close()
