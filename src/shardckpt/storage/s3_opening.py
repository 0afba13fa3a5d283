"""Which client talks to a bucket: obstore where it is installed and can be told what the user said, else s3fs."""

import importlib.util
import logging
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from shardckpt.errors import UsageError
from shardckpt.storage.base import Storage
from shardckpt.storage.concealment import longest_first, secrets_of, without_credentials
from shardckpt.storage.s3_options import (
    UntranslatableError,
    check,
    secrets_around,
    store_factory,
    translated,
    without_payload_hashes,
)

_log = logging.getLogger(__name__)

_BUCKET = re.compile(r"[A-Za-z0-9.\-_]{1,255}")
# Of the segments of a key, those that obstore refuses; every other name it takes as it is.
_UNFIT = re.compile(r"(^|/)(\.{0,2})(/|$)|[\x00-\x1f\x7f]|\?versionId=")

_told: set[str] = set()


def open_s3(url: str, options: Mapping[str, Any]) -> Storage:
    """Return the storage at an ``s3://`` URL; see :func:`shardckpt.storage.open_storage`."""
    check(url, options)
    bucket, _, key = url.partition("://")[2].partition("/")
    if not bucket:
        raise UsageError(f"{url} names no bucket: it must be s3://bucket/path")
    with_s3fs = partial(open_with_s3fs, url, options)
    reason = _reason_for_s3fs(bucket, key.rstrip("/"))
    if reason is None:
        from shardckpt.storage.connection import connection_to
        from shardckpt.storage.objects import ObjectStorage

        try:
            connection = connection_to(
                f"s3://{bucket}", options, ("AWS_",), lambda: store_factory(bucket, translated(options))
            )
            spare = with_s3fs if importlib.util.find_spec("s3fs") else None
            return ObjectStorage(connection, key.rstrip("/"), without_credentials(url), spare)
        except UntranslatableError as option:
            reason = f"obstore has nothing like the storage option {option}"
    if reason not in _told:
        _told.add(reason)
        _log.info("s3fs is used for %s, which is slower than obstore: %s", without_credentials(url), reason)
    return with_s3fs()


def open_with_s3fs(url: str, options: Mapping[str, Any]) -> Storage:
    """Return the storage at an ``s3://`` URL, over s3fs."""
    from shardckpt.storage.remote import filesystem_of

    filesystem, path = filesystem_of(url, without_payload_hashes(options))
    from shardckpt.storage.s3 import S3Storage

    names = [name for name in (options.get("username"), options.get("key")) if isinstance(name, str)]
    secrets = longest_first((*secrets_of(options), *secrets_around(options.get("profile")), *names))
    return S3Storage(filesystem, path, without_credentials(url), secrets)


def _reason_for_s3fs(bucket: str, key: str) -> str | None:
    if importlib.util.find_spec("obstore") is None:
        return 'obstore is not installed (pip install "shardckpt[s3]")'
    if not _BUCKET.fullmatch(bucket):
        if ":" in bucket:
            return "obstore does not know access points"
        raise UsageError(f"{bucket!r} is not the name of a bucket")
    return unfit_key(key)


def unfit_key(key: str) -> str | None:
    """Why obstore cannot be used for what is below a key, in this process; None if it can."""
    if key and _UNFIT.search(key):
        return "obstore refuses keys with empty parts, dots for parts, control characters or a version"
    from shardckpt.storage.connection import forked

    return "obstore does not work in a process forked from one that used it" if forked() else None
