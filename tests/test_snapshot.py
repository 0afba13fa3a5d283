"""The snapshot is one instant: whatever becomes of the state, the threads and the process after the call."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
import ranks
import shardckpt
from faults import Disk, Stall, is_shard
from shardckpt import Checkpointer

HANG_SECONDS = 60.0
SIZES = (3, 70_000, 3 << 20)
"""Elements: small, more than a copy that keeps the interpreter, and more than one block of the storage."""


@pytest.fixture
def disk() -> Iterator[Disk]:
    with faults.broken() as broken:
        yield broken


def make(value: float) -> dict[str, torch.Tensor]:
    tensors = {f"t{number}": torch.full((size,), float(value + number)) for number, size in enumerate(SIZES)}
    return tensors | {"strided": torch.full((40, 50), float(value)).t(), "empty": torch.empty(0)}


def check(path: Path, value: float) -> None:
    loaded = shardckpt.load(path)
    for name, tensor in make(value).items():
        assert torch.equal(loaded[name], tensor), name


def mutate(state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        tensor.fill_(-1)


def resize(state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        tensor.untyped_storage().resize_(0)


def regrow(state: dict[str, torch.Tensor]) -> None:
    resize(state)
    for tensor in state.values():
        tensor.resize_(9).fill_(-1)


def reset(state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        tensor.set_(torch.full((2,), -1.0))  # type: ignore[call-overload]


def replace(state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        tensor.data = torch.full_like(tensor, -1)


def free(state: dict[str, torch.Tensor]) -> None:
    """And have others take the memory."""
    sizes = [tensor.numel() for tensor in state.values()]
    state.clear()
    for size in sizes:
        torch.full((size,), -1.0)


@pytest.mark.parametrize("compression", (None, "zstd"))
@pytest.mark.parametrize("limit", (None, 8 << 20), ids=("whole", "limited"))
@pytest.mark.parametrize("change", (mutate, resize, regrow, reset, replace, free))
def test_what_is_written_is_what_was_there_at_the_call(
    tmp_path: Path, disk: Disk, change: Callable[[Any], None], limit: int | None, compression: Any
) -> None:
    """Training may do anything to its tensors, and to their memory, while nothing of them is on the disk yet."""
    stall = Stall()
    if limit is None:
        disk.add("pwrite", stall, matching=is_shard)
    engine = Checkpointer(staging_limit=limit, compression=compression)
    state = make(5)
    pending = engine.async_save(state, tmp_path / "ck")
    change(state)
    stall.over.set()
    pending.result(HANG_SECONDS)
    check(tmp_path / "ck", 5)


def test_several_checkpointers_at_once(tmp_path: Path) -> None:
    """Saves of different Checkpointers share nothing: neither memory nor the thread that writes."""
    engines = [Checkpointer(), Checkpointer(compression="zstd"), Checkpointer(staging_limit=8 << 20)]
    for turn in range(3):
        states = [make(10 * turn + number) for number in range(len(engines))]
        pending = [
            engine.async_save(state, tmp_path / str(number))
            for number, (engine, state) in enumerate(zip(engines, states, strict=True))
        ]
        for state in states:
            mutate(state)
        for number, save in enumerate(pending):
            save.result(HANG_SECONDS)
            check(tmp_path / str(number), 10 * turn + number)


@pytest.mark.parametrize("shared", (False, True), ids=("of-their-own", "one-for-all"))
def test_saves_from_several_threads_at_once(tmp_path: Path, shared: bool) -> None:
    """One Checkpointer takes them one after the other; each checkpoint is the state of its own caller."""
    common = Checkpointer()
    together = threading.Barrier(4)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        engine = common if shared else Checkpointer()
        try:
            for turn in range(5):
                # Of another structure for each: a plan of one would be wrong for the others.
                state = make(100 * number + turn) | {f"own{number}": torch.full((number + 2,), float(turn))}
                together.wait(HANG_SECONDS)
                pending = engine.async_save(state, tmp_path / f"{number}-{turn}")
                mutate(state)
                pending.result(HANG_SECONDS)
        except BaseException as error:  # noqa: BLE001 - told by the test
            errors.append(error)
            together.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * HANG_SECONDS)
    assert not errors, errors
    for number in range(4):
        for turn in range(5):
            check(tmp_path / f"{number}-{turn}", 100 * number + turn)


def script(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", body, *arguments],
        capture_output=True,
        text=True,
        timeout=2 * HANG_SECONDS,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([ranks.TESTS, *sys.path])},
    )


FROM_A_THREAD = """
import sys, threading, torch, shardckpt
from pathlib import Path
def run():
    threading.main_thread().join()  # the interpreter is shutting down
    shardckpt.async_save({"w": torch.full((3 << 20,), 4.0)}, sys.argv[1])
threading.Thread(target=run).start()
"""


def test_a_save_begun_while_the_interpreter_shuts_down_is_finished(tmp_path: Path) -> None:
    """A thread of the user's that outlives the main thread may still save, and need not wait."""
    done = script(FROM_A_THREAD, str(tmp_path / "ck"))
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.equal(shardckpt.load(tmp_path / "ck")["w"], torch.full((3 << 20,), 4.0))


FORKING = """
import os, sys, torch, faults, shardckpt
stall = faults.Stall()
with faults.broken() as disk:
    disk.add("pwrite", stall, matching=faults.is_shard)
    pending = shardckpt.async_save({"w": torch.full((3 << 20,), 4.0)}, sys.argv[1])
    assert stall.begun.wait(60)
    child = os.fork()
    if not child:
        if sys.argv[2] == "exit":
            sys.exit(7)
        if sys.argv[2] == "use":
            try:
                shardckpt.save({"w": torch.zeros(3)}, sys.argv[1])
            except shardckpt.UsageError:
                sys.exit(7)
        if sys.argv[2] == "own":
            faults.mend()
            shardckpt.Checkpointer().save({"w": torch.zeros(3)}, sys.argv[1] + "-child")
            sys.exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    stall.over.set()
    pending.result(60)
"""


@pytest.mark.parametrize("what", ("exit", "use", "own"))
def test_a_child_forked_during_a_save_harms_nothing(tmp_path: Path, what: str) -> None:
    """Neither its end nor its use of the library touches the parent's save, whose threads and memory it lacks."""
    done = script(FORKING, str(tmp_path / "ck"), what)
    assert done.returncode == 0, done.stderr
    assert torch.equal(shardckpt.load(tmp_path / "ck")["w"], torch.full((3 << 20,), 4.0))
    if what == "own":
        assert torch.equal(shardckpt.load(tmp_path / "ck-child")["w"], torch.zeros(3))
