"""Whether all ranks see one place: disks of their own, where one that they share is meant, look fine to each."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar

from shardckpt import filenames
from shardckpt.errors import ObjectNotFoundError, StorageError
from shardckpt.planner import named_ranks
from shardckpt.storage import Storage, join

LATE_SECONDS: Final = 30.0
"""How long a network file system may take to show on one machine what another has written: NFS looks at a directory
again after so long."""
_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 1.0

T = TypeVar("T")


def awaited(storage: Storage, look: Callable[[], T]) -> T:
    """What ``look`` returns, for something that another rank has made: where it is not here yet, it may come.

    Raises ObjectNotFoundError if it does not.
    """
    deadline = time.monotonic() + (LATE_SECONDS if storage.has_places else 0.0)
    pause = _PAUSE_SECONDS
    while True:
        try:
            return look()
        except ObjectNotFoundError:
            if time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        storage.list()  # has a network file system ask its server


def sees(storage: Storage, save_id: str) -> bool:
    """Whether the marker that rank 0 has left for a save is here."""
    try:
        awaited(storage, partial(storage.size, filenames.marker_name(save_id)))
    except ObjectNotFoundError:
        return False
    return True


def not_shared(storage: Storage, save_id: str, seen: Sequence[bool]) -> StorageError:
    """The error where some ranks do not see the marker; ``seen`` by rank."""
    blind = named_ranks(rank for rank, sees in enumerate(seen) if not sees)
    others = named_ranks(rank for rank, sees in enumerate(seen) if sees)
    marker = join(storage.url, filenames.marker_name(save_id))
    return StorageError(
        f"{storage.url} is not one place for all ranks. Rank 0 has made {marker}, which {others} can see and {blind}"
        " cannot. All ranks must save to one shared file system, mounted at the same path on every node, or to an"
        " object store; a node's own disk is neither. Nothing was written."
    )
