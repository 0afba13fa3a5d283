"""Checkpoints in an object store, by obstore: a client in Rust that neither holds the GIL nor copies what it sends.

It lacks a few things that are seldom needed: listing unfinished uploads, objects whose names end in a slash, parts that
come in any order, copies of more than 5 GiB. For those there may be a *spare*: a storage of the same place over fsspec.
"""

import builtins
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import obstore

from shardckpt.errors import CorruptCheckpointError, ObjectExistsError, ObjectNotFoundError, StorageError
from shardckpt.storage.base import GET_LIMIT, ObjectWriter, Read, Stat, Storage, Uploads, check_name, copy_plain
from shardckpt.storage.connection import Connection
from shardckpt.storage.downloads import STRETCH, Download
from shardckpt.storage.remote import forget
from shardckpt.storage.retry import retrying
from shardckpt.storage.traffic import WIDTH, fill, incoming
from shardckpt.storage.translate import is_missing_bucket, is_transient, lacks_conditions, translating
from shardckpt.storage.uploads import Upload
from shardckpt.workers import for_each

if TYPE_CHECKING:
    from obstore import PutMode, UpdateVersion

_BESIDE = {"s3fs": "S3FileSystem", "gcsfs": "GCSFileSystem", "adlfs": "AzureBlobFileSystem"}

COPY_LIMIT = 5 << 30
"""Bytes that S3 copies in one request."""


class ObjectStorage:
    """A key prefix in a bucket. The :class:`~shardckpt.storage.Storage` contract applies.

    Args:
        connection: the clients of the bucket.
        prefix: the key of the place, without slashes at its ends; "" is the whole bucket.
        url: the place for messages, without credentials.
        spare: opens the same place over fsspec; None where that is not installed.
    """

    def __init__(self, connection: Connection, prefix: str, url: str, spare: Callable[[], Storage] | None) -> None:
        self.url = url.rstrip("/")
        self.read_cache = ""
        self.has_places = False
        self.width = WIDTH
        self.stretch = STRETCH
        self.connection = connection
        self._prefix = prefix
        self._open_spare = spare
        self._spare: Storage | None = None

    def create(self, name: str, size_hint: int, *, front_last: bool = False) -> ObjectWriter:
        check_name(name)
        if front_last and (spare := self.spare()) is not None:
            return spare.create(name, size_hint, front_last=True)
        return Upload(self, name, size_hint)

    def put(self, name: str, data: bytes, *, replace: bool | bytes, durable: bool = True) -> None:  # noqa: ARG002 - a put is durable
        key = self.key_of(name)
        with self.translating("write", name):
            if replace is True:
                retrying(lambda: obstore.put(self.connection.store, key, data, use_multipart=False))
            elif replace is False:
                # Asked as well as told, for stores that ignore the condition; on those two writers can both succeed.
                if self._found(key) is not None:
                    raise ObjectExistsError(f"cannot write {self.url_of(name)}: it exists already")
                self._put_on_condition(key, data, "create")
            else:
                found = self._found(key)
                if found is None or found[0] != replace:
                    raise ObjectExistsError(f"cannot replace {self.url_of(name)}: it is not what it was")
                self._put_on_condition(key, data, found[1])
        self.changed([name])

    def get(self, name: str, *, limit: int = GET_LIMIT) -> bytes:
        def read() -> bytes | int:
            found = obstore.get(self.connection.store, key)
            size = int(found.meta["size"])
            return bytes(found.bytes()) if size <= limit else size

        key = self.key_of(name)
        with self.translating("read", name):
            data = retrying(read)
        if isinstance(data, int):
            raise CorruptCheckpointError(
                f"{self.url_of(name)} is {data} bytes long, more than the {limit} that are sensible"
            )
        return data

    def read_into(self, name: str, offset: int, into: memoryview, *, cached: bool = True) -> None:  # noqa: ARG002 - there is no cache
        fill(offset, into, self.stretch, partial(self.stream, name))

    def stream(self, name: str, start: int, stop: int) -> AbstractContextManager[Read]:  # noqa: ARG002 - the first call says
        return incoming(self.url_of(name), Download(self, name, stop))

    def in_cache(self, name: str, offset: int, nbytes: int) -> bool:  # noqa: ARG002 - there is none
        check_name(name)
        return False

    def size(self, name: str) -> int:
        key = self.key_of(name)
        with self.translating("look at", name):
            return int(obstore.head(self.connection.store, key)["size"])

    def list(self) -> builtins.list[Stat]:
        # Consoles and s3fs mark an empty directory with an object of its name and a slash; here it shows without.
        return sorted(
            Stat(item["path"][len(self._before) :], int(item["size"]), item["last_modified"].timestamp())
            for item in self._listed()["objects"]
            if item["path"] != self._prefix
        )

    def children(self) -> builtins.list[str]:
        return sorted(path[len(self._before) :] for path in self._listed()["common_prefixes"])

    def delete(self, names: Sequence[str]) -> None:
        keys = [self.key_of(name) for name in names]
        with self.translating("delete objects of"):
            if keys:
                retrying(lambda: obstore.delete(self.connection.store, keys))
        self.changed(names)

    def copy_from(self, other: Storage, names: Sequence[str]) -> None:
        for_each(names, partial(self._copy, other), threads=self.width, name="copy")

    def uploads(self) -> builtins.list[Stat]:
        """Return the unfinished uploads in this place, as far as they can be found: see `Uploads`."""
        spare: object = self.spare()
        return spare.uploads() if isinstance(spare, Uploads) else []

    def cancel_uploads(self, names: Sequence[str]) -> None:
        """Cancel the unfinished uploads of objects; raises StorageError where this client alone cannot."""
        spare: object = self.spare()
        if not isinstance(spare, Uploads):
            raise StorageError(f"cannot cancel uploads to {self.url}: only s3fs can, which is not installed")
        spare.cancel_uploads(names)

    def changed(self, names: Sequence[str]) -> None:
        """Make s3fs and its like, where in use, forget what they know: Lightning looks at checkpoints through them."""
        for package, kind in _BESIDE.items():
            module = sys.modules.get(package)
            if module is not None:
                for name in names:
                    forget(getattr(module, kind), self.url_of(name).partition("://")[2])

    def prepare(self) -> None:
        """Check that the bucket exists and the credentials may list it; a prefix needs no making."""
        with self.translating("use"):
            next(iter(obstore.list(self.connection.store, self._prefix or None, chunk_size=1)), None)

    def remove_place(self) -> None:
        """Delete the object that marks the prefix as a directory, if there is one."""
        if any(item["path"] == self._prefix for item in self._listed()["objects"]) and (spare := self.spare()):
            spare.remove_place()

    def unlink_link(self) -> bool:
        """Return False: an object store has no links."""
        return False

    def free_bytes(self) -> int | None:
        """Return None: an object store does not say."""
        return None

    def sync(self) -> None:
        """Do nothing: all is durable at once."""

    def spare(self) -> Storage | None:
        """The same place over fsspec, for what this client cannot do; None where it is not installed."""
        if self._spare is None and self._open_spare is not None:
            self._spare = self._open_spare()
        return self._spare

    def key_of(self, name: str) -> str:
        """The key of an object in the bucket."""
        return self._before + check_name(name)

    def url_of(self, name: str) -> str:
        """The URL of an object, for messages."""
        return f"{self.url}/{name}"

    def translating(self, doing: str, name: str = "") -> AbstractContextManager[None]:
        """Enclose calls to the client: what it raises comes out as one of our errors."""
        return translating(doing, self.url_of(name) if name else self.url, self.connection.secrets)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @property
    def _before(self) -> str:
        return f"{self._prefix}/" if self._prefix else ""

    def _copy(self, other: Storage, name: str) -> None:
        if not isinstance(other, ObjectStorage) or other.connection is not self.connection:
            copy_plain(other, self, name)
        elif (size := other.size(name)) <= COPY_LIMIT:
            with self.translating("copy", name):
                source, target = other.key_of(name), self.key_of(name)
                retrying(partial(obstore.copy, self.connection.store, source, target))
        elif (spare := self.spare()) is not None and (theirs := other.spare()) is not None:
            spare.copy_from(theirs, [name])
        else:
            raise StorageError(f"cannot copy {other.url_of(name)}: it has {size} bytes, and no store copies so much")

    def _listed(self) -> Any:
        with self.translating("list"):
            return retrying(lambda: obstore.list_with_delimiter(self.connection.store, self._prefix or None))

    def _found(self, key: str) -> "tuple[bytes, UpdateVersion] | None":
        """What an object holds and how the store tells it from others of its name; None if there is none."""
        try:
            found = retrying(lambda: obstore.get(self.connection.store, key))
            # S3 and Azure go by the tag, Google by the version.
            marks = {word: mark for word in ("e_tag", "version") if (mark := found.meta[word]) is not None}
            return bytes(found.bytes()), cast("UpdateVersion", marks)
        except FileNotFoundError as error:
            if not isinstance(error, ObjectNotFoundError) and is_missing_bucket(error):
                raise
            return None

    def _put_on_condition(self, key: str, data: bytes, mode: "PutMode") -> None:
        attempts = 0

        def send() -> None:
            nonlocal attempts
            attempts += 1
            try:
                obstore.put(self.connection.once, key, data, mode=mode, use_multipart=False)
            except Exception as error:
                if lacks_conditions(error):
                    self.connection.lacks_conditions()
                    obstore.put(self.connection.store, key, data, use_multipart=False)
                    return
                # If the answer to an earlier attempt was lost, what stands in the way of this one is its work.
                found = None if attempts == 1 or is_transient(error) else self._found(key)
                if found is None or found[0] != data:
                    raise

        retrying(send)
