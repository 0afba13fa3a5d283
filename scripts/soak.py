"""Save and load for hours on storages that keep failing, and see that nothing is wrong and nothing is left behind.

    python scripts/soak.py --minutes 5 --seed 1 --json soak.json
    python scripts/soak.py --rounds 60 --s3 moto

One process, several Checkpointers of different options and a manager; small states, local and on a loopback S3 server.
Faults come by chance: EIO, ENOSPC, EDQUOT and EROFS from any system call, short writes and reads, slow calls, files
that vanish, and an object store that refuses. After each round what loads is compared bit for bit with what was saved.
In the end the figures are printed: what was done, and what the process and the disk held before, after warming up, and
then. The exit code is 1 where a byte was wrong, an error was none of ours, or something grew.
"""
# ruff: noqa: SLF001 - it counts the blocks of staging memory that are out

import argparse
import contextlib
import ctypes
import errno
import gc
import hashlib
import importlib
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

import shardckpt
from shardckpt import Checkpointer, CheckpointManager
from shardckpt.commit import find
from shardckpt.filenames import MANIFEST
from shardckpt.storage import open_storage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
faults: Any = importlib.import_module("faults")
wrappers: Any = importlib.import_module("storage.wrappers")
engine_module: Any = importlib.import_module("shardckpt.checkpointer")

State = dict[str, Any]

ERRNOS: Final = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EACCES)
METHODS: Final = ("create", "put", "get", "read_into", "size", "list", "delete", "writer.write", "writer.commit")
DTYPES: Final = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float16, torch.bool)
LARGEST: Final = 9 << 20
"""Bytes of the largest tensor: more than a block of the storage."""
ALLOWED: Final = {"threads": 0, "descriptors": 0, "blocks_out": 0, "stray_files": 0, "mappings": 64, "rss_mib": 96}
"""By how much each figure may have grown since warming up; allocators give memory back when they like."""
KEPT: Final = 8
"""Connections that the client of an object store may open later, and keep: as many as it has requests under way."""


_ARENA_MAX: Final = -8
"""M_ARENA_MAX of glibc's malloc.h."""


class Wrong(Exception):  # noqa: N818 - what it names is a finding
    """Something that must never be seen was."""


def make_state(chance: random.Random, *, large: bool = False) -> State:
    """A state of a few tensors of any dtype and values, some of them tied, strided or empty, and plain values."""
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(chance.getrandbits(40))
    for number in range(chance.randint(1, 8)):
        dtype = chance.choice(DTYPES)
        shape = chance.choice(((), (0,), (3,), (17, 5), (64, 1000), (3, 5, 7, 11)))
        octets = torch.Size(shape).numel() * dtype.itemsize
        high = 2 if dtype is torch.bool else 256
        tensor = torch.randint(0, high, (octets,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)
        tensors[f"layer.{number}"] = tensor.t() if tensor.ndim == 2 and chance.random() < 0.3 else tensor
    if large or chance.random() < 0.2:
        size = LARGEST if large else chance.randint(1 << 20, LARGEST)
        tensors["large"] = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    if chance.random() < 0.3:
        tensors["tied"] = tensors["layer.0"]
    return {"model": tensors, "step": chance.randint(0, 10**9), "name": f"run-{chance.random()}"}


def copied(state: State) -> State:
    return {**state, "model": {name: tensor.clone() for name, tensor in state["model"].items()}}


def spoil(state: State) -> None:
    """What training does to a state as soon as it may."""
    for tensor in state["model"].values():
        tensor.view(torch.uint8 if tensor.ndim else tensor.dtype).zero_() if tensor.is_contiguous() else tensor.zero_()


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        left, right = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
        return torch.equal(left, right)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(one == other)


def fingerprint(state: State) -> str:
    """A digest of a state's every bit."""
    found = hashlib.blake2b(repr((state["step"], state["name"])).encode())
    for name, tensor in sorted(state["model"].items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class FailingStore(wrappers.WrapperStorage):  # type: ignore[misc]
    """An object store that refuses a call now and then."""

    def __init__(self, inner: Any, soak: "Soak") -> None:
        super().__init__(inner)
        self.soak = soak

    def called(self, method: str, name: str, nbytes: int) -> None:
        self.soak.meet(method, f"{self.url}/{name}")


class Soak:
    """The rounds, and what they should find."""

    def __init__(self, root: Path, seed: int, s3: tuple[str, dict[str, Any]] | None) -> None:
        self.chance = random.Random(seed)
        self.root = root
        self.s3 = s3
        self.counts: Counter[str] = Counter()
        self.expected: dict[str, list[State | None]] = {}
        """By path, what may lie there; several after a commit of which nobody knows."""
        self.busy: set[str] = set()
        """Paths of saves of which it is not noted yet how they ended."""
        self.refusing: list[tuple[str, float]] = []
        """Methods of the object store, and with what chance they fail."""
        self.engines = [
            Checkpointer(),
            Checkpointer(compression="zstd"),
            Checkpointer(staging_limit=8 << 20),
            Checkpointer(on_save_error="warn", overlap="step"),
            Checkpointer(compression=("zstd", 3), staging_limit=8 << 20, alone=True),
        ]
        self.manager = CheckpointManager(root / "managed", keep_last=2, keep_every=50)
        self.step = 0
        self.managed: list[tuple[int, str]] = []
        """What the manager was asked for and may have committed."""
        self.story: deque[str] = deque(maxlen=40)
        """What was done last, for whoever has to understand what was wrong."""

    # -- faults -----------------------------------------------------------------------------------------------------

    def meet(self, method: str, where: str) -> None:
        for refused, likely in self.refusing:
            if refused == method and self.chance.random() < likely:
                self.counts["faults"] += 1
                raise shardckpt.StorageError(f"{where} was refused: 503 SlowDown, by the soak test")

    def arm(self, disk: Any) -> None:
        """Have something go wrong from now on, on the disk and in the object store."""
        chance = self.chance
        for _ in range(chance.randint(1, 2)):
            call = chance.choice(faults.CALLS)
            kind = chance.random()
            act: Callable[[], None] | None = faults.fails(chance.choice(ERRNOS))
            if kind < 0.2 and call in ("pwrite", "preadv"):
                act = None
            elif kind < 0.3:
                act = faults.is_slow(0.02)
            first = chance.randint(1, 6)
            last = chance.choice((first, first + 3, None))
            disk.add(call, act, first=first, last=last, matching=lambda path: str(self.root) in path)
            self.story.append(f"from call {first} to {last} {call} has fault {act} of kind {kind:.2f}")
        self.refusing.append((chance.choice(METHODS), chance.choice((0.3, 1.0))))

    def mend(self, disk: Any) -> None:
        disk.clear()
        self.refusing.clear()

    # -- rounds -----------------------------------------------------------------------------------------------------

    def path(self) -> str:
        number = self.chance.randint(0, 5)
        if self.s3 is not None and number > 3:
            return f"{self.s3[0]}/ck-{number}"
        return str(self.root / f"ck-{number}")

    def round(self, disk: Any, *, large: bool = False) -> None:
        """Save and load once or a few times, with or without faults, then see what there is."""
        chance = self.chance
        if chance.random() < 0.6 and not large:
            self.arm(disk)
        pending = [begun for _ in range(chance.randint(1, 3)) if (begun := self.begin(large=large))]
        for path, state, save in pending:
            self.settle(path, state, save.outcome)
        self.busy.clear()
        if chance.random() < 0.3:
            self.load(self.path(), chance.choice(self.engines), is_broken=True)
        if chance.random() < 0.2:
            self.manage()
        before = disk.hits
        self.mend(disk)
        self.counts["faults"] += before - self.counts["faults_of_disk"]
        self.counts["faults_of_disk"] = before
        for engine in self.engines:
            with contextlib.suppress(shardckpt.SaveFailedError):  # which `settle` has seen
                engine.wait()
        for path in dict.fromkeys([self.path(), *(path for path, _, _ in pending)]):
            self.load(path, chance.choice(self.engines), is_broken=False)
        if chance.random() < 0.1:
            self.destroy(self.path())
        if chance.random() < 0.1:
            self.look_at_manager()

    def begin(self, *, large: bool) -> tuple[str, State, Any] | None:
        """Begin a save to a path that no other is under way to; what it is to hold, and the pending save."""
        engine, path = self.chance.choice(self.engines), self.path()
        if path in self.busy:
            return None
        self.story.append(f"Checkpointer {self.engines.index(engine)} saves to {path}")
        state = make_state(self.chance, large=large)
        kept = copied(state)
        self.counts["saves"] += 1
        if self.chance.random() < 0.4:
            self.settle(path, kept, lambda: engine.save(state, path))
            return None
        try:
            pending = engine.async_save(state, path)
        except shardckpt.ShardckptError as error:
            self.fail(error)
            return None
        if self.chance.random() < 0.5:
            pending.wait_until_staged()
            spoil(state)
        self.busy.add(path)
        return path, kept, pending

    def settle(self, path: str, state: State, outcome: Callable[[], Any]) -> None:
        """Note what lies at a path after a save."""
        try:
            ended = outcome()
        except shardckpt.ShardckptError as error:
            ended = error
        self.story.append(f"the save of step {state['step']} to {path} ends: {ended}")
        before = self.expected.get(path, [None])
        if isinstance(ended, shardckpt.UncertainCommitError) or getattr(ended, "uncertain", False):
            self.counts["uncertain"] += 1
            self.expected[path] = [state, *before]
        elif isinstance(ended, Exception) or ended.error is not None:
            self.fail(ended if isinstance(ended, shardckpt.ShardckptError) else shardckpt.SaveFailedError(ended.error))
        else:
            self.counts["committed"] += 1
            self.expected[path] = [state]

    def fail(self, error: shardckpt.ShardckptError) -> None:
        self.counts["failed_saves"] += 1
        if not self.refusing:
            raise Wrong(f"a save failed where nothing was to fail: {error}") from error

    def load(self, path: str, engine: Checkpointer, *, is_broken: bool) -> None:
        """Load what is at a path in one of several ways, and compare."""
        expected = self.expected.get(path, [None])
        self.counts["loads"] += 1
        try:
            self.story.append(f"Checkpointer {self.engines.index(engine)} loads {path}, broken: {is_broken}")
            found: State | None = self.read(path, engine, expected)
        except shardckpt.CheckpointNotFoundError:
            found = None
            if is_broken:
                return
        except shardckpt.ShardckptError as error:
            self.counts["failed_loads"] += 1
            if not is_broken:
                raise Wrong(f"{path} does not load: {error}") from error
            return
        for state in expected:
            if (found is None) == (state is None) and (found is None or same_part(found, state)):
                if not is_broken:
                    self.expected[path] = [state]
                return
        differing = [] if found is None or expected[0] is None else differences(found, expected[0])
        holds = "nothing" if found is None else f"the state of step {found.get('step')}"
        steps = [state and state["step"] for state in expected]
        raise Wrong(f"{path} holds {holds}, and not that of {steps}; not alike: {differing}")

    def read(self, path: str, engine: Checkpointer, expected: list[State | None]) -> State:
        way = self.chance.choice(("whole", "template", "meta", "part", "slice"))
        known = expected[0]
        if way == "whole" or known is None or len(expected) > 1:
            return dict(engine.load(path))
        if way == "part":
            return {"model": engine.load(path, prefix="model")}
        if way == "slice":
            wide = [name for name, tensor in known["model"].items() if tensor.ndim > 0 and len(tensor) > 1]
            if not wide:
                return dict(engine.load(path))
            name = self.chance.choice(wide)
            middle = slice(len(known["model"][name]) // 3, len(known["model"][name]))
            tensor = shardckpt.read_tensor(path, f"model.{name}", middle)
            if not same(tensor, known["model"][name][middle]):
                raise Wrong(f"{name} at {path} has other values where it was read in part")
            return {}
        state = copied(known)
        spoil(state)
        if way == "meta":
            state["model"] = {name: tensor.to("meta") for name, tensor in state["model"].items() if name != "tied"}
        engine.load(path, {"model": state["model"]}, strict=False)
        return {"model": state["model"]}

    def destroy(self, path: str) -> None:
        """Remove a checkpoint, or a file of it, of which the next load is to say so."""
        if self.expected.get(path, [None]) == [None]:
            return
        storage = open_storage(path, self.s3[1] if self.s3 is not None and "://" in path else None)
        if self.chance.random() < 0.5:
            self.engines[0].remove(path)
            self.counts["removed"] += 1
            self.expected[path] = [None]
            return
        doomed = self.chance.choice([stat.name for stat in storage.list() if stat.name != "manifest.json"])
        storage.delete([doomed])
        self.counts["destroyed"] += 1
        try:
            found = self.engines[0].load(path)
        except shardckpt.CorruptCheckpointError:
            pass
        else:
            if not any(state is not None and same(found, state) for state in self.expected[path]):
                raise Wrong(f"{path} without {doomed} loads as something else")
        self.engines[0].remove(path)
        self.expected[path] = [None]

    def manage(self) -> None:
        """Have the manager save the next step."""
        self.step += 1
        state = make_state(self.chance)
        self.counts["saves"] += 1
        self.managed.append((self.step, fingerprint(state)))
        try:
            self.manager.save(self.step, state)
        except shardckpt.ShardckptError:  # perhaps of the save before, which faults met that are over
            self.counts["failed_saves"] += 1

    def look_at_manager(self) -> None:
        """The newest that it finds is one that was saved, as it was saved."""
        if not self.managed:
            return
        for _ in range(2):
            with contextlib.suppress(shardckpt.SaveFailedError):
                self.manager.wait()
        newest = self.manager.latest()
        self.counts["loads"] += 1
        if newest is None:
            return
        step = int(str(newest).rpartition("step=")[2])
        found = shardckpt.load(newest)
        found.pop("manager", None)
        if (step, fingerprint(found)) not in self.managed:
            raise Wrong(f"{newest} holds another state")
        self.managed = [(number, state) for number, state in self.managed if number >= step]

    # -- figures ----------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, int]:
        """What the process and the disk hold now, when nothing is under way."""
        gc.collect()
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        deadline = time.monotonic() + 10
        while threading.active_count() > 1 and time.monotonic() < deadline:
            time.sleep(0.05)  # threads that touch memory ahead end by themselves
        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
        with open("/proc/self/maps", encoding="ascii") as file:
            maps = file.read().splitlines()
        pools = [engine._pool for engine in self.engines]
        return {
            "rss_mib": resident >> 20,
            "threads": len(os.listdir("/proc/self/task")),
            "python_threads": threading.active_count(),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "mappings": len(maps),
            "shared_memory_mappings": sum("/dev/shm" in line for line in maps),
            "blocks_out": sum(pool._touched - len(pool._free) for pool in pools),
            "staging_mib": sum(pool.nbytes for pool in pools) >> 20,
            "stray_files": len(self.tidy()),
        }

    def tidy(self) -> list[str]:
        """Prune all places as if hours had passed; the files that are left and that no commit record names."""
        strays: list[str] = []
        for place in {Path(directory) for directory, _, names in os.walk(self.root) if names}:
            for file in place.iterdir():
                os.utime(file, (time.time() - 3600,) * 2)
            storage = open_storage(place)
            self.engines[0].prune(place)
            found = find(storage)
            known = set() if found is None else {MANIFEST, *found.manifest.file_names()}
            strays += [stat.name for stat in storage.list() if stat.name not in known]
        return strays

    def warm(self) -> None:
        """Have every Checkpointer touch the memory that it will ever need."""
        for number, engine in enumerate(self.engines):
            path = str(self.root / f"warm-{number}")
            for _ in range(2):
                engine.async_save(make_state(self.chance, large=True), path).result()
            engine.load(path)
            engine.remove(path)


def same_part(found: State, state: State | None) -> bool:
    """Whether what was read of a state is what that holds."""
    return state is not None and all(
        same_part(value, state[key]) if isinstance(value, dict) else same(value, state[key])
        for key, value in found.items()
    )


def differences(found: State, state: State) -> list[str]:
    """The names of the tensors and values that are not alike."""
    here, there = ({**whole.get("model", {}), **whole} for whole in (found, state))
    return [name for name in here if name != "model" and not (name in there and same(here[name], there[name]))]


@contextlib.contextmanager
def object_store(kind: str) -> Iterator[tuple[str, dict[str, Any]] | None]:
    """A bucket on a server that runs meanwhile, and the options that reach it; None for ``"none"``."""
    if kind == "none":
        yield None
        return
    server_module: Any = importlib.import_module("s3_server")
    with (server_module.running if kind == "moto" else server_module.running_weed)() as server:
        os.environ.update(server.environment)
        bucket = server.bucket or "soak"
        if not server.bucket:
            server.client().create_bucket(Bucket=bucket)
        yield f"s3://{bucket}/soak", server.storage_options


def soak(root: Path, arguments: argparse.Namespace, s3: tuple[str, dict[str, Any]] | None) -> dict[str, Any]:
    """Go through the rounds; the figures, with what was wrong under ``"wrong"``."""
    running = Soak(root, arguments.seed, s3)
    original = engine_module.open_storage

    def opening(path: Any, options: Any = None) -> Any:
        storage = original(path, options)
        return FailingStore(storage, running) if storage.url.startswith("s3") else storage

    engine_module.open_storage = opening
    wrong: list[str] = []
    start = running.figures()
    warmed = start
    rounds = 0
    deadline = time.monotonic() + 60 * arguments.minutes
    with faults.broken() as disk:
        running.warm()
        try:
            while rounds < arguments.rounds if arguments.rounds else time.monotonic() < deadline:
                running.round(disk)
                rounds += 1
                if rounds == arguments.warm:
                    warmed = running.figures()
        except Wrong as error:
            wrong.append(f"round {rounds}: {error}")
            wrong += running.story
        finally:
            running.mend(disk)
            engine_module.open_storage = original
        with contextlib.suppress(shardckpt.SaveFailedError):
            running.manager.wait()
    end = running.figures()
    limits = ALLOWED if s3 is None else ALLOWED | {"descriptors": KEPT}
    wrong += [
        f"{name} grew from {warmed[name]} to {end[name]}"
        for name, allowed in limits.items()
        if end[name] > warmed[name] + allowed
    ]
    counts = dict(running.counts)
    return {"rounds": rounds, **counts, "start": start, "warm": warmed, "end": end, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=0, help="end after so many rounds, whatever the time")
    parser.add_argument("--warm", type=int, default=20, help="rounds after which nothing may grow any more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", choices=("none", "moto", "weed"), default="none")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)  # that saves fail is what is wanted
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError):
        # An arena for each thread that ever was fragments for hours, and hides what a leak would add.
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    root = Path(tempfile.mkdtemp(prefix="shardckpt-soak-"))
    try:
        with object_store(arguments.s3) as s3:
            result = soak(root, arguments, s3)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
