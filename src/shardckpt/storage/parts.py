"""What the rules of S3 mean for whoever writes an object in parts, whichever client sends them."""

import logging
from typing import Final, Protocol

from shardckpt.errors import ObjectNotFoundError, StorageError
from shardckpt.storage.base import BLOCK

MAX_PARTS: Final = 10_000
"""Parts of one upload."""

_log = logging.getLogger(__name__)


class _Place(Protocol):
    def size(self, name: str) -> int: ...


def blocks_per_part(size_hint: int) -> int:
    """How many blocks a part of an object of about so many bytes has."""
    return max(1, -(-size_hint // (BLOCK * MAX_PARTS)))


def check_part(url: str, part: int) -> None:
    """Raise StorageError for the number of a part, from 0 on, that an upload cannot have."""
    if part >= MAX_PARTS:
        raise StorageError(
            f"cannot write {url}: it has more than {MAX_PARTS} parts, since it is larger than it was announced to be"
        )


def has_size(storage: _Place, name: str, size: int) -> bool:
    """Whether there is an object of that size: so an upload has ended of whose end the answer was lost."""
    try:
        return storage.size(name) == size
    except ObjectNotFoundError:
        return False


def tell_of_leftovers(url: str, error: Exception) -> None:
    """Say that an upload is left, because of ``error``."""
    _log.warning(
        "an upload to %s could not be cancelled (%s); its parts cost money until the bucket's lifecycle rules "
        "remove them",
        url,
        type(error).__name__,
    )
