"""20,000 tensors of 4 KiB: saves and loads, and what planning them costs the caller.

Planning is measured by what the caller of `async_save` waits for where there is nearly nothing to copy: 20,000 tensors
of 4 bytes. That is flattening, the exchange between the ranks, planning and the hand-over; without the time that
flattening takes in it, it bounds planning and the manifest from above. "First" is the first save of a Checkpointer,
which plans; "again" is its third.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

from torch import nn

import shardckpt.state
from benchmarks.bench import Bench
from benchmarks.contenders import Contender, Shardckpt, TorchSave, savers
from benchmarks.options import Launch, Options
from benchmarks.record import Target
from benchmarks.states import State, small
from benchmarks.suites.save import check
from shardckpt import checkpointer

COUNT, NBYTES = 20_000, 4096
SAVE, LOAD = "save", "load, cold"
FIRST, SECOND, AGAIN = "planning, first", "planning, second", "planning, again"
DICT, MODULE, FLATTENED = "shardckpt, a dict", "shardckpt, a module", "shardckpt, already flattened"
TARGETS = (
    Target("save of many small tensors ≥ 5x DCP's", (SAVE, "DCP"), (SAVE, "shardckpt"), at_least=5),
    Target("load of many small tensors ≥ 5x DCP's", (LOAD, "DCP"), (LOAD, "shardckpt"), at_least=5),
    Target("planning, flattened, first ≤ 0.3 s", (FIRST, FLATTENED), at_most=0.3),
    Target("planning, flattened, again ≤ 0.02 s", (AGAIN, FLATTENED), at_most=0.02),
    Target("planning, with flattening, again ≤ 0.15 s", (AGAIN, MODULE), at_most=0.15),
)


def launches(options: Options) -> Iterable[Launch]:
    count = COUNT if options.size == "full" else COUNT // 20
    yield Launch(options.ranks or 2, {"count": count, "part": "bytes"})
    yield Launch(options.ranks or 2, {"count": count, "part": "planning"})


def work(bench: Bench, *, count: int, part: str) -> None:
    if part == "bytes":
        state = small(count, NBYTES)
        setting = f"{count} tensors of {NBYTES} bytes, {bench.world} ranks"
        contenders = savers(bench.dcp_group, bench.options.storage)
        bench.rounds({name: moving(bench, name, setting, who, state) for name, who in contenders.items()})
        return
    flat = small(count, 4).live
    module = nn.Module()
    for name, tensor in flat.items():
        module.register_parameter(name.replace(".", "_"), nn.Parameter(tensor))
    setting = f"{count} tensors of 4 bytes, {bench.world} ranks"
    bench.rounds(
        {name: planning(bench, name, setting, live) for name, live in ((DICT, flat), (MODULE, {"model": module}))}
    )


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


def planning(bench: Bench, name: str, setting: str, live: dict[str, Any]) -> Callable[[], None]:
    """The caller's part of the first saves of a Checkpointer."""
    spent = [0.0]

    def flatten(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return shardckpt.state.flatten(*args, **options)
        finally:
            spent[0] += time.perf_counter() - start

    def once() -> None:
        contender = Shardckpt()
        for what in (FIRST, SECOND, AGAIN):
            bench.clear()
            spent[0] = 0.0
            with mock.patch.object(checkpointer, "flatten", flatten), bench.timed(what, setting, name):
                pending = contender.start(State(live, 0), bench.place("checkpoint"))
            pending.result()
            if name == DICT:
                bench.note(what, setting, FLATTENED, bench.measured[-1].value - spent[0])
        contender.close()

    return once
