"""Durable saves of sharded, replicated and huge parameters, against the raw disk.

Each repeat saves to a fresh place, which is removed before the next; the disk has come to rest when the clock starts.
After the last repeat every contender's checkpoint is loaded and compared with what was saved.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.contenders import Contender, savers
from benchmarks.options import Launch, Options, size_text
from benchmarks.raw_disk import RawDisk
from benchmarks.record import Target
from benchmarks.states import LAYOUTS, State, Training, training

RAW, HANDLED = "raw disk", "raw disk with copy and digest"
THREADS = {1: "1 thread", 2: "2 threads", 4: "4 threads"}
"""Of each process; the best of them is the limit."""
DISKS = {f"{name}, {text}": (name, count) for name in (RAW, HANDLED) for count, text in THREADS.items()}
TARGETS = (
    Target("save ≥ 0.90 of the raw write limit", ("save", RAW), ("save", "shardckpt"), at_least=0.90),
    Target("save against the raw disk with copy and digest", ("save", HANDLED), ("save", "shardckpt")),
    Target("save ≥ 1.8x DCP's at its best thread count", ("save", "DCP"), ("save", "shardckpt"), at_least=1.8),
)


def launches(options: Options) -> Iterable[Launch]:
    for gib in options.sizes(small=1 / 16, full=(2, 6)):
        for layout in filter(options.wants_layout, LAYOUTS):
            if layout != "huge" or gib <= 2:
                yield Launch(options.ranks or 2, {"layout": layout, "gib": gib})


def work(bench: Bench, *, layout: str, gib: float) -> None:
    made = setting_and_state(bench, layout, gib)
    if made is None:
        return
    setting, state = made
    contenders = {
        name: saving(bench, name, setting, contender, state)
        for name, contender in savers(bench.dcp_group, bench.options.storage).items()
    }
    if bench.options.storage == "local":
        contenders |= {name: raw_write(bench, name, setting, state) for name in DISKS}
    bench.rounds(contenders)


def setting_and_state(bench: Bench, layout: str, gib: float) -> tuple[str, Training] | None:
    """What is to be saved or loaded, and what its rows are called; None where there is no room for it."""
    held = gib * 2**30 / (bench.world if layout == "sharded" else 1)
    setting = f"{layout}, {size_text(gib)}, {bench.world} ranks"
    return (setting, training(layout, gib)) if bench.room_for(int(held * 1.25), setting) else None


def saving(bench: Bench, name: str, setting: str, contender: Contender, state: State) -> Any:
    """One save, durable when its time ends; the last one is verified."""
    expected = state.fingerprint()

    def once() -> None:
        bench.clear()
        place = bench.place("checkpoint")
        with bench.timed("save", setting, name, nbytes=state.nbytes):
            contender.save(state, place)
        if bench.repeat == bench.options.repeats:
            state.scramble()
            contender.load(state, place)
            check(state, expected, name)

    return once


def raw_disk(name: str) -> RawDisk:
    """That of one of `DISKS`."""
    kind, threads = DISKS[name]
    return RawDisk(threads, handled=kind == HANDLED)


def raw_write(bench: Bench, name: str, setting: str, state: State) -> Any:
    """The same bytes by the same processes."""
    disk = raw_disk(name)

    def once() -> None:
        bench.clear()
        with bench.timed("save", setting, name, nbytes=state.nbytes):
            disk.write(Path(bench.place(f"raw-{bench.rank}")), -(-state.nbytes // bench.world))

    return once


def check(state: State, expected: list[int], name: str) -> None:
    """Raise unless every byte of every tensor is back."""
    if state.fingerprint() != expected:
        raise RuntimeError(f"{name} did not bring the state back")
