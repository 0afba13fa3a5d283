"""A loss of power, as a file system may answer it: what was not forced to the medium is gone, or is not.

Every process notes what it does to files. When all have been killed, `lose` takes back what no fsync had made last:
bytes, which it zeroes, and names, which it takes out of their directory or puts back there.
"""

import json
import os
import random
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardckpt import filenames

_RENAMING = ("created", "made", "replaced", "removed", "unmade")


class Journal:
    """What the processes of one run have done to files, in one file that all append to."""

    def __init__(self, folder: Path) -> None:
        self._graves = folder / "graves"
        self._graves.mkdir(exist_ok=True)
        self._file = os.open(folder / "journal", os.O_CREAT | os.O_APPEND | os.O_RDWR)
        self._link = os.link
        self._counting = 0

    def install(self) -> None:
        """Note the calls of this process from now on."""
        opened, made, linked = os.open, os.mkdir, os.link
        replaced, unlinked, unmade = os.replace, os.unlink, os.rmdir
        written, cut, synced = os.pwrite, os.ftruncate, os.fsync

        def open_(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
            descriptor = opened(path, flags, *arguments, **options)
            if new:
                self._note("created", path)
            return descriptor

        def mkdir(path: Any, *arguments: Any) -> None:
            made(path, *arguments)
            self._note("made", path)

        def link(source: Any, target: Any, **options: Any) -> None:
            linked(source, target, **options)
            self._note("created", target)

        def replace(source: Any, target: Any) -> None:
            grave = self._bury(target)
            replaced(source, target)
            self._note("replaced", target, grave)

        def unlink(path: Any, **options: Any) -> None:
            grave = self._bury(path)
            unlinked(path, **options)
            self._note("removed", path, grave)

        def rmdir(path: Any, **options: Any) -> None:
            unmade(path, **options)
            self._note("unmade", path)

        def fsync(descriptor: int) -> None:
            synced(descriptor)
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                self._note("listed", os.readlink(f"/proc/self/fd/{descriptor}"))
            else:
                self._note("synced", "", status.st_ino)

        os.open, os.mkdir, os.link, os.replace = open_, mkdir, link, replace  # type: ignore[assignment]
        os.unlink, os.rmdir, os.fsync = unlink, rmdir, fsync  # type: ignore[assignment]
        os.pwrite, os.ftruncate = self._dirtying(written), self._dirtying(cut)

    def _dirtying(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(descriptor: int, *arguments: Any) -> Any:
            self._note("dirty", "", os.fstat(descriptor).st_ino)  # before: half of it may be done
            return call(descriptor, *arguments)

        return called

    def _bury(self, path: Any) -> str | None:
        """Keep what a name stands for; its inode is not used again either."""
        self._counting += 1
        grave = str(self._graves / f"{os.getpid()}-{self._counting}")
        try:
            self._link(path, grave, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return grave

    def _note(self, what: str, path: Any, more: Any = None) -> None:
        os.write(self._file, json.dumps([what, os.fspath(path), more]).encode() + b"\n")

    def lose(self, seed: int) -> None:
        """Take back what was not made to last: with seed 0 all of it, with 1 all bytes but no names, else by chance."""
        chance = random.Random(seed)
        names: list[tuple[str, str, Any]] = []
        dirty: set[int] = set()
        for what, path, more in map(json.loads, os.pread(self._file, 1 << 26, 0).splitlines()):
            if what == "listed":
                names = [event for event in names if os.path.dirname(event[1]) != path]
            elif what in _RENAMING:
                names.append((what, path, more))
            elif what == "dirty":
                dirty.add(more)
            else:
                dirty.discard(more)
        for what, path, more in reversed(names):
            if seed == 0 or (seed > 1 and chance.random() < 0.5):
                _take_back(what, path, more)
        folder = self._graves.parent
        for path in (Path(root, name) for root, _, found in os.walk(folder) for name in found):
            if path.lstat().st_ino in dirty and path.parent != folder and (seed < 2 or chance.random() < 0.5):
                os.truncate(path, 0)
        # By the time the machine is up again, leases have run out; a marker without contents has no other sign of it.
        for marker in folder.rglob(filenames.marker_name("*")):
            os.utime(marker, times=(time.time() - 3600,) * 2)
        os.close(self._file)


def _take_back(what: str, path: str, grave: str | None) -> None:
    there = os.path.lexists(path)
    if what == "unmade" and not there:
        os.makedirs(path, exist_ok=True)
    elif what == "made" and there:
        shutil.rmtree(path)
    elif what in ("created", "replaced") and there:
        os.unlink(path)
    if grave is not None and os.path.isdir(os.path.dirname(path)) and not os.path.lexists(path):
        os.link(grave, path)
