"""Clearing: what saves leave behind, whose it is, and when it may go.

A save that is alive leaves a marker, ``saving-<save_id>.json``, before anything else and renews it while it runs: its
lease. Files of a save without one are part of the committed checkpoint, or rubbish.
"""

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

from shardckpt import filenames
from shardckpt.commit.finding import Found, find, find_bytes, parsed
from shardckpt.errors import (
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    SaveFailedError,
    ShardckptError,
)
from shardckpt.filenames import MANIFEST
from shardckpt.storage import Stat, Storage, Uploads, is_temporary, temporary_name

log = logging.getLogger(__name__)

RENEW_SECONDS: Final = 30.0
"""How often a save that runs says so."""
LEASE_SECONDS: Final = 180.0
"""Silence after which a save is taken for dead, and its files for rubbish."""

_JOIN_SECONDS: Final = 5.0
_MARKER_BYTES: Final = 1 << 16


class Lease:
    """The marker of one save, renewed by a thread from `begin` until `release`."""

    def __init__(self, storage: Storage, save_id: str, shares: str | None) -> None:
        self._storage = storage
        self._name = filenames.marker_name(save_id)
        self._marker = f"{json.dumps({'machine': _machine(), 'pid': os.getpid(), 'shares': shares})}\n".encode()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="shardckpt-lease", daemon=True)

    def begin(self, *, alone: bool) -> None:
        """Leave the marker. Raises ObjectExistsError where there is one, if this lease is to be ``alone``."""
        self._say(replace=not alone)
        self._thread.start()

    def release(self) -> None:
        """Renew no more; the marker itself stays."""
        self._over.set()
        if self._thread.ident is not None:
            # On a file system that hangs it may never end; then the marker stays, and counts for nothing.
            self._thread.join(_JOIN_SECONDS)

    def _say(self, *, replace: bool | bytes) -> None:
        # After a crash of the machine nobody is alive, so nobody needs the marker: training need not wait for the disk.
        self._storage.put(self._name, self._marker, replace=replace, durable=False)

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            try:
                self._say(replace=self._marker)
            except ObjectExistsError:  # it is gone: see `check_lease`
                return
            except ShardckptError as error:
                log.debug("could not renew %s at %s: %s", self._name, self._storage.url, error)


_leases: dict[tuple[str, str], Lease] = {}
"""Of the saves that this process leads, by place and save id: copies of one save have one id."""


def take_lease(storage: Storage, save_id: str, shares: str | None, *, alone: bool = False) -> None:
    """Mark a save as alive until `end_lease`, which `clean` and `abandon` call too.

    With it goes the save ``shares``, if any, whose files it links into the place. ``alone`` raises ObjectExistsError
    where a marker of that id is in the place: another process is copying the same save there.
    """
    lease = Lease(storage, save_id, shares)
    # Before the marker is there: another thread that looks at it takes a save that is not among these for dead.
    if _leases.setdefault((storage.url, save_id), lease) is not lease:
        raise ObjectExistsError(f"this process is writing the save {save_id} to {storage.url} already.")
    try:
        lease.begin(alone=alone)
    except BaseException:
        end_lease(storage, save_id)
        raise


def end_lease(storage: Storage, save_id: str) -> None:
    """A save is over, well or badly; whatever it left and no commit record names is rubbish from now on."""
    lease = _leases.pop((storage.url, save_id), None)
    if lease is not None:
        lease.release()


def check_lease(storage: Storage, save_id: str) -> None:
    """Raise SaveFailedError if somebody has taken this save for dead, and removed files of it that are to be named."""
    try:
        storage.get(filenames.marker_name(save_id), limit=_MARKER_BYTES)
    except ObjectNotFoundError as error:
        raise SaveFailedError(
            f"the marker of this save is gone from {storage.url}: another process took it for dead, after"
            f" {LEASE_SECONDS:.0f} s in which this one had been stopped or could not write there, and cleared it up."
            " Look for two jobs of one run, an old one and one that was started in its place."
        ) from error


def _machine() -> str:
    """Where a process id means something: the host, and the process namespace of a container on it."""
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def clean(storage: Storage, record: Found) -> None:
    """After the commit of ``record``: remove what it replaced, its save's marker, and what dead saves left.

    Never raises: the checkpoint is committed, whatever becomes of the rubbish.
    """
    save_id = record.manifest.save_id
    end_lease(storage, save_id)
    try:
        listed = storage.list()
        alive, now = _alive(storage, listed, own=save_id)
        # Read after these: a save that is not alive has committed before, so that this record, or a newer one, is all
        # that still needs files.
        data = find_bytes(storage)
        if data is not None:
            # Mostly it is the same, and to decode it takes a tenth of a second with 20,000 tensors.
            current = record if data == record.data else parsed(storage, data)
            keep = {MANIFEST, *current.manifest.file_names()}
            _delete(storage, _rubbish([stat for stat in listed if stat.name not in keep], alive, now))
    except Exception as error:  # noqa: BLE001 - see above
        log.warning("the save to %s is committed, but what it replaced could not be removed: %s", storage.url, error)


def abandon(storage: Storage, save_id: str, ranks: Iterable[int], also: Sequence[str] = ()) -> None:
    """After a failure: remove what these ranks wrote, and with rank 0's files the marker.

    Never raises: the failure of the save matters more.
    """
    end_lease(storage, save_id)
    names = list(also)
    for rank in ranks:
        names += [name(rank, save_id) for name in filenames.OF_A_RANK]
        names += [filenames.marker_name(save_id)] if rank == 0 else []
    try:
        storage.delete(names)
        storage.remove_place()
    except Exception as error:  # noqa: BLE001 - see above
        log.warning("could not remove the remains of a failed save at %s: %s", storage.url, error)


def remove(storage: Storage, in_time: Callable[[], None] = lambda: None) -> None:
    """Remove a checkpoint, if there is one: the manifest first, so that no instant shows half of one.

    A symbolic link is unlinked, not followed. Files that are not ours stay, and those of a save that is running.
    ``in_time`` raises where it is too late to begin: what lies there may be another checkpoint by then.
    """
    if storage.unlink_link():
        return
    listed = storage.list()
    if not listed:
        storage.remove_place()
        return
    # Before the manifest goes: of a save that commits meanwhile nothing else does.
    alive, now = _alive(storage, listed)
    in_time()
    storage.delete([MANIFEST])
    storage.sync()
    _delete(storage, _rubbish([stat for stat in listed if stat.name != MANIFEST], alive, now))
    storage.remove_place()


def running(storage: Storage) -> set[str]:
    """The ids of saves that write to a place now, as far as the markers there show."""
    alive, _ = _alive(storage, storage.list())
    return {save_id for save_id in alive if save_id is not None}


def prune(storage: Storage, *, dry_run: bool = False) -> list[str]:
    """Remove what dead saves have left in a place, and return the names: files, and uploads that were never finished.

    The checkpoint there stays, and what saves that are alive have written so far. With ``dry_run`` all of it stays.
    """
    # Before the markers: whoever has begun one has left a marker before, or is through.
    begun = storage.uploads() if isinstance(storage, Uploads) else []
    listed = storage.list()
    is_by_age = any(filenames.is_marker(stat.name) or is_temporary(stat.name) for stat in listed)
    alive, now = _alive(storage, listed, now=_time_at(storage) if is_by_age and not dry_run else None)
    current = find(storage)  # after these, as in `clean`
    keep = set() if current is None else {MANIFEST, *current.manifest.file_names()}
    doomed = _rubbish([stat for stat in listed if stat.name not in keep], alive, now)
    names = {stat.name for stat in begun if filenames.is_checkpoint_file(stat.name)}
    stale = sorted(name for name in names if filenames.save_id_of(name) not in alive)
    if not dry_run:
        if isinstance(storage, Uploads) and stale:
            storage.cancel_uploads(stale)
        _delete(storage, doomed)
        if not keep:
            storage.remove_place()
    return sorted({*doomed, *stale})


def _delete(storage: Storage, names: Sequence[str]) -> None:
    """Markers first: a save that was taken for dead, and is not, sees by its own that its files may be gone."""
    markers = [name for name in names if filenames.is_marker(name)]
    if markers:
        storage.delete(markers)
    storage.delete([name for name in names if name not in markers])


def _rubbish(listed: Sequence[Stat], alive: AbstractSet[str | None], now: float) -> list[str]:
    """Which of these files may go, were none named by a commit record."""
    return [
        stat.name
        for stat in listed
        if (filenames.is_checkpoint_file(stat.name) and filenames.save_id_of(stat.name) not in alive)
        # What a crash in the middle of a put leaves has no save's name, only an age.
        or (is_temporary(stat.name) and now - (stat.modified or now) > LEASE_SECONDS)
    ]


def _time_at(storage: Storage) -> float | None:
    """The time by the clock of the storage; None where it shows none, or cannot be written to.

    A clock of ours that is ahead of it would take the marker of a save on another machine for an old one.
    """
    name = temporary_name()
    try:
        storage.put(name, b"", replace=True, durable=False)
        try:
            return next((stat.modified for stat in storage.list() if stat.name == name), None)
        finally:
            storage.delete([name])
    except ShardckptError as error:  # a full disk may be what is to be pruned
        log.debug("the clock of %s could not be read: %s", storage.url, error)
        return None


def _alive(
    storage: Storage, listed: Sequence[Stat], *, own: str | None = None, now: float | None = None
) -> tuple[set[str | None], float]:
    """The ids of saves that run, as far as their markers show; and the time, by the storage's clock if that is known.

    ``own`` is a save that is over.
    """
    markers = {filenames.save_id_of(stat.name): stat for stat in listed if filenames.is_marker(stat.name)}
    # Our own marker was renewed a moment ago.
    now = now or (markers[own].modified if own in markers else None) or time.time()
    alive: set[str | None] = set()
    for save_id, stat in markers.items():
        said = _read_marker(storage, stat.name)
        if save_id != own and _is_alive(said, stat, save_id, now):
            alive |= {save_id, said.get("shares")} - {None}
    return alive, now


def _is_alive(said: dict[str, Any], marker: Stat, save_id: str | None, now: float) -> bool:
    """Whether the save that left a marker still runs, as far as can be told; in doubt it does."""
    is_fresh = marker.modified is None or now - marker.modified <= LEASE_SECONDS
    if said.get("machine") == _machine() and type(pid := said.get("pid")) is int:
        # The number of a process that has died may be another's by now, so it alone does not keep files for ever.
        if pid == os.getpid():
            return any(save_id == led for _, led in list(_leases))  # other threads begin and end saves
        return is_fresh and _runs(pid)
    return is_fresh


def _read_marker(storage: Storage, name: str) -> dict[str, Any]:
    try:
        said = json.loads(storage.get(name, limit=_MARKER_BYTES))
    except (ObjectNotFoundError, CorruptCheckpointError, ValueError, RecursionError):
        return {}
    if not isinstance(said, dict) or not isinstance(said.get("shares"), (str, type(None))):
        return {}
    return said


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
