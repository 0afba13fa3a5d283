"""Peak memory beyond the state, of saves and loads, at two sizes.

Every contender runs in a job of its own, which holds the state before it begins: what grew is the kernel's own
high-water mark of resident memory (``VmHWM``, reset first) less what was resident before. A load follows the save of
what it loads, and is set against the memory of before that save: buffers that a save keeps would hide those of a load.
Processes that a contender starts are counted with it. Of the ranks, the largest counts. An asynchronous save is watched
until it is durable, and the steady one is set against the memory of before the first, as what that allocated is kept.
"""

from collections.abc import Callable, Iterable

from benchmarks import process
from benchmarks.bench import Bench
from benchmarks.contenders import AsyncDcp, Contender, Dcp, Safetensors, Shardckpt, TorchSave
from benchmarks.options import Launch, Options, size_text
from benchmarks.record import Target
from benchmarks.states import Training, training
from benchmarks.suites.save import check

SAVE, LOAD = "extra memory, save", "extra memory, load"
FIRST, STEADY = "extra memory, async_save, first", "extra memory, async_save, steady"
LIMITED = "shardckpt, staging_limit of a quarter"
KEPT, PROCESS = "DCP, thread, kept stager", "DCP, process, kept stager"
SYNC = ("shardckpt", "DCP", "torch.save", "safetensors")
ASYNC = ("shardckpt", LIMITED, KEPT, PROCESS)
MIB = 2**20
TARGETS = (
    Target("synchronous save ≤ 256 MiB a rank", (SAVE, "shardckpt"), at_most=256 * MIB),
    Target("load ≤ 256 MiB a rank", (LOAD, "shardckpt"), at_most=256 * MIB),
    Target("first async_save ≤ 1.05x what the rank writes", (FIRST, "shardckpt"), at_most=1.05, per_byte=True),
    Target("steady async_save ≤ 1.05x what the rank writes", (STEADY, "shardckpt"), at_most=1.05, per_byte=True),
    Target("async_save under a staging_limit of 1/4 ≤ 0.30x", (STEADY, LIMITED), at_most=0.30, per_byte=True),
)


def launches(options: Options) -> Iterable[Launch]:
    sizes = options.sizes(small=1 / 8, full=(2, 6))
    for repeat in range(1, options.repeats + 1):
        for gib in sizes:
            for kind, names in (("sync", SYNC), ("async", ASYNC)):
                chosen = [name for name in names if options.wants(name)]
                turn = repeat % max(1, len(chosen))
                for name in chosen[turn:] + chosen[:turn]:
                    yield Launch(options.ranks or 2, {"gib": gib, "kind": kind, "name": name, "repeat": repeat})


def work(bench: Bench, *, gib: float, kind: str, name: str, repeat: int) -> None:
    bench.repeat = repeat
    setting = f"sharded, {size_text(gib)}, {bench.world} ranks"
    if not bench.room_for(int(gib * 2**30 / bench.world * 2), f"{setting}, {name}"):
        return
    state = training("sharded", gib)
    expected = state.fingerprint()
    bench.clear()
    if kind == "sync":
        synchronous(bench, setting, name, state)
    else:
        asynchronous(bench, setting, name, state)
    check(state, expected, name)


class Watch:
    """Memory since it was made."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        process.forget_peak()
        self.before = process.resident()

    def note(self, what: str, setting: str, name: str, nbytes: int) -> None:
        grown = max(0, process.peak_resident() - self.before)
        self.bench.note(what, setting, name, grown, unit="B", nbytes=nbytes)


def synchronous(bench: Bench, setting: str, name: str, state: Training) -> None:
    """A save, then a load, both against the memory of before the save."""
    contenders: dict[str, Callable[[], Contender]] = {
        "shardckpt": Shardckpt,
        "DCP": lambda: Dcp(bench.dcp_group, 1),
        "torch.save": TorchSave,
        "safetensors": Safetensors,
    }
    contender = contenders[name]()
    share = state.nbytes // bench.world
    watch = Watch(bench)
    contender.save(state, bench.place("checkpoint"))
    watch.note(SAVE, setting, name, share)
    state.scramble()
    process.forget_peak()
    contender.load(state, bench.place("checkpoint"))
    watch.note(LOAD, setting, name, share)


def asynchronous(bench: Bench, setting: str, name: str, state: Training) -> None:
    """Three saves, until each is durable, all against the memory of before the first; then a load, to check."""
    share = state.nbytes // bench.world
    contender: Shardckpt | AsyncDcp
    if name.startswith("DCP"):
        contender = AsyncDcp(bench.dcp_group, process=name == PROCESS, keep=True)
    else:
        contender = Shardckpt(staging_limit=share // 4) if name == LIMITED else Shardckpt()
    watch = Watch(bench)
    for number in range(3):
        process.forget_peak()
        contender.start(state, bench.place(f"checkpoint-{number}")).result()
        if number != 1:
            watch.note(STEADY if number else FIRST, setting, name, share)
    state.scramble()
    loader = contender.dcp if isinstance(contender, AsyncDcp) else contender
    loader.load(state, bench.place("checkpoint-2"))
    contender.close()
