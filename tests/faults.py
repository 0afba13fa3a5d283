"""Local disks that fail as real ones do: system calls under `shardckpt.storage` that fail, fall short, dawdle or hang.

`Disk` stands between local storage and ``os``; file systems that really are full or read-only are mounted by `tmpfs`.
"""

import builtins
import errno
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from shardckpt.errors import ObjectNotFoundError
from shardckpt.storage import Stat, Storage, local, local_files, posix
from storage.wrappers import WrapperStorage

CALLS: Final = (
    "open",
    "pwrite",
    "preadv",
    "fsync",
    "ftruncate",
    "link",
    "replace",
    "unlink",
    "rmdir",
    "mkdir",
    "scandir",
)
"""The calls of ``os`` that can be made to fail."""

_MODULES: Final[tuple[Any, ...]] = (local, local_files, posix)

STALL_SECONDS: Final = 60.0
"""Past which a test hangs."""


def anything(path: str) -> bool:
    return True


def is_shard(path: str) -> bool:
    return path.endswith(".safetensors")


@dataclass
class Fault:
    """What befalls calls ``first`` to ``last`` (both from 1; None: all that come) of ``call`` on paths that match."""

    call: str
    act: Callable[[], None] | None
    """Raises, sleeps or waits before the call goes on; None has a write or a read do half of what it is asked."""
    matching: Callable[[str], bool] = anything
    first: int = 1
    last: int | None = 1
    seen: int = 0
    hits: int = 0


def fails(number: int) -> Callable[[], None]:
    """Raise the OSError of this number."""

    def act() -> NoReturn:
        raise OSError(number, os.strerror(number))

    return act


def is_slow(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


@dataclass
class Stall:
    """A call that does not return before ``over`` is set; ``begun`` says that one hangs."""

    begun: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> None:
        self.begun.set()
        self.over.wait(STALL_SECONDS)


class Disk:
    """The ``os`` that local storage sees while `broken` encloses it.

    ``calls`` counts calls by name and by what they are made on: ``("fsync", "directory")``, ``("pwrite", "file")``.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.calls: Counter[tuple[str, str]] = Counter()
        self.hits = 0
        self.saw: Callable[[memoryview], None] | None = None
        """Is given what a write is about to write, once nothing holds it up any more."""
        self._lock = threading.Lock()

    def add(self, call: str, act: Callable[[], None] | None, **how: Any) -> Fault:
        """Arm a fault; see `Fault`. Without ``last`` one call is hit."""
        assert call in CALLS
        how.setdefault("last", how.get("first", 1))
        with self._lock:
            self.faults.append(fault := Fault(call, act, **how))
        return fault

    def clear(self) -> None:
        """From now on all is well."""
        with self._lock:
            self.faults.clear()

    def meet(self, call: str, what: Any) -> bool:
        """Go through what befalls one call; whether it is to fall short."""
        path = _path_of(what)
        with self._lock:
            self.calls[call, "directory" if os.path.isdir(path) else "file"] += 1
            hit = [fault for fault in self.faults if fault.call == call and fault.matching(path)]
            for fault in hit:
                fault.seen += 1
            hit = [fault for fault in hit if fault.first <= fault.seen <= (fault.last or fault.seen)]
            for fault in hit:
                fault.hits += 1
            self.hits += len(hit)
        for fault in hit:
            if fault.act is not None:
                fault.act()
        return any(fault.act is None for fault in hit)

    def __getattr__(self, name: str) -> Any:
        found = getattr(os, name)
        if name not in CALLS:
            return found

        def call(what: Any, *arguments: Any, **options: Any) -> Any:
            short = self.meet(name, what)
            if name == "pwrite" and short:
                data, offset = arguments
                arguments = (data[: _half(data)], offset)
            if name == "pwrite" and self.saw is not None:
                self.saw(arguments[0])
            if name == "preadv" and short:
                [into], offset = arguments
                arguments = ([into[: _half(into)]], offset)
            return found(what, *arguments, **options)

        return call


def _half(data: memoryview) -> int:
    return max(1, len(data) // 2)


def _path_of(what: int | str | os.PathLike[str]) -> str:
    """The path that a call is about, whether it was given that or a descriptor."""
    if not isinstance(what, int):
        return os.fspath(what)
    try:
        return os.readlink(f"/proc/self/fd/{what}")
    except OSError:
        return ""


@contextmanager
def broken() -> Iterator[Disk]:
    """In here local storage makes its calls to the disk that is yielded, whose faults are to be added."""
    disk = Disk()
    for module in _MODULES:
        module.os = disk
    try:
        yield disk
    finally:
        mend()


def mend() -> None:
    """From now on local storage makes its calls to ``os`` itself, also in a child that was forked amid `broken`."""
    for module in _MODULES:
        module.os = os


@contextmanager
def tmpfs(where: Path, nbytes: int) -> Iterator[Path]:
    """A file system of so many bytes of memory, mounted at ``where``. Raises PermissionError where that is refused."""
    where.mkdir(parents=True, exist_ok=True)
    _mount("mount", "-t", "tmpfs", "-o", f"size={nbytes}", "shardckpt-test", str(where))
    try:
        yield where
    finally:
        _mount("umount", "--lazy", str(where))


@contextmanager
def read_only(where: Path) -> Iterator[None]:
    """In here the directory ``where`` is a read-only mount of itself."""
    _mount("mount", "--bind", str(where), str(where))
    try:
        _mount("mount", "-o", "remount,bind,ro", str(where))
        yield
    finally:
        _mount("umount", "--lazy", str(where))


def _mount(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise PermissionError(errno.EPERM, f"there is no {command[0]} here") from error
    if done.returncode:
        raise PermissionError(errno.EPERM, done.stderr.strip())


class LateStorage(WrapperStorage):
    """A directory of a network file system as another machine has it: what was written elsewhere shows up later."""

    def __init__(self, inner: Storage, looks: int, matching: Callable[[str], bool] = anything) -> None:
        """``looks``: how often a name that is ``matching`` is looked for in vain before it is seen."""
        super().__init__(inner)
        self.looks = looks
        self.matching = matching
        self.asked: Counter[str] = Counter()

    def called(self, method: str, name: str, nbytes: int) -> None:
        if method not in ("get", "size", "read_into") or not self.matching(name):
            return
        self.asked[name] += 1
        if self.asked[name] <= self.looks:
            raise ObjectNotFoundError(f"cannot read {self.url}/{name}: it does not exist")

    def list(self) -> builtins.list[Stat]:
        found = super().list()
        late = [stat for stat in found if self.matching(stat.name) and self.asked[stat.name] <= self.looks]
        for stat in late:
            self.asked[stat.name] += 1
        return [stat for stat in found if stat not in late]
