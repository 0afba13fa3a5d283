"""The saves of one Checkpointer, each of which may use what the one before it left: its plan, and its shards.

In the foreground of a save the ranks speak twice: of what each holds, in short, and of the place. In between they speak
of what they hold at length, where their plan is not known to be good; and at the end, in a folder where they have not
met before, of whether they see the same there. The rest is `write`'s.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec

from shardckpt import commit
from shardckpt.background import Background, PendingSave
from shardckpt.coordinator import Operation, taking_part, turn
from shardckpt.errors import StorageError
from shardckpt.options import Path, SaveOptions
from shardckpt.saving.alias_job import AliasJob
from shardckpt.saving.halves import write
from shardckpt.saving.jobs import Job, Order
from shardckpt.saving.own import describe, own_sources
from shardckpt.saving.patience import Patience
from shardckpt.saving.queue import Queue
from shardckpt.saving.structure import (
    Descriptions,
    Opening,
    Structure,
    exchange,
    may_share,
    plan,
    speaks,
    structure_key,
)
from shardckpt.saving.verdict import failure
from shardckpt.staging import StagingPool
from shardckpt.state import Flattened, Stepped, flatten
from shardckpt.storage import Storage, split


@dataclass(frozen=True)
class Request:
    """One call of `save` or `async_save`."""

    state: Any
    path: Path
    open_storage: Callable[[str], Storage]
    """Opens the place at a checkpoint's path; may raise."""
    version: Hashable | None
    options: SaveOptions
    memory: int | None
    """Bytes of staging memory that it may hold; None for no limit."""
    on_over: Callable[[PendingSave], None] | None = None
    """Called when it is over and its call has returned."""
    called: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Last:
    """The save before."""

    job: Job
    version: Hashable | None
    own_structure: str
    """`Flattened.structure` of what differs by rank."""

    def has_shards(self) -> bool:
        """Whether its shards are there, or still to come."""
        pending = self.job.order.pending
        return not pending.done() or (pending.succeeded() and self.job.is_there())


class _Placed(msgspec.Struct, array_like=True):
    """What rank 0 says once there is a place."""

    save_id: str
    look: bool
    """Whether all ranks are to look if they see it."""


_PLACED: Final = msgspec.msgpack.Decoder(_Placed)
_OPENING: Final = msgspec.msgpack.Decoder(Opening)


class _Opened(NamedTuple):
    """What a rank knows of its save once all ranks have opened theirs."""

    path: str
    storage: Storage
    flat: Flattened
    stepped: Stepped | None
    openings: list[Opening]
    """By rank."""


class Series:
    """Begins saves, one after the other; ``queue`` has those that are under way.

    ``commit_timeout`` is in seconds: how long the background waits for the other ranks to finish writing. ``tolerant``:
    a save that the storage refuses is over, and failed, when its call returns, and nothing is raised.
    """

    def __init__(self, background: Background, *, commit_timeout: float, tolerant: bool) -> None:
        self.queue = Queue(background, commit_timeout=commit_timeout, tolerant=tolerant)
        self._background = background
        self._commit_timeout = commit_timeout
        self._last: Last | None = None
        self._structure: Structure | None = None
        self._shared: set[str] = set()
        """On rank 0: the directories below which all ranks have seen one place."""
        self._turn = threading.RLock()

    def forget(self) -> None:
        """Let the next save share nothing of those before it."""
        self._last = None

    def remove(self, storage: Storage) -> None:
        """Remove a checkpoint, after the saves that are under way."""
        if self._last is not None and self._last.job.order.storage.url == storage.url:
            self._last = None  # nothing will be left to share
        self.queue.remove(storage)

    def begin(self, request: Request, operation: Operation, pool: StagingPool) -> PendingSave:
        """Begin a save, on every rank alike; returns once the state may change."""
        try:
            # For threads; a signal's handler that saves amid a save goes on.
            with self._turn:
                return self._begin(request, operation, pool)
        except Exception as error:
            # By what all ranks heard, and not by `error`: where several failed, each has one of its own.
            if not self.queue.tolerant or not isinstance(operation.verdict, StorageError):
                raise
            lost = PendingSave(path := commit.checkpoint_path(request.path), "", request.called, request.on_over)
            lost.mark_staged()
            lost.resolve(failure(path, error))
            lost.mark_returned()
            self.queue.lose(lost)
            return lost

    def _begin(self, request: Request, operation: Operation, pool: StagingPool) -> PendingSave:
        rank = operation.rank
        begun: list[Job] = []
        with taking_part(operation, begun):
            path, storage, flat, stepped, openings = self._open(request, operation)
            source = self._last.job if self._last is not None and may_share(openings, self._structure) else None
            descriptions = None if self._is_known(openings) else exchange(operation, flat)
            if any(opening.may_alias for opening in openings) and source is None:
                # Some ranks could have shared the last save's shards, but not all.
                with turn(operation, "drain"):
                    self.queue.drain()
            # Now: once there is a place for it the others count on this rank until its word comes.
            own = describe(flat, operation.world_size)
            speaking = speaks(openings, rank)
            previous = None
            with turn(operation, "place") as placing:
                # Here, where the ranks have just spoken: to one that has died since it is tried for half an hour.
                background = operation.in_background(self._background)
                structure = self._plan(descriptions, openings, rank)
                if rank == 0:
                    save_id = commit.new_save_id()
                    # What compression makes of it is known when it is done.
                    nbytes = structure.nbytes + sum(opening.own_nbytes for opening in openings)
                    needed = nbytes if source is None and request.options.codec is None else 0
                    undo = partial(commit.abandon, storage, save_id, [0])
                    shares = source.shards_of if source else None
                    open_place = partial(commit.open_place, storage, save_id, needed, shares=shares)
                    previous = Patience(storage, self._commit_timeout).wait_for(open_place, "open", late=undo)
                    placing.word = msgspec.msgpack.encode(_Placed(save_id, self._is_new(storage, operation.world_size)))
                    placing.undo = undo
            placed = _PLACED.decode(placing.heard[0])
            if placed.look:
                self._check_shared(operation, storage, placed.save_id, placing.undo)
            with _undoing(placing.undo, begun):
                pending = PendingSave(path, placed.save_id, request.called, request.on_over)
                order = Order(
                    pending=pending,
                    operation=background,
                    storage=storage,
                    structure=structure,
                    speaks=speaking,
                    skeleton=flat.skeleton,
                    objects=flat.objects,
                    own=own,
                    previous=previous,
                    commit_timeout=self._commit_timeout,
                    called=request.called,
                )

                def submit(job: Job) -> None:
                    begun.append(job)
                    self.queue.submit(job)

                if source is None:
                    codec, memory = request.options.codec, request.memory
                    write(order, flat, codec, pool=pool, memory=memory, stepped=stepped, submit=submit)
                else:
                    pending.share_staging(source.order.pending)
                    submit(AliasJob(order, source))
        self._last = Last(begun[0], request.version, _own_structure(flat))
        pending.mark_returned()
        return pending

    def _open(self, request: Request, operation: Operation) -> _Opened:
        """Flatten the state, once the saves before are over, unless this one may share the shards of the last."""
        with turn(operation, "open") as opening:
            path = commit.checkpoint_path(request.path)
            storage = request.open_storage(path)
            may_alias = self._may_alias(request.version, storage.url)
            if not may_alias:
                self.queue.drain()
            flat = flatten_selected(request.state, request.options, operation.rank)
            stepped = Stepped(request.state) if request.options.overlap == "step" else None
            if may_alias and self._last is not None and self._last.own_structure != _own_structure(flat):
                may_alias = False
                self.queue.drain()
            known = self._structure.key if self._structure is not None else ""
            own_nbytes = sum(source.nbytes for source in own_sources(flat))
            opening.word = msgspec.msgpack.encode(
                Opening(flat.structure, flat.outline, known, may_alias, flat.places, own_nbytes)
            )
        openings = [_OPENING.decode(word) for word in opening.heard]
        return _Opened(path, storage, flat, stepped, openings)

    def _is_new(self, storage: Storage, world_size: int) -> bool:
        """Whether nobody knows yet that the ranks see one place there; keys of an object store are the same for all."""
        return world_size > 1 and storage.has_places and split(storage.url)[0] not in self._shared

    def _check_shared(self, operation: Operation, storage: Storage, save_id: str, undo: Callable[[], None]) -> None:
        """Raise StorageError, on all ranks, where some of them do not see the place that rank 0 has made."""
        with turn(operation, "see") as looking:
            looking.undo = undo
            look = partial(commit.sees, storage, save_id)
            sees = operation.rank == 0 or Patience(storage, self._commit_timeout).wait_for(look, "look")
            looking.word = b"yes" if sees else b"no"
        seen = [word == b"yes" for word in looking.heard]
        if not all(seen):
            undo()
            operation.verdict = commit.not_shared(storage, save_id, seen)
            raise operation.verdict
        self._shared.add(split(storage.url)[0])

    def _may_alias(self, version: Hashable | None, url: str) -> bool:
        """Whether a save may share the shards of the last: they are the same, and there, and nothing changes ``url``.

        What a save replaces has to be there, or gone, before it begins.
        """
        last = self._last
        if last is None or version is None or version != last.version:
            return False
        return not self.queue.may_change(url) and last.has_shards()

    def _is_known(self, openings: Sequence[Opening]) -> bool:
        """Whether every rank has the plan in store that this save needs."""
        key = structure_key(openings)
        return self._structure is not None and all(opening.known == key for opening in openings)

    def _plan(self, descriptions: Descriptions | None, openings: Sequence[Opening], rank: int) -> Structure:
        """The plan that follows from what all ranks hold; without descriptions, the one that is known."""
        if descriptions is not None:
            self._structure = None  # that of another rank may be gone, if this raises
            self._structure = plan(descriptions, openings, rank)
        assert self._structure is not None, "it is known, or has just been planned"
        return self._structure


@contextmanager
def _undoing(undo: Callable[[], None], begun: Sequence[Job]) -> Iterator[None]:
    """Encloses what this rank does before it has a job: if it never has one, ``undo`` takes back what it has done."""
    try:
        yield
    except BaseException:
        if not begun:
            undo()
        raise


def flatten_selected(state: Any, chosen: SaveOptions, rank: int) -> Flattened:
    """Flatten what the options of a save take of a state."""
    return flatten(state, replicated=chosen.replicated, include=chosen.include, exclude=chosen.exclude, rank=rank)


def _own_structure(flat: Flattened) -> str:
    return flat.own.structure if flat.own is not None else ""
