"""Loads in place, cold and from the page cache, of sharded, replicated and huge parameters.

Every contender loads what it saved, into a state that was overwritten, and the result is compared byte for byte. Cold:
the files have been dropped from the page cache. Hot: all of them have been read into it. The limit reads the bytes of
the checkpoint once, however many ranks want them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.contenders import Contender, loaders
from benchmarks.options import Launch, Options
from benchmarks.raw_disk import RawDisk
from benchmarks.record import Target
from benchmarks.states import State
from benchmarks.suites import save
from benchmarks.suites.save import DISKS, HANDLED, RAW, raw_disk

COLD, HOT = "load, cold", "load, hot"
ENOUGH_CACHED = 0.99
"""Of the files, for a hot load; a cold one finds less than the rest."""
TARGETS = (
    Target("cold load ≥ 0.85 of the raw read limit", (COLD, RAW), (COLD, "shardckpt"), at_least=0.85),
    Target("cold load against the raw disk with copy and digest", (COLD, HANDLED), (COLD, "shardckpt")),
    Target("cold load ≥ 1.8x DCP's", (COLD, "DCP"), (COLD, "shardckpt"), at_least=1.8),
    Target("hot load ≥ 1.5x DCP's", (HOT, "DCP"), (HOT, "shardckpt"), at_least=1.5),
)


def launches(options: Options) -> Iterable[Launch]:
    return save.launches(options)


def work(bench: Bench, *, layout: str, gib: float) -> None:
    made = save.setting_and_state(bench, layout, gib)
    if made is None:
        return
    setting, state = made
    contenders = loaders(bench.dcp_group, bench.options.storage)
    bench.clear()
    for name, contender in contenders.items():
        if bench.options.wants(name):
            contender.save(state, bench.place(name))
    acts = {name: loading(bench, name, setting, contender, state) for name, contender in contenders.items()}
    if bench.options.storage == "local":
        path = Path(bench.place(f"raw-{bench.rank}"))
        RawDisk(1).write(path, -(-state.nbytes // bench.world))
        acts |= {name: raw_read(bench, name, setting, state, path) for name in DISKS}
    bench.rounds(acts)


def loading(bench: Bench, name: str, setting: str, contender: Contender, state: State) -> Any:
    """One cold and one hot load, each verified."""
    expected = state.fingerprint()
    place = bench.place(name)
    phases = (COLD, HOT) if bench.options.storage == "local" else ("load",)

    def once() -> None:
        for what in phases:
            state.scramble()
            bench.forget(str(bench.options.folder))  # what the others have in the page cache is in the way too
            if what == HOT:
                bench.warm(place)
            cached = bench.part_in_cache(place)
            with bench.timed(what, setting, name, nbytes=state.nbytes) as details:
                contender.load(state, place)
            details["part_in_cache_before"] = cached
            if (what == HOT and cached < ENOUGH_CACHED) or (what == COLD and cached > 1 - ENOUGH_CACHED):
                raise RuntimeError(f"{what} of {name}: the page cache had {cached:.3f} of the files")
            save.check(state, expected, name)

    return once


def raw_read(bench: Bench, name: str, setting: str, state: State, path: Path) -> Any:
    """The same bytes by the same processes."""
    disk = raw_disk(name)

    def once() -> None:
        bench.forget(str(bench.options.folder))
        with bench.timed(COLD, setting, name, nbytes=state.nbytes):
            disk.read(path)

    return once
