"""Ranks that leave while a save is in flight. Runs in the processes of `processes`."""

import os
import signal
import sys
import threading
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import shardckpt
from multirank.processes import HOST, SECONDS, Death
from shardckpt import Checkpointer, PendingSave, background, commit, loading
from shardckpt.coordinator import ranks as coordinated
from shardckpt.reader import rounds
from shardckpt.saving import series

LONG = 10 * SECONDS
"""Seconds: who waits for a timeout is taken to hang."""


def result(pending: PendingSave) -> tuple[str, str]:
    try:
        return "ok", str(pending.result().nbytes)
    except shardckpt.ShardckptError as error:
        return type(error).__name__, str(error)


def _begin(path: str) -> PendingSave:
    return Checkpointer(timeout=LONG, commit_timeout=LONG).async_save({"t": torch.ones(3)}, path)


def after_the_call(rank: int, death: Death, path: str, who: int, how: str) -> tuple[str, str]:
    """A rank ends its process while its part has yet to be written; rank 1 is late to ask for the verdict."""
    put, hear, leaves = commit.put_rank_manifest, coordinated.StoreOperation.hear, threading.Event()

    def put_late(*args: Any) -> Any:
        assert leaves.wait(SECONDS)
        return put(*args)

    def hear_late(self: Any, point: str, *args: Any, **options: Any) -> bytes:
        if point == "written":
            death.wait_for(0, 2.0)
        return hear(self, point, *args, **options)

    if rank == who:
        commit.put_rank_manifest = put_late
    elif rank == 1:
        coordinated.StoreOperation.hear = hear_late  # type: ignore[method-assign]
    pending = _begin(path)
    if rank == who:
        if how == "destroy":
            dist.destroy_process_group()
        leaves.set()
        sys.exit(1)
    return result(pending)


def before_it_has_a_job(rank: int, death: Death, path: str, who: int) -> tuple[str, str]:
    """Ctrl-C between the last agreement and the writing, of which the others wait for the end in the background."""
    write = series.write

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    try:
        with mock.patch.object(series, "write", interrupted if rank == who else write):
            return result(_begin(path))
    except KeyboardInterrupt:
        return "KeyboardInterrupt", ""


def between_turns(rank: int, death: Death, path: str, who: int) -> tuple[str, str]:
    """The same right after the last agreement, where there is no word yet that it owes the others."""
    turn = series.turn

    class Interrupted:
        def __init__(self, *args: Any) -> None:
            self._turn = turn(*args)
            self._point = args[1]

        def __enter__(self) -> Any:
            return self._turn.__enter__()

        def __exit__(self, *args: object) -> Any:
            self._turn.__exit__(*args)
            if self._point == "see":  # the last of a first save in a folder
                raise KeyboardInterrupt

    try:
        with mock.patch.object(series, "turn", Interrupted if rank == who else turn):
            return result(_begin(path))
    except KeyboardInterrupt:
        return "KeyboardInterrupt", ""


def in_the_background(rank: int, death: Death, path: str, who: int, at: str) -> tuple[str, str]:
    """What is no Exception ends what one rank does in the background."""

    def ending(*args: Any) -> Any:
        raise SystemExit("a library's idea")

    if rank == who:
        with mock.patch.object(commit, at, ending):
            pending = _begin(path)
            found = pending._finished.wait(SECONDS / 2)
            assert found, "nobody who waits for the result would ever hear of it"
            return result(pending)
    return result(_begin(path))


def at_the_end(rank: int, death: Death, path: str, who: int) -> tuple[str, str]:
    """Ctrl-C while a process that is ending waits for its save."""
    if rank != who:
        return result(_begin(path))
    ending, wait = threading.Event(), background.Background.wait

    def interrupted(*args: Any) -> None:
        assert ending.wait(SECONDS)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(LONG)

    def waiting(self: background.Background) -> None:
        ending.set()
        wait(self)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    commit.put_rank_manifest = commit.publish = interrupted  # type: ignore[assignment]
    _begin(path)
    background.Background.wait = waiting  # type: ignore[method-assign]
    sys.exit(0)


def without_a_store(rank: int, death: Death, path: str, when: str) -> tuple[str, str]:
    """The process that hosts the Store dies while all save or load, killed by rank 1 at a point of its own."""
    engine = Checkpointer(timeout=LONG, commit_timeout=LONG, share_reads=True)
    state = {"t": torch.ones(1 << 20)}
    if when in ("load", "exchange"):
        engine.save(state, path)
        dist.barrier()

    def dying(call: Any) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            death.of(HOST)
            return call(*args, **options)

        return called

    places: dict[str, tuple[Any, str]] = {
        "save": (series, "exchange"),
        "background": (commit, "put_rank_manifest"),
        "load": (loading, "together"),
        "exchange": (rounds, "reduce"),
    }
    place, name = places[when]
    if rank == 1:
        setattr(place, name, dying(getattr(place, name)))
    try:
        if when in ("load", "exchange"):
            engine.load(path, state)
        else:
            engine.save(state, path)
    except shardckpt.ShardckptError as error:
        return type(error).__name__, str(error)
    return "ok", ""


def store_gone_once_heard(rank: int, death: Death, path: str) -> tuple[str, str]:
    """The Store's process ends as soon as rank 1, the last to do so, has the verdict of a save in hand."""
    get = coordinated.StoreOperation._get

    def last_word(self: Any, key: str) -> Any:
        word = get(self, key)
        if key.endswith("written/all"):
            death.of(HOST)
        return word

    if rank == 1:
        coordinated.StoreOperation._get = last_word  # type: ignore[method-assign]
    return result(_begin(path))


def interrupted_wait(rank: int, death: Death, path: str, where: str) -> list[str]:
    """Ctrl-C on rank 0, which waits for rank 1; what each is told, and whether a save that was in flight goes on."""
    engine = Checkpointer(timeout=LONG, commit_timeout=LONG, share_reads=True)
    state = {"t": torch.ones(1 << 20)}
    gone = f"{path}.gone"
    engine.save(state, path)
    dist.barrier()

    def until_gone(call: Any) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            while not os.path.exists(gone):
                threading.Event().wait(0.01)
            return call(*args, **options)

        return called

    places: dict[str, tuple[Any, str]] = {
        "save": (series, "exchange"),
        "result": (commit, "put_rank_manifest"),
        "load": (loading, "together"),
        "exchange": (rounds, "reduce"),
    }
    place, name = places[where]
    pending = None
    told: list[str] = []
    if rank == 1:
        setattr(place, name, until_gone(getattr(place, name)))
    else:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        if where in ("load", "exchange"):
            engine.load(path, state)
        else:
            pending = engine.async_save({"other": torch.zeros(1 << 20)}, path)
            pending.result()
        told.append("ok")
    except (shardckpt.ShardckptError, KeyboardInterrupt) as error:
        told.append(f"{type(error).__name__}: {error}")
    if rank == 0:
        open(gone, "x").close()
    if where == "result":
        assert pending is not None
        told.append(result(pending)[0])
    dist.barrier()
    return told
