"""What rot does to checkpoints, case after case in one process of bounded memory; `test_rot.py` starts it.

    python tests/rot.py DIRECTORY CASES SEED      writes each case that went wrong, and exits with 1 then

Each case damages one file of one checkpoint, or two, loads it, verifies it and mends it. A load must raise one of our
errors that names a tensor or a file of the checkpoint, or give exactly what was saved; and whatever makes a load fail,
`verify` must find.
"""

import logging
import random
import re
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import shardckpt
from golden.make import ROOT
from shardckpt import Checkpointer, PerRank, ShardckptError, commit

MARGIN = 1 << 30
"""Bytes of address space that all cases together may add to what one sound load and verification of each needed."""
NAMES = re.compile(r"manifest\.json|(rank|objects)-[0-9a-z-]+\.(json|safetensors|pkl)")
TIED = torch.arange(6.0)


def state() -> dict[str, Any]:
    """Several blocks under a digest, small tensors side by side, ties, no elements, plain values, an object."""
    generator = torch.Generator().manual_seed(3)
    return {
        "big": torch.randint(0, 9, (330, 1000), generator=generator).double() / 8,
        "half": torch.rand(3000, generator=generator).bfloat16(),
        "small": {f"t{i}": torch.full((i, 2), float(i)) for i in range(12)},
        "tied": [TIED, TIED],
        "step": 1000,
        "lr": [0.125, 1e-3],
        "text": "a name",
        "flags": (True, None, {1: 2}),
        "mine": PerRank({"position": 123456, "generator": torch.arange(16)}),
        "object": slice(1, 8),
    }


def make(root: Path) -> None:
    """Always the same bytes, but for the times of the commits."""
    ids = (f"0mwrotten0000{number:02d}" for number in range(100))
    with mock.patch.object(commit, "new_save_id", side_effect=ids):
        _make(root)


def _make(root: Path) -> None:
    shardckpt.save(state(), root / "raw")
    shardckpt.save(state(), root / "zstd", compression="zstd")
    checkpointer = Checkpointer()
    for name in ("first", "shared"):
        assert checkpointer.save(state(), root / name, state_version=1).alias == (name == "shared")
    checkpointer.close()
    for name in ("sharded", "per_rank", "zstd"):
        place = root / f"golden-{name}"
        place.mkdir()
        for file in (ROOT / name).iterdir():
            (place / file.name).write_bytes(file.read_bytes())


def same(one: Any, other: Any) -> bool:
    """Bit for bit, and of the same types."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))
    if type(one) is not type(other):
        return False
    if isinstance(one, PerRank):
        return same(one.value, other.value)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


def blank(value: Any) -> Any:
    """The same places with nothing right in them."""
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, 77)
    if isinstance(value, PerRank):
        return PerRank(blank(value.value))
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(blank, value))
    return None


Files = dict[str, bytes]


def flip(files: Files, name: str, rng: random.Random) -> None:
    data = bytearray(files[name])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)


def byte(files: Files, name: str, rng: random.Random) -> None:
    data = bytearray(files[name])
    data[rng.randrange(len(data))] = rng.randrange(256)
    files[name] = bytes(data)


def digit(files: Files, name: str, rng: random.Random) -> None:
    """The most plausible of all lies: another digit in the place of one."""
    places = [at for at, value in enumerate(files[name][: 1 << 16]) if 48 <= value < 58]
    if places:
        data = bytearray(files[name])
        data[rng.choice(places)] = rng.randrange(48, 58)
        files[name] = bytes(data)


def span(data: bytes, rng: random.Random) -> tuple[int, int]:
    size = min(len(data), rng.choice((1, 16, 500, 4096, 1 << 20)))
    start = rng.randrange(len(data) - size + 1)
    return start, start + size


def truncate(files: Files, name: str, rng: random.Random) -> None:
    files[name] = files[name][: rng.randrange(len(files[name]))]


def zero(files: Files, name: str, rng: random.Random) -> None:
    start, stop = span(files[name], rng)
    files[name] = files[name][:start] + bytes(stop - start) + files[name][stop:]


def swap(files: Files, name: str, rng: random.Random) -> None:
    data = files[name]
    size = min(len(data) // 2, rng.choice((1, 16, 500, 1 << 20)))
    first = rng.randrange(len(data) - 2 * size + 1)
    second = rng.randrange(first + size, len(data) - size + 1)
    one, other = data[first : first + size], data[second : second + size]
    files[name] = data[:first] + other + data[first + size : second] + one + data[second + size :]


def swap_lines(files: Files, name: str, rng: random.Random) -> None:
    lines = files[name].split(b"\n")
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    files[name] = b"\n".join(lines)


def duplicate(files: Files, name: str, rng: random.Random) -> None:
    start, stop = span(files[name], rng)
    files[name] = files[name][:stop] + files[name][start:]


def append(files: Files, name: str, rng: random.Random) -> None:
    files[name] += rng.choice((b"\n", b"\0" * 4096, files[name][:100]))


def empty(files: Files, name: str, _: random.Random) -> None:
    files[name] = b""


def remove(files: Files, name: str, _: random.Random) -> None:
    del files[name]


def exchange(files: Files, name: str, rng: random.Random) -> None:
    other = rng.choice(sorted(files))
    files[name], files[other] = files[other], files[name]


ROT: list[Callable[[Files, str, random.Random], None]] = [
    flip, byte, digit, truncate, zero, swap, swap_lines, duplicate, append, empty, remove, exchange,
]  # fmt: skip


class Checkpoint:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = {file.name: file.read_bytes() for file in path.iterdir()}
        self.in_place = not path.name.startswith("golden")
        record = shardckpt.tools.inspect(path)
        self.words = {*self.files, *(word for tensor in record.tensors for word in (tensor.name, *tensor.aliases))}
        self.expected = state() if self.in_place else self.load()
        # What shares the shards of another save has its plain values in its manifest alone, which has no digest.
        self.rots = sorted(self.files.keys() - ({"manifest.json"} if path.name == "shared" else set()))

    def load(self) -> Any:
        if not self.in_place:
            return shardckpt.load(self.path, weights_only=False)
        found = blank(state())
        shardckpt.load(self.path, found, weights_only=False)
        return found

    def write(self, files: Files, was: Files) -> None:
        for name in files.keys() | was.keys():
            if name not in files:
                (self.path / name).unlink()
            elif files[name] is not was.get(name):
                (self.path / name).write_bytes(files[name])

    def problem(self) -> tuple[str | None, bool]:
        """What went wrong with the damage that is there now, and whether a load failed."""
        failed, error_text = False, ""
        try:
            if not same(self.load(), self.expected):
                return "a load gave something else, and no error", False
        except ShardckptError as error:
            failed, error_text = True, str(error)
            # A flipped digit in a file's name makes it another one.
            if not NAMES.search(str(error)) and not any(word in str(error) for word in self.words):
                return f"the error names neither a file nor a tensor: {error}", True
        except Exception as error:  # noqa: BLE001 - that is what must not be
            return f"a load raised {type(error).__name__}: {error}", True
        try:
            report = shardckpt.verify(self.path)
        except ShardckptError as error:
            return (None if failed else f"verify raised, where a load did not: {error}"), failed
        except Exception as error:  # noqa: BLE001 - that is what must not be
            return f"verify raised {type(error).__name__}: {error}", failed
        if failed and report.ok:
            return f"verify finds nothing, where a load fails: {error_text}", True
        if not all(NAMES.fullmatch(fault.file) and str(fault) for fault in report.faults):
            return f"a fault names no file: {report.faults}", failed
        return None, failed


def sound(checkpoint: Checkpoint) -> None:
    found, failed = checkpoint.problem()
    assert found is None, found
    assert not failed
    assert shardckpt.verify(checkpoint.path).ok


def spoiled(checkpoint: Checkpoint, files: Files, rng: random.Random) -> str:
    """Damage a file, or two; returns what was done to which."""
    rot = rng.choice(ROT)
    # The commit record is the one file without a digest of its own, so it gets its share.
    names = checkpoint.rots
    name = "manifest.json" if "manifest.json" in names and rng.random() < 0.4 else rng.choice(names)
    rot(files, name, rng)
    return f"{rot.__name__} of {checkpoint.path.name}/{name}"


def judged(checkpoint: Checkpoint) -> tuple[str | None, Counter[str]]:
    found, failed = checkpoint.problem()
    return found, Counter(["reported" if failed else "harmless"])


def main(
    sound: Callable[[Checkpoint], None],
    spoil: Callable[[Checkpoint, Files, random.Random], str],
    judge: Callable[[Checkpoint], tuple[str | None, Counter[str]]],
) -> int:
    """Run the cases that the command line asks for; returns 1 if one went wrong.

    ``sound`` looks at each checkpoint as it was made, ``spoil`` changes files of one and says what it did, and
    ``judge`` tells what is wrong with the outcome, and how it counts.
    """
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    root, cases, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    make(root)
    checkpoints = [Checkpoint(path) for path in sorted(root.iterdir())]
    for checkpoint in checkpoints:
        sound(checkpoint)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MARGIN,) * 2)
    outcomes: Counter[str] = Counter()
    wrong = 0
    for number in range(cases):
        rng = random.Random(seed * 1_000_003 + number)
        checkpoint = checkpoints[number % len(checkpoints)]
        files = dict(checkpoint.files)
        done = spoil(checkpoint, files, rng)
        checkpoint.write(files, checkpoint.files)
        found, counts = judge(checkpoint)
        checkpoint.write(checkpoint.files, files)
        outcomes += counts
        if found is not None:
            wrong += 1
            sys.stdout.write(f"case {number}: {done}: {found}\n")
    sys.stdout.write(f"{cases} cases: {dict(outcomes)}, {wrong} wrong\n")
    return min(1, wrong)


if __name__ == "__main__":
    sys.exit(main(sound, spoiled, judged))
