"""The process group over which ranks read for each other.

It is one of its own, since a failed rank closes it, so that no other waits for it any longer: the connections of a
group that training uses must stay open.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Final, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from shardckpt.errors import RankTimeoutError, ShardckptError, first_line

log = logging.getLogger(__name__)

_SLICE: Final = timedelta(seconds=1)

_groups: "weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = weakref.WeakKeyDictionary()
"""Ours, by the default group that has the same ranks: a job may destroy its groups and make new ones."""

T = TypeVar("T")


def has_group() -> bool:
    """Whether this rank has a group over which to exchange; one that met an error has left it, others perhaps not."""
    return _world() in _groups


def join_group(seconds: float) -> bool:
    """Make a group over which to exchange; all ranks call. `seconds` is how long one may wait for another.

    False where this rank can't have one: there is no gloo, or no connection.
    """
    leave_group()
    try:
        _groups[_world()] = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        log.warning("the ranks read alone, since there is no gloo group over which to exchange: %s", error)
        return False
    return True


def leave_group() -> None:
    """Close this rank's connections, if it has any: an error for all who wait for it."""
    group = _groups.pop(_world(), None)
    if group is None:
        return
    dist.destroy_process_group(group)
    held = [group]
    del group
    # Letting go of the last reference waits for what is under way in the group, which an interrupt has left.
    threading.Thread(target=held.clear, name="shardckpt-leave", daemon=True).start()


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None, "ranks agree through it"
    return world


def over_group(call: Callable[[dist.ProcessGroup], T]) -> T:
    """What `call` returns. Whatever it raises makes this rank leave the group.

    Tried: gloo keeps them open, and the others waiting, until nothing refers to the group or to what was sent over it.
    So nobody keeps the group but `_groups`, and the frames of `call` go with the traceback.
    """
    try:
        return call(_groups[_world()])
    except ShardckptError as error:
        _let_go(error)
        leave_group()
        raise
    except RuntimeError as error:
        _let_go(error)
        leave_group()
        raise RankTimeoutError(
            "a rank left in the middle of a load, or was silent for too long, while ranks read for each other; look at"
            f" the log of the rank that failed first ({first_line(error)})."
        ) from error
    except BaseException as error:
        _let_go(error)
        leave_group()
        raise


def reduce(failed: torch.Tensor, listen: Callable[[], None], group: dist.ProcessGroup) -> None:
    """Wait for all ranks, in slices: only between them is an interrupt, or what is said elsewhere, heard of."""
    work = dist.all_reduce(failed, dist.ReduceOp.MAX, group=group, async_op=True)
    assert work is not None, "every rank is in the group"
    while True:
        try:
            work.wait(_SLICE)
            return
        except RuntimeError:
            if work.is_completed():
                raise
        listen()


def _let_go(error: BaseException) -> None:
    """Have an error, and those amid which it came, keep no frame that has the group."""
    found: BaseException | None = error
    while found is not None:
        found.__traceback__ = None
        found = found.__context__


class Passed(NamedTuple):
    """A buffer on its way from or to a rank."""

    buffer: torch.Tensor
    rank: int
    tag: int


def transfer(group: dist.ProcessGroup, incoming: Sequence[Passed], outgoing: Sequence[Passed]) -> None:
    """Fill and send buffers, all at once."""
    works = [dist.irecv(buffer, rank, group=group, tag=tag) for buffer, rank, tag in incoming]
    works += [dist.isend(buffer, rank, group=group, tag=tag) for buffer, rank, tag in outgoing]
    for work in works:
        assert work is not None, "every rank is in the group"
        work.wait()
