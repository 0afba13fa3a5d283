"""Writing one object through the requests of s3fs, each part by the thread that brings it, and none copied."""

import io
import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

from shardckpt.storage.base import BLOCK, Pieces, check_name, octets
from shardckpt.storage.parts import blocks_per_part, check_part, has_size, tell_of_leftovers
from shardckpt.storage.retry import retrying
from shardckpt.storage.traffic import SLOTS

_LEAST: Final = 1 << 20
"""Bytes that the client is given at a time, though it asks for less."""


class _Place(Protocol):
    """What an upload needs of the storage it is for; see `shardckpt.storage.s3`."""

    def url_of(self, name: str) -> str: ...

    def path_of(self, name: str) -> str: ...

    def translating(self, doing: str, name: str = "") -> AbstractContextManager[None]: ...

    def request(self, method: str, name: str | None = None, **arguments: Any) -> Any: ...

    def forget(self, path: str) -> None: ...

    def size(self, name: str) -> int: ...

    def delete(self, names: Sequence[str]) -> None: ...


class S3Writer:
    """One object, uploaded in parts by the threads that bring them.

    The :class:`~shardckpt.storage.ObjectWriter` contract applies. A part is one block, sent from where it lies; for an
    object of more than 10,000 blocks (78 GiB) it is as many consecutive blocks as needed, held until they are together.
    An object of one block is a single PUT.
    """

    def __init__(self, storage: _Place, name: str, size_hint: int) -> None:
        self._storage = storage
        self._name = check_name(name)
        self._pieces = Pieces(storage.url_of(name))
        self._blocks_per_part = blocks_per_part(size_hint)
        self._hold_first = size_hint <= BLOCK
        self._lock = threading.Lock()
        self._beginning = threading.Lock()
        self._held: dict[int, dict[int, bytes]] = {}
        self._etags: dict[int, str] = {}
        self._upload = ""
        self._committed = False

    def write(self, offset: int, data: memoryview) -> None:
        data = octets(data)
        part, block = divmod(offset // BLOCK, self._blocks_per_part)
        with self._pieces.writing(offset, len(data)), self._storage.translating("write", self._name):
            check_part(self._storage.url_of(self._name), part)
            is_held = part == 0 and self._hold_first
            if self._blocks_per_part == 1 and not is_held:
                self._send(part, data)
                return
            copied = bytes(data)
            with self._lock:
                blocks = self._held.setdefault(part, {})
                blocks[block] = copied
                if len(blocks) < self._blocks_per_part or is_held:
                    return
                del self._held[part]
            self._send(part, _joined(blocks))

    def commit(self) -> None:
        size = self._pieces.finish()
        with self._storage.translating("commit", self._name):
            if not self._upload and self._held.keys() <= {0}:
                body = _joined(self._held.pop(0, {}))
                retrying(lambda: self._storage.request("put_object", self._name, Body=Body(body)))
            else:
                for part in sorted(self._held):
                    self._send(part, _joined(self._held.pop(part)))
                self._complete(size)
        self._storage.forget(self._storage.path_of(self._name))
        self._committed = True

    def abort(self) -> None:
        if self._committed:
            return
        self._pieces.close()
        self._held.clear()
        try:
            if self._upload:
                self._storage.request("abort_multipart_upload", self._name, UploadId=self._upload)
            self._storage.delete([self._name])
        except Exception as error:  # noqa: BLE001 - abort never raises
            tell_of_leftovers(self._storage.url_of(self._name), error)

    def _send(self, part: int, data: bytes | memoryview) -> None:
        numbers = {"UploadId": self._begun(), "PartNumber": part + 1}
        with SLOTS:
            answer = retrying(lambda: self._storage.request("upload_part", self._name, Body=Body(data), **numbers))
        with self._lock:
            self._etags[part + 1] = answer["ETag"]

    def _begun(self) -> str:
        with self._beginning:
            if not self._upload:
                answer = retrying(lambda: self._storage.request("create_multipart_upload", self._name))
                self._upload = answer["UploadId"]
            return self._upload

    def _complete(self, size: int) -> None:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(self._etags.items())]
        arguments = {"UploadId": self._upload, "MultipartUpload": {"Parts": parts}}
        try:
            retrying(lambda: self._storage.request("complete_multipart_upload", self._name, **arguments))
        except FileNotFoundError:
            # The answer to the first of several attempts may have been lost; the later ones find no upload any more.
            if not has_size(self._storage, self._name, size):
                raise


class Body(io.BytesIO):
    """Bytes to send, read from where they lie: what s3fs's client takes without a copy and can begin again with.

    It warns of a plain memoryview, and cannot send one a second time.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        super().__init__()
        self._data = memoryview(data)
        self._at = 0

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int | None = -1) -> Any:
        """Return the next bytes, at least `_LEAST` where there are as many: each call is a turn of the event loop."""
        start = self._at
        size = len(self._data) if size is None or size < 0 else max(size, _LEAST)
        self._at = min(start + size, len(self._data))
        return self._data[start : self._at]

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}[whence]
        self._at = base + offset
        return self._at

    def getbuffer(self) -> memoryview:
        return self._data[:]


def _joined(blocks: dict[int, bytes]) -> bytes:
    return b"".join(blocks[block] for block in sorted(blocks)) if len(blocks) != 1 else next(iter(blocks.values()))
