"""Where checkpoints are kept: local directories, S3, and any other file system that fsspec knows.

Retries, foreign errors and the differences between backends end in this package. Importing it imports no backend: that
happens when :func:`open_storage` meets the first URL of one.
"""

from shardckpt.storage.base import BLOCK, GET_LIMIT, ObjectWriter, Read, Stat, Storage, Uploads, check_name, join, split
from shardckpt.storage.local import TEMP_PREFIX, LocalStorage, is_temporary, temporary_name
from shardckpt.storage.opening import is_local, local_path, open_storage
from shardckpt.storage.retry import retries

__all__ = [
    "BLOCK",
    "GET_LIMIT",
    "TEMP_PREFIX",
    "LocalStorage",
    "ObjectWriter",
    "Read",
    "Stat",
    "Storage",
    "Uploads",
    "check_name",
    "is_local",
    "is_temporary",
    "join",
    "local_path",
    "open_storage",
    "retries",
    "split",
    "temporary_name",
]
