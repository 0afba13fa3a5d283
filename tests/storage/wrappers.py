"""Storages around a storage: they count, fail or dawdle, and leave the rest to the one inside."""

import builtins
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from shardckpt.storage import GET_LIMIT, ObjectWriter, Read, Stat, Storage


class WrapperStorage:
    """Delegates everything. Subclasses override :meth:`called`, or single methods."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.url = inner.url
        self.width = inner.width
        self.stretch = inner.stretch
        self.has_places = inner.has_places
        self.read_cache = ""  # as if it were another machine's

    def called(self, method: str, name: str, nbytes: int) -> None:
        """Hear of a call before it is passed on: ``method`` is ``put``, ``read_into``, ``writer.commit`` and so on."""

    def create(self, name: str, size_hint: int, *, front_last: bool = False) -> ObjectWriter:
        self.called("create", name, size_hint)
        return WrapperWriter(self, name, self.inner.create(name, size_hint, front_last=front_last))

    def put(self, name: str, data: bytes, *, replace: bool | bytes, durable: bool = True) -> None:
        self.called("put", name, len(data))
        self.inner.put(name, data, replace=replace, durable=durable)

    def get(self, name: str, *, limit: int = GET_LIMIT) -> bytes:
        self.called("get", name, 0)
        return self.inner.get(name, limit=limit)

    def read_into(self, name: str, offset: int, into: memoryview, *, cached: bool = True) -> None:
        self.called("read_into", name, into.nbytes)
        self.inner.read_into(name, offset, into, cached=cached)

    def stream(self, name: str, start: int, stop: int) -> AbstractContextManager[Read]:
        return nullcontext(partial(self.read_into, name, cached=False))

    def in_cache(self, name: str, offset: int, nbytes: int) -> bool:
        return False

    def size(self, name: str) -> int:
        self.called("size", name, 0)
        return self.inner.size(name)

    def list(self) -> builtins.list[Stat]:
        self.called("list", "", 0)
        return self.inner.list()

    def children(self) -> builtins.list[str]:
        self.called("children", "", 0)
        return self.inner.children()

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self.called("delete", name, 0)
        self.inner.delete(names)

    def copy_from(self, other: Storage, names: Sequence[str]) -> None:
        for name in names:
            self.called("copy_from", name, 0)
        self.inner.copy_from(other.inner if isinstance(other, WrapperStorage) else other, names)

    def prepare(self) -> None:
        self.called("prepare", "", 0)
        self.inner.prepare()

    def remove_place(self) -> None:
        self.called("remove_place", "", 0)
        self.inner.remove_place()

    def unlink_link(self) -> bool:
        self.called("unlink_link", "", 0)
        return self.inner.unlink_link()

    def free_bytes(self) -> int | None:
        self.called("free_bytes", "", 0)
        return self.inner.free_bytes()

    def sync(self) -> None:
        self.called("sync", "", 0)
        self.inner.sync()


class WrapperWriter:
    """The writer of a :class:`WrapperStorage`; its calls are heard as ``writer.write`` and so on."""

    def __init__(self, storage: WrapperStorage, name: str, inner: ObjectWriter) -> None:
        self.storage = storage
        self.name = name
        self.inner = inner

    def write(self, offset: int, data: memoryview) -> None:
        self.storage.called("writer.write", self.name, data.nbytes)
        self.inner.write(offset, data)

    def commit(self) -> None:
        self.storage.called("writer.commit", self.name, 0)
        self.inner.commit()

    def abort(self) -> None:
        self.inner.abort()


class CountingStorage(WrapperStorage):
    """Counts calls by method, and bytes read and written by name."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.bytes_read: Counter[str] = Counter()
        self.bytes_written: Counter[str] = Counter()
        self._lock = threading.Lock()

    def called(self, method: str, name: str, nbytes: int) -> None:
        with self._lock:
            self.calls[method] += 1
            if method == "read_into":
                self.bytes_read[name] += nbytes
            elif method in ("put", "writer.write"):
                self.bytes_written[name] += nbytes

    def get(self, name: str, *, limit: int = GET_LIMIT) -> bytes:
        data = super().get(name, limit=limit)
        with self._lock:
            self.bytes_read[name] += len(data)
        return data


class FaultyStorage(WrapperStorage):
    """Raises ``error`` instead of passing on the calls ``first`` to ``last`` (both from 1) of ``method``.

    ``matching`` narrows it down to the names it is true for; other calls are not counted.
    """

    def __init__(
        self,
        inner: Storage,
        method: str,
        error: BaseException,
        *,
        first: int = 1,
        last: int | None = None,
        matching: Callable[[str], bool] = lambda _: True,
    ) -> None:
        super().__init__(inner)
        self.method = method
        self.error = error
        self.first = first
        self.last = first if last is None else last
        self.matching = matching
        self.seen = 0
        self._lock = threading.Lock()

    def called(self, method: str, name: str, nbytes: int) -> None:
        if method != self.method or not self.matching(name):
            return
        with self._lock:
            self.seen += 1
            hit = self.first <= self.seen <= self.last
        if hit:
            raise self.error


class SlowStorage(WrapperStorage):
    """Waits before each call: ``delay`` seconds, plus the time that its bytes take at ``bytes_per_second``."""

    def __init__(
        self, inner: Storage, *, delay: float = 0.0, bytes_per_second: float = float("inf"), methods: Sequence[str] = ()
    ) -> None:
        super().__init__(inner)
        self.delay = delay
        self.bytes_per_second = bytes_per_second
        self.methods = frozenset(methods)

    def called(self, method: str, name: str, nbytes: int) -> None:
        if not self.methods or method in self.methods:
            time.sleep(self.delay + nbytes / self.bytes_per_second)
