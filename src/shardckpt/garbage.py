"""Python's cyclic garbage collector, held off while a save or a load makes its tens of thousands of small objects.

None of them is part of a cycle, and the collector looks at all of them again and again as they become more: measured
with 20,000 tensors, it took half of the time of flattening, and two thirds of that of reading a manifest.
"""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_holders = 0
_was_enabled = False


@contextmanager
def held_off() -> Iterator[None]:
    """No collection begins by itself within; any thread may be within, more than once. For less than a few seconds.

    Also a decorator. The collector is left as it was found: where somebody has disabled it, it stays so.
    """
    global _holders, _was_enabled
    with _lock:
        if _holders == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0 and _was_enabled:
                gc.enable()


def _in_forked_child() -> None:
    """The threads that held it off are not in the child, which would never collect."""
    global _lock, _holders
    _lock = threading.Lock()
    if _holders and _was_enabled:
        gc.enable()
    _holders = 0


os.register_at_fork(after_in_child=_in_forked_child)
