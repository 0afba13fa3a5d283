"""Training beside a save: steps per second of one rank while the background writes, back to back.

One core computes, with one thread of torch, and the other is free. A window of steps beside saves is followed by one
without; a step counts if a save is under way when it begins, and the time that `async_save` itself blocks is in no
window (suite ``stall`` has it). The step of the optimizer is in every training step, so that what hooks into it is at
work, but its parameters have no gradients: otherwise it would be nearly all of the training step.
"""

import inspect
import time
from collections.abc import Callable, Iterable

import torch

import shardckpt
from benchmarks.bench import Bench
from benchmarks.contenders import AsyncContender, async_contender
from benchmarks.options import Launch, Options, size_text
from benchmarks.record import Target
from benchmarks.states import Training, training

NONE = "no checkpoints"
COMPUTE, PYTHON = "compute-bound step, beside a save", "pure-Python step, beside a save"
OVERLAP = "shardckpt, overlap='step'"
CONTENDERS = ("shardckpt", OVERLAP, "DCP, thread, kept stager", "DCP, process, kept stager")
SECONDS = 2.0
"""Of one window."""
TARGETS = tuple(
    Target(f"{what}, {name}: ≥ 0.95 of the run without", (what, name), (what, f"{NONE}, beside {name}"), at_least=0.95)
    for what in (COMPUTE, PYTHON)
    for name in ("shardckpt", OVERLAP)
)


def launches(options: Options) -> Iterable[Launch]:
    for gib in options.sizes(small=1 / 16, full=(1,)):
        yield Launch(1, {"gib": gib})


def work(bench: Bench, *, gib: float) -> None:
    torch.set_num_threads(1)
    state = training("sharded", gib)
    steps = {COMPUTE: compute_step(state), PYTHON: python_step(state)}
    names = list(CONTENDERS)
    if "overlap" not in inspect.signature(shardckpt.Checkpointer).parameters:
        names.remove(OVERLAP)
        bench.skip(OVERLAP, "this version has no such option")
    contenders = {name: async_contender(name, bench.dcp_group) for name in names if bench.options.wants(name)}
    windows = {
        f"{name}, {what}": window(bench, (what, f"1 rank, {size_text(gib)}", name), contender, state, step)
        for what, step in steps.items()
        for name, contender in contenders.items()
    }
    bench.rounds(windows)
    for contender in contenders.values():
        contender.close()


def compute_step(state: Training) -> Callable[[], None]:
    """About 10 ms of multiplications, which let go of the interpreter's lock."""
    left, right, product = (torch.rand(640, 640) for _ in range(3))

    def step() -> None:
        torch.mm(left, right, out=product)
        state.optimizer.step()

    return step


def python_step(state: Training) -> Callable[[], None]:
    """About 10 ms of bytecode, which holds it."""

    def step() -> None:
        total = 0
        for number in range(150_000):
            total += number & 7
        state.optimizer.step()

    return step


def window(
    bench: Bench, key: tuple[str, str, str], contender: AsyncContender, state: Training, step: Callable[[], None]
) -> Callable[[], None]:
    """A window beside saves, and one without. The warm-up has the first saves, which allocate and start processes."""
    what, setting, name = key
    seconds = SECONDS if bench.options.size == "full" else SECONDS / 8

    def once() -> None:
        saves, count, spent, blocked = 0, 0, 0.0, 0.0
        while spent < seconds:
            bench.clear()
            called = time.perf_counter()
            pending = contender.start(state, bench.place("checkpoint"))
            start = time.perf_counter()
            while not pending.done():
                step()
                count += 1
            spent += time.perf_counter() - start
            pending.result()
            saves, blocked = saves + 1, blocked + start - called
        details = {"saves": saves, "seconds": spent, "seconds_blocked": blocked}
        bench.note(what, setting, name, count / spent, unit="steps/s", details=details)
        start, alone = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            step()
            alone += 1
        rate = alone / (time.perf_counter() - start)
        bench.note(what, setting, f"{NONE}, beside {name}", rate, unit="steps/s")

    return once
