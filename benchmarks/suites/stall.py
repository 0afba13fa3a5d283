"""How long async_save keeps training waiting, in the first save of a process and in later ones, against memcpy.

Every repeat of every contender is a job of its own: a first save happens once in a process, and staging memory of one
contender would be in the way of another. In each job the first save counts as such, the second is a warm-up, and the
third is the steady state. The limit copies the bytes that a rank has to write into memory that is warm.

With ``overlap="step"`` what the call leaves to do is done beside training, and the optimizer's step waits for it. There
the row is what remains of both: the call, and what the step takes after a forward and backward of `COMPUTING` seconds.
"""

import ctypes
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.bench import Bench
from benchmarks.contenders import ASYNC, OVERLAP, AsyncContender, PreparedShardckpt, async_contender
from benchmarks.environment import cores
from benchmarks.options import Launch, Options, size_text
from benchmarks.raw_disk import huge_buffer
from benchmarks.record import Target
from benchmarks.states import LAYOUTS, State, Training, training

FIRST, STEADY, DURABLE = "async_save blocks, first", "async_save blocks, steady", "async_save, until durable, steady"
MEMCPY = "memcpy"
COMPUTING = 0.5
"""Seconds of one thread's multiplications on each rank: a short step of a model whose state takes GiB."""
TARGETS = (
    Target("steady stall ≤ 1/5 of DCP's in its best mode", (STEADY, "shardckpt"), (STEADY, "DCP"), at_most=1 / 5),
    Target("steady stall of overlap='step' ≤ 1/5 of DCP's", (STEADY, OVERLAP), (STEADY, "DCP"), at_most=1 / 5),
    Target("steady stall ≥ 0.7 of memcpy speed", (STEADY, MEMCPY), (STEADY, "shardckpt"), at_least=0.7),
    Target("first stall ≤ 1/10 of DCP's, prepared", (FIRST, "shardckpt, prepared"), (FIRST, "DCP"), at_most=1 / 10),
    Target("first stall ≤ 1/10 of DCP's, unprepared", (FIRST, "shardckpt"), (FIRST, "DCP"), at_most=1 / 10),
)


def launches(options: Options) -> Iterable[Launch]:
    for gib in options.sizes(small=1 / 16, full=(2, 6)):
        for layout in filter(options.wants_layout, LAYOUTS if options.size == "full" else ("sharded",)):
            if layout == "huge" and gib > 2:
                continue
            names = [name for name in (*ASYNC, MEMCPY) if options.wants(name)]
            for repeat in range(1, options.repeats + 1):
                turn = repeat % max(1, len(names))
                for name in names[turn:] + names[:turn]:
                    arguments = {"layout": layout, "gib": gib, "name": name, "repeat": repeat}
                    yield Launch(options.ranks or 2, arguments)


def work(bench: Bench, *, layout: str, gib: float, name: str, repeat: int) -> None:
    bench.repeat = repeat
    setting = f"{layout}, {size_text(gib)}, {bench.world} ranks"
    held = gib * 2**30 / (bench.world if layout == "sharded" else 1)
    # DCP stages all that a rank holds, we what it writes.
    if not bench.room_for(int(held * (2 if name.startswith("DCP") else 1.6)), f"{setting}, {name}"):
        return
    state = training(layout, gib)
    if name == MEMCPY:
        copy_into_warm_memory(bench, setting, state)
        return
    contender = async_contender(name, bench.dcp_group)
    if isinstance(contender, PreparedShardckpt):
        contender.prepare(state)
    for what in (FIRST, "async_save blocks, second", STEADY):
        bench.clear()
        if name == OVERLAP:
            save_beside_a_step(bench, (what, setting, name), contender, state)
            continue
        # Two blocks: the inner ends when training may go on, the outer when the checkpoint is there.
        with bench.timed(what.replace("blocks", "until durable"), setting, name, nbytes=state.nbytes):
            with bench.timed(what, setting, name, nbytes=state.nbytes):
                pending = contender.start(state, bench.place("checkpoint"))
            pending.result()
    contender.close()


def save_beside_a_step(bench: Bench, key: tuple[str, str, str], contender: AsyncContender, state: Training) -> None:
    """What a save leaves of a stall: its call, and the wait of the step that follows."""
    torch.set_num_threads(1)
    left, right, product = (torch.rand(640, 640) for _ in range(3))
    start = time.perf_counter()
    pending = contender.start(state, bench.place("checkpoint"))
    called = time.perf_counter()
    while time.perf_counter() - called < COMPUTING:
        torch.mm(left, right, out=product)
    before = time.perf_counter()
    state.optimizer.step()  # of parameters without gradients: what takes time is what waits before it
    waited = time.perf_counter() - before
    details = {"call": called - start, "wait of the step": waited}
    bench.note(*key, called - start + waited, nbytes=state.nbytes, details=details)
    pending.result()


def copy_into_warm_memory(bench: Bench, setting: str, state: State) -> None:
    """The limit: each rank copies the bytes that it would write, with as many threads as it has cores."""
    share = state.nbytes // bench.world
    blocks: list[tuple[int, int]] = []
    # Held until the end: what is copied from is known by its address only.
    tensors = [tensor.cpu() for _, tensor in state.tensors()]
    for tensor in tensors:
        nbytes = min(tensor.nbytes, share - sum(size for _, size in blocks))
        blocks += [(tensor.data_ptr() + at, min(16 << 20, nbytes - at)) for at in range(0, nbytes, 16 << 20)]
    target = huge_buffer(share)
    address = ctypes.addressof(ctypes.c_char.from_buffer(target))
    starts = [sum(size for _, size in blocks[:number]) for number in range(len(blocks))]

    def copy(number: int) -> None:
        source, size = blocks[number]
        ctypes.memmove(address + starts[number], source, size)  # lets go of the interpreter's lock

    with ThreadPoolExecutor(max(1, cores() // bench.world)) as pool:
        list(pool.map(copy, range(len(blocks))))
        torch.manual_seed(0)
        with bench.timed(STEADY, setting, MEMCPY, nbytes=state.nbytes):
            list(pool.map(copy, range(len(blocks))))
