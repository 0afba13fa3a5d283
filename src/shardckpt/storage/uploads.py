"""Writing one object through obstore: its blocks become the parts of an upload as they are, without being copied."""

import logging
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import obstore

from shardckpt.errors import StorageError
from shardckpt.storage.base import BLOCK, Pieces, octets
from shardckpt.storage.parts import blocks_per_part, check_part, has_size, tell_of_leftovers
from shardckpt.storage.retry import retrying
from shardckpt.storage.traffic import SLOTS, WIDTH

if TYPE_CHECKING:
    from obstore import WritableFile

    from shardckpt.storage.connection import Connection

GRACE: Final = 0.05
"""Seconds that a piece which overtook others waits for them, which is cheaper than the copy that is made otherwise."""

_log = logging.getLogger(__name__)


class _Place(Protocol):
    """What an upload needs of the storage it is for; see `shardckpt.storage.objects`."""

    connection: "Connection"

    def key_of(self, name: str) -> str: ...

    def url_of(self, name: str) -> str: ...

    def translating(self, doing: str, name: str = "") -> AbstractContextManager[None]: ...

    def changed(self, names: Sequence[str]) -> None: ...

    def size(self, name: str) -> int: ...

    def delete(self, names: Sequence[str]) -> None: ...

    def cancel_uploads(self, names: Sequence[str]) -> None: ...


class _Loan:
    """A piece that the client holds on to, without a copy, until the store has it or the client gives up."""

    def __init__(self, view: memoryview, loans: "set[_Loan]") -> None:
        self.returned = threading.Event()
        self._loans = loans
        self._loans.add(self)
        self._watch = weakref.ref(view, self.end)

    def end(self, _: "weakref.ref[memoryview] | None" = None) -> None:
        """The client has let go of the piece, or has never had it."""
        if self in self._loans:
            self._loans.discard(self)
            SLOTS.release()
            self.returned.set()


class Upload:
    """One object, sent as the parts of one upload. The :class:`~shardckpt.storage.ObjectWriter` contract applies.

    obstore takes parts in the order of their offsets and sends them all at the same time. A piece that comes before its
    turn waits for a moment, and is then copied and held; the writer of a shard brings them in order, give or take what
    its threads overtake each other by. A piece whose turn it is goes as it is, and :meth:`write` returns when the
    client has let go of it.
    """

    def __init__(self, storage: "_Place", name: str, size_hint: int) -> None:
        self._storage = storage
        self._name = name
        self._part = BLOCK * blocks_per_part(size_hint)
        # An object of one block costs one request instead of three.
        self._alone = size_hint <= BLOCK
        self._pieces = Pieces(storage.url_of(name))
        self._turn = threading.Condition()
        self._early: dict[int, bytes] = {}
        self._loans: set[_Loan] = set()
        self._position = 0
        self._front: list[bytes] = []
        self._file: WritableFile | None = None
        self._has_strays = False
        self._closed = False
        self._committed = False

    def write(self, offset: int, data: memoryview) -> None:
        data = octets(data)
        with self._pieces.writing(offset, len(data)), self._storage.translating("write", self._name):
            check_part(self._storage.url_of(self._name), offset // self._part)
            with self._turn:
                self._alone &= offset == 0
                self._send_held()
                if not self._alone:
                    self._turn.wait_for(lambda: self._position >= offset, GRACE)
                if self._alone or offset != self._position:
                    self._early[offset] = bytes(data)
                    return
                loan = self._send(data)
                self._send_held()
                self._turn.notify_all()
            if loan is not None:
                loan.returned.wait()

    def commit(self) -> None:
        size = self._pieces.finish()
        with self._storage.translating("commit", self._name):
            if self._file is None:
                body = b"".join((*self._front, self._early.pop(0, b"")))
                store, key = self._storage.connection.store, self._storage.key_of(self._name)
                retrying(lambda: obstore.put(store, key, body, use_multipart=False))
            else:
                self._closed = True
                try:
                    self._file.close()
                except Exception:
                    # The answer to the first of several attempts may have been lost; later ones find no upload.
                    if not has_size(self._storage, self._name, size):
                        raise
        self._storage.changed([self._name])
        self._committed = True
        if self._has_strays:
            self._cancel_all()

    def abort(self) -> None:
        if self._committed:
            return
        self._pieces.close()
        self._early.clear()
        if self._file is not None and not self._closed:
            self._closed = True
            try:
                self._file.__exit__(StorageError, None, None)
            except Exception:  # noqa: BLE001 - abort never raises, and there is another way
                self._has_strays = True
        elif self._file is not None:
            # It could not be completed, and the client has forgotten it by then.
            self._has_strays = True
        if self._has_strays:
            self._cancel_all()
        try:
            self._storage.delete([self._name])
        except Exception as error:  # noqa: BLE001 - as above
            _log.warning("%s could not be removed (%s)", self._storage.url_of(self._name), type(error).__name__)

    def _cancel_all(self) -> None:
        """Cancel what uploads there are of this object: its name is that of one save, so all are its own."""
        try:
            self._storage.cancel_uploads([self._name])
        except Exception as error:  # noqa: BLE001 - the save has succeeded or failed without this
            tell_of_leftovers(self._storage.url_of(self._name), error)

    def _send_held(self) -> None:
        """Send what came before its turn, as far as that has come."""
        while not self._alone and (held := self._early.pop(self._position, None)) is not None:
            self._send(memoryview(held))

    def _send(self, data: memoryview) -> "_Loan | None":
        """Hand over the piece whose turn it is; None if it was copied, since the client keeps it until a part is full.

        Called with the turn held.
        """
        loan = None
        if (self._position + len(data)) % self._part:
            self._hand_over(bytes(data))
        else:
            SLOTS.acquire()
            # A view of its own, that nobody else refers to: it dies when the client lets go of it.
            view = memoryview(data)
            loan = _Loan(view, self._loans)
            try:
                self._hand_over(view)
            except BaseException:
                loan.end()
                raise
            finally:
                del view
        self._position += len(data)
        return loan

    def _hand_over(self, data: bytes | memoryview) -> None:
        if self._file is not None:
            self._file.write(data)
        elif self._position + len(data) < self._part:
            self._front.append(bytes(data))
        else:
            retrying(partial(self._begin, data))
            self._front.clear()

    def _begin(self, last: bytes | memoryview) -> None:
        """Have the client begin the upload, which it does when it has a whole part."""
        key = self._storage.key_of(self._name)
        store = self._storage.connection.store
        file = obstore.open_writer(store, key, buffer_size=self._part, max_concurrency=WIDTH)
        try:
            for data in (*self._front, last):
                file.write(data)
        except Exception:
            # The store may have begun one, and only the answer that says so have been lost.
            self._has_strays = True
            raise
        self._file = file
