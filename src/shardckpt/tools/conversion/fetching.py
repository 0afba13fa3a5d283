"""Files of other formats in a storage that is not this machine's: brought here, where they can be mapped."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from shardckpt.errors import CheckpointNotFoundError, ObjectNotFoundError
from shardckpt.storage import BLOCK, Storage, open_storage, split
from shardckpt.storage.translate import translating
from shardckpt.tools.conversion.output import Count
from shardckpt.tools.conversion.safetensors_files import INDEX, SUFFIX
from shardckpt.workers import for_each


def fetch(path: str, folder: str, count: Count, storage_options: Mapping[str, Any] | None) -> str:
    """Bring a file, or a directory of safetensors files, into a local ``folder``; returns where it is there.

    Raises CheckpointNotFoundError where there is neither; StorageError and its kinds.
    """
    parent, name = split(path)
    storage = open_storage(parent, storage_options)
    try:
        _fetch_file(storage, name, folder, count)
    except ObjectNotFoundError as error:
        within = open_storage(path, storage_options)
        names = [stat.name for stat in within.list() if stat.name.endswith(SUFFIX) or stat.name == INDEX]
        if not names:
            raise CheckpointNotFoundError(f"nothing is at {path}.") from error
        for found in names:
            _fetch_file(within, found, folder, count)
        return folder
    return os.path.join(folder, name)


def _fetch_file(storage: Storage, name: str, folder: str, count: Count) -> None:
    size = storage.size(name)
    with translating("write", folder), open(os.path.join(folder, name), "wb") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
        fetch_piece = partial(_piece, storage, name, size, file.fileno(), count)
        for_each(range(0, size, BLOCK), fetch_piece, threads=storage.width, name="fetch")


def _piece(storage: Storage, name: str, size: int, descriptor: int, count: Count, start: int) -> None:
    piece = memoryview(bytearray(min(BLOCK, size - start)))
    storage.read_into(name, start, piece)
    done = 0
    while done < len(piece):
        done += os.pwrite(descriptor, piece[done:], start + done)
    count(len(piece))
