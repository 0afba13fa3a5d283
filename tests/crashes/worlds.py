"""Hundreds of short-lived pairs of ranks, each forked from one process that has imported torch and made no thread."""

import json
import os
import select
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from crashes.power import Journal
from lowest import CANNOT

RANKS: Final = 2
HANG_SECONDS: Final = 60.0
"""After which a pair is taken to hang: its own timeouts are far shorter."""
PATIENCE: Final = 0.5
"""Seconds that ranks wait for each other where one is killed."""


NEVER: Final = 1 << 30
"""The number of a point that nobody comes to: all end well, and lose power then."""

STORE_SECONDS: Final = 5.0
"""For how long torch tries to connect to a Store whose host is dead."""


Death = Literal["one", "all", "power"]


class Point(NamedTuple):
    """Where somebody is killed: right before the call of that number, counted from 1, of a rank's own."""

    rank: int
    number: int
    death: Death
    """Whether that rank is killed alone, or the other at the same time, or the power is lost."""


def count(name: str, root: str) -> list[list[str]]:
    """The points of a scenario, by rank."""
    folder = _fresh(root)
    told = _pair(name, folder, None, 0, patience=30.0)
    assert all(one["claim"] == "ok" for one in told), told
    return [one["seen"] for one in told]


def crash(name: str, points: Sequence[Point], root: str) -> list[str]:
    """Die at each of these points; what was wrong afterwards."""
    wrong = []
    for index, point in enumerate(points):
        folder = _fresh(root)
        # The process with the Store of the group, which may be a launcher's, dies in half of the cases.
        told = _pair(name, folder, point, index % RANKS, patience=PATIENCE)
        if point.death == "power":
            Journal(folder.parent).lose(index % 4)
        claims = {rank: one["claim"] for rank, one in enumerate(told) if one is not None}
        looked = _in_child(lambda: _inspect(folder, name, claims))  # noqa: B023 - it is called at once
        bad = [claim for claim in claims.values() if claim.startswith("BUG") or claim == "hangs"]
        found = [*bad, *(["the inspection died"] if looked is None else looked)]
        wrong += [f"{name}, {point}: {text}" for text in found]
        shutil.rmtree(folder.parent)
    return wrong


def _inspect(folder: Path, name: str, claims: dict[int, str]) -> list[str]:
    from crashes.inspection import inspect

    return inspect(folder, name, claims)


def _fresh(root: str) -> Path:
    """A directory of its own with what every scenario starts from."""
    template = Path(root, "template")
    if not template.exists():
        made = _pair("", template, None, 0, patience=30.0)
        assert all(one["claim"] == "ok" for one in made), made
        rubbish = template / "rubbish"
        shutil.copytree(template / "a", rubbish)
        (rubbish / "manifest.json").unlink()
        # Of a save on another machine that has long been dead.
        marker = template / "b" / "saving-0mws8r6j9chbsme.json"
        marker.write_text('{"machine": "elsewhere", "pid": 1, "shares": null}')
        os.utime(marker, times=(time.time() - 3600,) * 2)
    folder = Path(tempfile.mkdtemp(dir=root))
    return Path(shutil.copytree(template, folder / "run", copy_function=shutil.copy2))


def _pair(name: str, folder: Path, point: Point | None, host: int, *, patience: float) -> list[Any]:
    """Run a scenario on two ranks; what each told, None for one that died."""
    listening = socket.create_server(("127.0.0.1", 0))
    pipes, children, group = [], [], 0
    for rank in range(RANKS):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.setpgid(0, group)
            os.close(ours)
            _end(lambda: _rank(rank, name, folder, point, host, listening, patience), theirs)  # noqa: B023
        group = group or child
        try:
            os.setpgid(child, group)
        except (PermissionError, ProcessLookupError):  # it has done so itself
            pass
        os.close(theirs)
        pipes.append(ours)
        children.append(child)
    listening.close()
    deadline = time.monotonic() + HANG_SECONDS
    told = [_read(pipe, deadline) for pipe in pipes]
    for child in children:
        _reap(child)
    return told


def _in_child(act: Callable[[], Any]) -> Any:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _end(act, theirs)
    os.close(theirs)
    told = _read(ours, time.monotonic() + HANG_SECONDS)
    _reap(child)
    return told


def _end(act: Callable[[], Any], pipe: int) -> None:
    """Say what ``act`` returns, and be gone without any of Python's own ends."""
    try:
        told = act()
    except BaseException:  # noqa: BLE001 - a forked process must not go on where its parent is
        told = [traceback.format_exc()]
    with os.fdopen(pipe, "w") as out:
        json.dump(told, out)
    time.sleep(HANG_SECONDS)  # it may host the Store of the others: the parent ends it when all have spoken
    os._exit(0)


def _read(pipe: int, deadline: float) -> Any:
    """What a child says, None if it dies without a word; ``claim`` is "hangs" where it says nothing for too long."""
    data = b""
    try:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            more = os.read(pipe, 1 << 16)
            if not more:
                return json.loads(data) if data else None
            data += more
    finally:
        os.close(pipe)
    return {"claim": "hangs", "seen": []}


def _reap(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    os.waitpid(child, 0)


def _rank(
    rank: int, name: str, folder: Path, point: Point | None, host: int, listening: socket.socket, patience: float
) -> dict[str, Any]:
    import torch.distributed as dist

    import shardckpt
    from crashes.points import Points
    from crashes.scenarios import SCENARIOS, state_of
    from shardckpt import Checkpointer, api, coordinator

    port = listening.getsockname()[1]
    is_host = rank == host
    if not is_host:
        listening.close()  # or it would answer for a host that is dead
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        RANKS,
        is_master=is_host,
        timeout=timedelta(seconds=STORE_SECONDS),
        master_listen_fd=listening.detach() if is_host else None,
        use_libuv=not CANNOT,  # libuv's server of torch 2.6 takes no socket that listens already
    )
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=store, timeout=timedelta(seconds=30))
    coordinator.ranks._GRACE_SECONDS = patience / 2  # type: ignore[misc]
    engine = Checkpointer(timeout=patience, commit_timeout=patience, share_reads=True)
    api._engine = lambda: engine  # type: ignore[assignment]
    if not name:
        for place, value in (("a", 1), ("b", 2)):
            engine.save(state_of(rank, value), folder / place)
        return {"claim": "ok", "seen": []}
    if point is not None and point.death == "power":
        Journal(folder.parent).install()
    mine = point if point is not None and point.rank == rank else None
    points = Points(None if mine is None else mine.number, everybody=mine is not None and mine.death != "one")
    points.install()
    dist.barrier()
    with points.counting():
        try:
            SCENARIOS[name].act(engine, rank, str(folder))
            claim = "ok"
        except shardckpt.ShardckptError as error:
            claim = type(error).__name__
        except BaseException:  # noqa: BLE001 - told to the parent
            claim = "BUG " + traceback.format_exc()
    if claim != "ok" and not claim.startswith("BUG"):
        claim = _goes_on(rank, folder) or claim
    return {"claim": claim, "seen": points.seen}


def _goes_on(rank: int, folder: Path) -> str | None:
    """A rank that was told of a failure can still save, without the others; what is wrong if it cannot."""
    import shardckpt
    from crashes.scenarios import state_of
    from shardckpt import Checkpointer

    place = folder.parent / f"survivor{rank}"
    try:
        Checkpointer(alone=True).save(state_of(rank, 9), place)
        assert shardckpt.load(place)["value"] == 9
    except BaseException:  # noqa: BLE001 - told to the parent
        return "BUG " + traceback.format_exc()
    return None


def serve(pipe: Any, root: str) -> None:
    """Do what is asked for over ``pipe``, in the process from which all others fork."""
    import torch

    torch.set_num_threads(1)
    import crashes.inspection
    import crashes.points  # noqa: F401  # before anything forks

    while True:
        try:
            call, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, {"count": count, "crash": crash}[call](*arguments, *[root])))
        except BaseException:  # noqa: BLE001 - whatever it is, the test wants to see it
            pipe.send((traceback.format_exc(), None))
