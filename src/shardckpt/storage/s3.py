"""Checkpoints on S3 and its imitations, through the requests of s3fs rather than its files.

``open("wb")`` of s3fs sends the parts of an object one after another; here each thread that brings a piece sends it.
Listings and sizes are asked of the server every time: s3fs answers them from a cache that other processes do not know.
"""

import builtins
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

from shardckpt.errors import ObjectExistsError, StorageError, UsageError
from shardckpt.storage.base import GET_LIMIT, ObjectWriter, Stat, Storage, copy_plain
from shardckpt.storage.remote import RemoteStorage
from shardckpt.storage.retry import retrying
from shardckpt.storage.s3_uploads import S3Writer
from shardckpt.storage.translate import is_transient, lacks_conditions, s3_code
from shardckpt.workers import for_each

_DELETE_BATCH = 1000

_log = logging.getLogger(__name__)


class S3Storage(RemoteStorage):
    """A key prefix in a bucket. The :class:`~shardckpt.storage.Storage` contract applies.

    ``put(replace=False)`` is a conditional PUT: it keeps its promise on servers that know ``If-None-Match``.
    """

    def __init__(self, filesystem: Any, path: str, url: str, secrets: tuple[str, ...]) -> None:
        super().__init__(filesystem, path, url, secrets)
        self.has_places = False
        # s3fs knows where a bucket's name ends: that of an access point has slashes in it.
        self._bucket, key, _ = filesystem.split_path(self._root)
        self._prefix = f"{key}/" if key else ""
        self._process = os.getpid()
        if not self._bucket:
            raise UsageError(f"{self.url} names no bucket")

    def create(self, name: str, size_hint: int, *, front_last: bool = False) -> ObjectWriter:  # noqa: ARG002 - any order will do
        return S3Writer(self, name, size_hint)

    def put(self, name: str, data: bytes, *, replace: bool | bytes, durable: bool = True) -> None:  # noqa: ARG002 - a put is durable
        with self.translating("write", name):
            condition = {}
            if replace is not True:
                # Asked as well as told, for stores that ignore the condition; on those two writers can both succeed.
                held, tag = self._held(name)
                if held != (None if replace is False else replace):
                    raise ObjectExistsError(f"cannot write {self.url_of(name)}: it exists already, or has changed")
                condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
            self._put(name, data, condition)
        self.forget(self.path_of(name))

    def _put(self, name: str, data: bytes, condition: dict[str, str]) -> None:
        """Put an object, on a condition if there is one. Called within :meth:`translating`."""
        for word in condition:
            if not self._knows(word):
                raise UsageError(f"writing with {word} needs botocore 1.35.70 or newer: upgrade s3fs")

        def send() -> None:
            try:
                self.request("put_object", name, Body=data, **condition)
            except Exception as error:
                if condition and lacks_conditions(error):
                    _log.warning("%s knows no conditional writes: two jobs must not save to one path", self.url)
                    self.request("put_object", name, Body=data)
                # The client itself tries again: what stands in the way may be the work of an attempt whose answer got
                # lost. It is if it holds the same bytes; what is written on a condition names the save it belongs to.
                elif not condition or is_transient(error) or self._held(name)[0] != data:
                    raise

        retrying(send)

    def get(self, name: str, *, limit: int = GET_LIMIT) -> bytes:
        # One byte more than allowed is asked for, so that no second request is needed to know the size.
        data = self._read_range(name, 0, limit + 1)
        if len(data) > limit:
            raise self.too_large(name, self.size(name), limit)
        return data

    def size(self, name: str) -> int:
        with self.translating("look at", name):
            return int(retrying(lambda: self.request("head_object", name))["ContentLength"])

    def list(self) -> builtins.list[Stat]:
        return sorted(
            Stat(item["Key"][len(self._prefix) :], int(item["Size"]), _seconds(item.get("LastModified")))
            for page in self._pages()
            for item in page.get("Contents", ())
            # Consoles and s3fs mark an empty directory with an object of its name and a slash.
            if item["Key"] != self._prefix
        )

    def children(self) -> builtins.list[str]:
        return sorted(
            item["Prefix"][len(self._prefix) : -1] for page in self._pages() for item in page.get("CommonPrefixes", ())
        )

    def delete(self, names: Sequence[str]) -> None:
        keys = [self.key_of(name) for name in names]
        for start in range(0, len(keys), _DELETE_BATCH):
            batch = {"Objects": [{"Key": key} for key in keys[start : start + _DELETE_BATCH]], "Quiet": True}
            with self.translating("delete objects of"):
                answer = retrying(partial(self.request, "delete_objects", Delete=batch))
            for name in names[start : start + _DELETE_BATCH]:
                self.forget(self.path_of(name))
            # The answer is a success even if no key could be deleted.
            if failed := answer.get("Errors"):
                first = failed[0]
                raise StorageError(
                    f"cannot delete {len(failed)} of {len(keys)} objects of {self.url}, the first being "
                    f"{first.get('Key')}: {first.get('Message')} ({first.get('Code')})"
                )

    def copy_from(self, other: Storage, names: Sequence[str]) -> None:
        def copy(name: str) -> None:
            if isinstance(other, S3Storage) and other.filesystem == self.filesystem:
                source, target = other.path_of(name), self.path_of(name)
                self.forget(source)
                with self.translating("copy", name):
                    self._check_process()
                    self.filesystem.cp_file(source, target)
                self.forget(target)
            else:
                copy_plain(other, self, name)

        for_each(names, copy, threads=self.width, name="copy")

    def uploads(self) -> builtins.list[Stat]:
        """Return the unfinished uploads in this place, whoever began them; see `Uploads`."""
        return sorted(
            Stat(upload["Key"][len(self._prefix) :], 0, _seconds(upload.get("Initiated")))
            for upload in self._unfinished(self._prefix)
            if "/" not in upload["Key"][len(self._prefix) :]
        )

    def cancel_uploads(self, names: Sequence[str]) -> None:
        """Cancel the unfinished uploads of objects, whoever began them."""
        for name in names:
            for upload in self._unfinished(self.key_of(name)):
                if upload["Key"] == self.key_of(name):
                    with self.translating("cancel the uploads of", name), suppress(FileNotFoundError):
                        self.request("abort_multipart_upload", name, UploadId=upload["UploadId"])

    def prepare(self) -> None:
        """Check that the bucket exists and the credentials may list it; a prefix needs no making."""
        with self.translating("use"):
            self._page(Prefix=self._prefix, MaxKeys=1)

    def remove_place(self) -> None:
        """Delete the object that marks the prefix as a directory, if there is one."""
        if self._prefix:
            with self.translating("remove the marker of"):
                retrying(lambda: self.request("delete_object", Key=self._prefix))
            self.forget(self._root)

    def key_of(self, name: str) -> str:
        """The key of an object in the bucket."""
        return self.path_of(name)[len(self._bucket) + 1 :]

    def request(self, method: str, name: str | None = None, **arguments: Any) -> Any:
        """Send one request of the S3 API for this bucket, and for the object ``name`` if given."""
        self._check_process()
        if name is not None:
            arguments["Key"] = self.key_of(name)
        return self.filesystem.call_s3(method, Bucket=self._bucket, **arguments)

    def _read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        self._check_process()
        path = self.path_of(name)
        with self.translating("read", name):
            try:
                return bytes(retrying(lambda: self.filesystem.cat_file(path, start=offset, end=offset + nbytes)))
            except OSError as error:
                # A range that begins at or beyond the end, an empty object's included, is an error to S3.
                if s3_code(error) not in ("InvalidRange", "416"):
                    raise
                return b""

    def _held(self, name: str) -> tuple[bytes | None, str]:
        """What an object holds, None if there is none, and its tag."""
        try:
            tag = str(retrying(lambda: self.request("head_object", name))["ETag"])
            return self.get(name), tag
        except FileNotFoundError:
            return None, ""

    def _pages(self) -> builtins.list[dict[str, Any]]:
        arguments: dict[str, Any] = {"Prefix": self._prefix, "Delimiter": "/"}
        pages: builtins.list[dict[str, Any]] = []
        with self.translating("list"):
            while True:
                pages.append(retrying(lambda: self._page(**arguments)))
                if not pages[-1].get("IsTruncated"):
                    return pages
                arguments["ContinuationToken"] = pages[-1]["NextContinuationToken"]

    def _page(self, **arguments: Any) -> dict[str, Any]:
        page: dict[str, Any] = self.request("list_objects_v2", **arguments)
        if "IsTruncated" not in page:  # to the client a page of any other server is a listing of nothing
            raise StorageError(f"cannot list {self.url}: the endpoint does not answer as S3 does. Check endpoint_url")
        return page

    def _unfinished(self, prefix: str) -> builtins.list[dict[str, Any]]:
        arguments: dict[str, Any] = {"Prefix": prefix}
        found: builtins.list[dict[str, Any]] = []
        with self.translating("list the uploads of"):
            while True:
                page = retrying(partial(self.request, "list_multipart_uploads", **arguments))
                found += page.get("Uploads", ())
                if not page.get("IsTruncated"):
                    return found
                arguments |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _knows(self, condition: str) -> bool:
        """Whether the client has heard of ``condition``: s3fs drops arguments that its client does not know."""
        model = self.filesystem.s3.meta.service_model.operation_model("PutObject")
        return condition in model.input_shape.members

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise UsageError(
                f"{self.url} was opened before this process was forked, and an S3 connection does not survive that: "
                "open it in the child, or start the child with the spawn method"
            )


def _seconds(moment: Any) -> float | None:
    return moment.timestamp() if isinstance(moment, datetime) else None
