"""Whether a rank sees the place that rank 0 has opened: on a disk of its own it would write what nobody finds."""

import platform
import time
from typing import Final

from shardckpt import filenames
from shardckpt.errors import ObjectNotFoundError, StorageError
from shardckpt.storage import Storage

SECONDS: Final = 30.0
"""How long a network file system may take to show what another host has put there: NFS looks again after so long."""
_PAUSE_SECONDS: Final = 0.05


def check_seen(storage: Storage, save_id: str) -> None:
    """Wait until the marker that rank 0 has left is there. Raises StorageError where it does not come."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            storage.size(filenames.marker_name(save_id))
            return
        except ObjectNotFoundError as error:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"on {platform.node()} nothing is seen of what rank 0 has just put at {storage.url}. All ranks must"
                    " save to one shared file system or object store; a node's own disk is not one. Nothing of the"
                    " state was written. Save to a path that all nodes share."
                ) from error
        time.sleep(_PAUSE_SECONDS)
