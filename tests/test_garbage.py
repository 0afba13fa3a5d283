"""The collector is held off for a while, and never left so."""

import gc
import linecache
import os
import sys
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from shardckpt import Checkpointer, garbage
from shardckpt.garbage import held_off


def collects() -> bool:
    """Whether making many objects has the collector begin."""
    begun: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        begun.append(phase)

    gc.callbacks.append(note)
    try:
        kept = [[] for _ in range(20_000)]
    finally:
        gc.callbacks.remove(note)
    return bool(kept) and bool(begun)


def test_it_is_held_off_and_comes_back() -> None:
    """A save that left the collector off would make training leak memory."""
    before = gc.get_threshold()
    assert collects()
    with held_off():
        with held_off():
            assert not collects()
        assert not collects()
    assert gc.get_threshold() == before
    with pytest.raises(ZeroDivisionError), held_off():
        raise ZeroDivisionError
    assert gc.get_threshold() == before
    assert collects()


def test_many_small_tensors_do_not_have_it_look_at_them_again_and_again(tmp_path: Path) -> None:
    """Of a save or load of many tensors the collector took a third: each part that makes many objects holds it off."""
    state = {f"layers.{number}.weight": torch.full((2,), float(number)) for number in range(5_000)}
    checkpointer = Checkpointer()
    checkpointer.save(state, tmp_path / "first")  # what is made once for a process
    begun: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            begun.append(phase)

    for act in (partial(checkpointer.save, state, tmp_path / "c"), partial(checkpointer.load, tmp_path / "c", state)):
        begun.clear()
        gc.callbacks.append(note)
        try:
            act()
        finally:
            gc.callbacks.remove(note)
        # Once as each part ends, and not once for 700 objects.
        assert len(begun) <= 12, f"{len(begun)} collections in {act.func.__name__}"
    checkpointer.close()


def test_threads_do_not_end_it_for_each_other() -> None:
    """The caller and the background are within at the same time; only the last one out lets collections go on."""
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with held_off():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with held_off():
        thread.start()
        inside.wait()
    assert not collects()
    leave.set()
    thread.join()
    assert collects()


@pytest.mark.parametrize("within", [False, True])
def test_who_disables_it_finds_it_disabled(within: bool) -> None:
    """Jobs that collect at moments of their own choice, and say so in a ``state_dict``, see no collections after it."""
    try:
        if not within:
            gc.disable()
        with held_off():
            gc.disable()
        assert not gc.isenabled()
        gc.enable()
        assert collects()
    finally:
        gc.enable()


def test_who_enables_it_finds_it_enabled() -> None:
    """A pause that the user's code begins before a save may end within it."""
    gc.disable()
    try:
        with held_off():
            gc.enable()
            assert not collects()
        assert collects()
    finally:
        gc.enable()


def test_a_pause_of_the_users_own_is_not_ended_by_ours() -> None:
    """Another thread's ``disable``, from before the end of ours to after it, holds, and its end is one."""
    ours = held_off()
    ours.__enter__()
    was_enabled = gc.isenabled()
    gc.disable()
    ours.__exit__(None, None, None)
    try:
        assert was_enabled
        assert not collects()
    finally:
        gc.enable()


def test_a_threshold_that_is_set_meanwhile_stays() -> None:
    """It is the later wish."""
    before = gc.get_threshold()
    try:
        with held_off():
            gc.set_threshold(123, 7, 8)
        assert gc.get_threshold() == (123, 7, 8)
    finally:
        gc.set_threshold(*before)


def test_an_interrupt_at_any_line_leaves_it_as_it_was() -> None:
    """Ctrl-C on the way in or out must not keep a session from ever collecting again."""
    before = gc.get_threshold()
    lines = 0
    interrupted: int | None = None

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in (garbage.__file__, garbage.contextmanager.__code__.co_filename):
            return None
        # `try` alone does nothing that a signal could come after.
        if event == "line" and linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() != "try:":
            lines += 1
            if lines - 1 == interrupted:
                raise KeyboardInterrupt
        return trace

    def traced() -> bool:
        """Whether it was interrupted."""
        nonlocal lines
        lines = 0
        usual = sys.gettrace()
        sys.settrace(trace)
        try:
            with held_off():
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(usual)
        return False

    assert not traced()
    total = lines
    assert total > 15
    for interrupted in range(total):
        assert traced()
        assert (interrupted, gc.get_threshold()) == (interrupted, before)
        assert not garbage._holders


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_collects() -> None:
    """A data loader's worker that is forked during a save has nobody to let its collector go on."""
    with held_off():
        child = os.fork()
        if child == 0:
            os._exit(0 if collects() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
