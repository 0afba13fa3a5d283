"""The collector is held off for a while, and never left so."""

import gc
import os
import threading

import pytest

from shardckpt.garbage import held_off


def test_it_is_held_off_and_comes_back():
    """A save that left the collector disabled would make training leak memory."""
    assert gc.isenabled()
    with held_off():
        with held_off():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), held_off():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_threads_do_not_end_it_for_each_other():
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
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_who_has_disabled_it_finds_it_disabled():
    """Jobs that collect at moments of their own choice must not be surprised by collections after a save."""
    gc.disable()
    try:
        with held_off():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_collects():
    """A data loader's worker that is forked during a save has nobody to enable its collector again."""
    with held_off():
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
