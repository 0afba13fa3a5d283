"""From a path or URL to the storage behind it."""

import os
import re
from collections.abc import Mapping
from typing import Any

from shardckpt.errors import UsageError
from shardckpt.storage.base import Storage
from shardckpt.storage.concealment import secrets_of, without_credentials
from shardckpt.storage.local import LocalStorage

# "proto://rest", or a chain of file systems as fsspec writes it, "simplecache::s3://rest".
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(?:://|::)")
# What pathlib makes of a URL: Path("s3://bucket/key") is "s3:/bucket/key".
_MANGLED = re.compile(r"(?:s3a?|gcs|gs|abfss?|az|adl|hdfs|memory|sftp|ftp|https?):/(?!/)")


def local_path(path: str | os.PathLike[str]) -> str | None:
    """Return the path in the local file system that ``path`` means, or None if it is the URL of something else.

    ``file://`` and ``local://`` are taken off. Nothing is unquoted: ``%20`` is three characters of a name, as it is
    for fsspec and Lightning.

    Raises:
        UsageError: it is empty, or a URL that has been through :class:`pathlib.Path` and lost a slash.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UsageError(f"{text!r} is not a path: it is empty or holds a NUL")
    if _MANGLED.match(text):
        raise UsageError(f"{text!r} looks like a URL that has been through pathlib.Path: pass it as str instead")
    url = _URL.match(text)
    if url is None:
        return text
    if url.group(1) not in ("file", "local") or not text.startswith("://", url.end(1)):
        return None
    if rest := text[url.end() :]:
        return rest
    raise UsageError(f"{text!r} names no directory")


def is_local(path: str | os.PathLike[str]) -> bool:
    """Tell whether ``path`` lies in the local file system."""
    return local_path(path) is not None


def open_storage(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Storage:
    """Return the storage at ``path``, which need not exist. Nothing is read, written or connected to yet.

    Args:
        path: a local path (relative ones are resolved now, a leading ``~`` is expanded), a ``file://`` URL, or any URL
            that fsspec understands.
        storage_options: those of the fsspec file system; a local path ignores them. On ``s3://``, ``gs://``, ``az://``
            and ``abfs://`` obstore does the work where it is installed and can be told the same, else that file system.

    Raises:
        UsageError: nothing understands ``path``, or the package for it is not installed.
    """
    directory = local_path(path)
    if directory is not None:
        return LocalStorage(directory)
    return _open_remote(os.fspath(path), dict(storage_options or {}))


def _open_remote(url: str, options: Mapping[str, Any]) -> Storage:
    if url.startswith(("s3://", "s3a://")):
        from shardckpt.storage.s3_opening import open_s3

        return open_s3(url, options)
    if url.partition("://")[0] in ("gs", "gcs", "az", "abfs", "abfss"):
        from shardckpt.storage.cloud_opening import open_cloud

        return open_cloud(url, options)
    from shardckpt.storage.remote import RemoteStorage, filesystem_of

    filesystem, path = filesystem_of(url, options)
    return RemoteStorage(filesystem, path, without_credentials(url), secrets_of(options))
