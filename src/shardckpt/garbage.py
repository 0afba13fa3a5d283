"""Python's cyclic garbage collector, held off while a save or a load makes its tens of thousands of small objects.

None of them is part of a cycle, and the collector looks at all of them again and again as they become more: measured
with 20,000 tensors, it took half of the time of flattening, and two thirds of that of reading a manifest.

It is held off by its threshold: ``gc.disable`` is the user's, who may call it, or ``gc.enable``, in a ``state_dict`` of
his own or in another thread while we are at it, and it would not be known afterwards who wanted what.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_NEVER: Final = (1 << 31) - 1
"""More objects than are made meanwhile, and a threshold by which we know that nobody else has set one since."""

_holders: set[object] = set()
_found = gc.get_threshold()


@contextmanager
def held_off() -> Iterator[None]:
    """No collection begins by itself within; any thread may be within, more than once. For less than a few seconds.

    Also a decorator. The collector is left as it was found, or as somebody else has set it in the meantime.
    """
    holder = object()
    try:
        _begin(holder)
        yield
    finally:
        try:
            _end(holder)
        except BaseException:  # Ctrl-C, just now
            _end(holder)
            raise


# Without a lock, which an interrupt could leave taken: each step is whole, and whoever leaves last finds nobody there.
# Where one comes as another leaves, the collector may run for once.


def _begin(holder: object) -> None:
    global _found
    found = gc.get_threshold()
    if found[0] != _NEVER:
        _found = found
    _holders.add(holder)
    gc.set_threshold(_NEVER, *_found[1:])


def _end(holder: object) -> None:
    """May be called again, if it was interrupted."""
    _holders.discard(holder)
    if not _holders and gc.get_threshold()[0] == _NEVER:
        gc.set_threshold(*_found)


def _in_forked_child() -> None:
    """The threads that held it off are not in the child, which would never collect."""
    for holder in tuple(_holders):
        _end(holder)


os.register_at_fork(after_in_child=_in_forked_child)
