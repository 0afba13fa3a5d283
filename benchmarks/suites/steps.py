"""Training beside a save: steps per second of one rank while the background writes.

One thread of torch computes, on whichever core the kernel gives it, and the other core is free. Steps beside a save are
counted until the save is durable, and beside each save as long again without one, first or after it by turns, the disk
at rest before both. The last step of a window counts, and its time, though the save may end within it; the time that
`async_save` itself blocks is in no window (suite ``stall`` has it). Verdicts are on the median of the ratios of such
pairs, which what else a machine does at one time or another disturbs least. The step of the optimizer is in every
training step, so that what hooks into it is at work, but its parameters have no gradients: otherwise it would be nearly
all of the training step.
"""

import inspect
import time
from collections.abc import Callable, Iterable

import torch

import shardckpt
from benchmarks.bench import Bench
from benchmarks.contenders import OVERLAP, AsyncContender, async_contender
from benchmarks.options import Launch, Options, size_text
from benchmarks.record import Target
from benchmarks.states import Training, training

NONE = "no checkpoints"
COMPUTE, PYTHON = "compute-bound step, beside a save", "pure-Python step, beside a save"
CONTENDERS = ("shardckpt", OVERLAP, "DCP, thread, kept stager", "DCP, process, kept stager")
SECONDS = 2.0
"""Of all windows beside saves of one repeat."""
TARGETS = tuple(
    Target(f"{what}, {name}: ≥ 0.95 of the run without", (f"{what}, of the rate without", name), at_least=0.95)
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


class Pace:
    """Steps, and the seconds that they took."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.steps, self.seconds = 0, 0.0
        self._step = step

    def run(self, going: Callable[[float], bool]) -> float:
        """Steps as long as ``going`` says so of the seconds since the first began; returns those seconds."""
        start, passed = time.perf_counter(), 0.0
        while going(passed):
            self._step()
            self.steps += 1
            passed = time.perf_counter() - start
        self.seconds += passed
        return passed

    @property
    def rate(self) -> float:
        return self.steps / self.seconds


def window(
    bench: Bench, key: tuple[str, str, str], contender: AsyncContender, state: Training, step: Callable[[], None]
) -> Callable[[], None]:
    """Windows beside saves, and as many without. The first saves, which allocate and start processes, are warm-up."""
    what, setting, name = key
    seconds = SECONDS if bench.options.size == "full" else SECONDS / 8

    def once() -> None:
        beside, alone = Pace(step), Pace(step)
        saves, blocked, length = 0, 0.0, seconds / 4
        while beside.seconds < seconds:
            alone_first = saves % 2 == 1
            if alone_first:
                bench.clear()
                alone.run(lambda passed: passed < length)  # noqa: B023 - it is called at once
            bench.clear()
            called = time.perf_counter()
            pending = contender.start(state, bench.place("checkpoint"))
            blocked += time.perf_counter() - called
            length = beside.run(lambda _: not pending.done())  # noqa: B023 - it is called at once
            pending.result()
            if not alone_first:
                bench.clear()
                alone.run(lambda passed: passed < length)  # noqa: B023 - it is called at once
            saves += 1
        details = {"saves": saves, "seconds": beside.seconds, "seconds_blocked": blocked}
        bench.note(what, setting, name, beside.rate, unit="steps/s", details=details)
        bench.note(what, setting, f"{NONE}, beside {name}", alone.rate, unit="steps/s")
        bench.note(f"{what}, of the rate without", setting, name, beside.rate / alone.rate, unit="x")

    return once
