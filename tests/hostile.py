"""What a hostile writer may put into a checkpoint, case after case in one process of bounded memory.

    python tests/hostile.py DIRECTORY CASES SEED      writes each case that went wrong, and exits with 1 then

Unlike rot, everything has its right digest here: some value of a manifest, or of a rank's manifest, is another one, and
sizes and digests that others keep of that file are mended. What such a checkpoint holds nobody can say, so a load, a
verification and a look at it may succeed; but what they raise is one of our errors, no file outside is touched, and
memory stays within bounds.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import zstandard

import rot
import shardckpt
from shardckpt import ShardckptError
from shardckpt.codecs import digest, digests_text

Json = Any
ODD: list[Callable[[random.Random], Json]] = [
    lambda rng: rng.choice((None, True, False, "", [], {})),
    lambda rng: rng.choice(
        (-1, 0, 1, 2, 7, 1 << 20, 1 << 31, 1 << 40, 1 << 53, 1 << 59, (1 << 63) - 1, 1 << 64, -(1 << 63))
    ),
    lambda rng: rng.choice((0.5, -0.0, 1e308, 1e-320)),
    lambda rng: rng.choice(
        ("../x", "/etc/passwd", "..", "\0", "a/b", "rank-00000-00000000.json", "\u2603" * 99, "cuda:0")
    ),
    lambda rng: rng.choice(("float32", "float64", "bool", "uint8", "complex128", "float4_e2m1fn_x2", "zstd", "int4")),
    lambda rng: {rng.choice(TAGS): rng.choice((0, "x", [], {}, [[0, 1]], [1, [2]], None))},
    lambda rng: [[]] * rng.choice((2, 70, 10_000)),
    lambda rng: [rng.choice((0, 1, -1, 1 << 40))] * rng.choice((1, 2, 3, 65)),
    lambda rng: nested(rng.choice((50, 150, 250, 400))),
    lambda rng: {"x" * rng.randrange(3): 1, "$tensor": "big"},
]
TAGS = [
    "$tensor", "$ndarray", "$object", "$per_rank", "$tuple", "$set", "$frozenset", "$dict", "$ordered", "$counter",
    "$defaultdict", "$module", "$optimizer", "$sparse", "$int", "$float", "$complex", "$bytes", "$str", "$utf32",
    "$size", "$dtype", "$device", "$path", "$purepath", "$numpy", "$datetime", "$date", "$time", "$timedelta", "$odd",
]  # fmt: skip


def nested(depth: int) -> Json:
    value: Json = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def nodes(value: Json) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as its container and its key."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        node = left.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, item in list(items):
            found.append((node, key))
            left.append(item)
    return found


def warp(document: Json, rng: random.Random) -> None:
    """Make some values of a document others: odd ones, those of other places, neighbours of themselves, or none."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = nodes(document)
        container, key = rng.choice(places)
        how = rng.randrange(5)
        if how == 0:
            del container[key]
        elif how == 1:
            other, its = rng.choice(places)
            container[key] = json.loads(json.dumps(other[its]))
        elif how == 2 and type(container[key]) is int:
            container[key] += rng.choice((-4096, -1, 1, 4096, 1 << 20))
        elif how == 3 and isinstance(container, dict):
            container[rng.choice((*container, *TAGS))] = container.pop(key)
        else:
            container[key] = rng.choice(ODD)(rng)


def hostile(checkpoint: rot.Checkpoint, files: rot.Files, rng: random.Random) -> str:
    """Warp a manifest, and mend what the commit record says of it; returns which."""
    record = json.loads(files["manifest.json"])
    words = sorted(name for name in files if name.startswith("rank-") and name.endswith("json"))
    name = rng.choice(["manifest.json", "manifest.json", *words])
    if name == "manifest.json":
        warp(record, rng)
        if rng.random() < 0.5:  # rank 0 says the same, and the others nothing
            for number, word in enumerate(words):
                said = json.loads(files[word])
                for field in ("state", "objects", "per_rank"):
                    said.pop(field, None)
                if number == 0 and isinstance(record, dict):
                    said |= {field: record[field] for field in ("state", "objects") if field in record}
                put(files, word, said, record)
    else:
        word = json.loads(files[name])
        warp(word, rng)
        put(files, name, word, record)
    files["manifest.json"] = json.dumps(record).encode()
    if rng.random() < 0.05:  # as one zstd frame, with whatever is in it
        files["manifest.json"] = zstandard.compress(files["manifest.json"] + b" " * rng.choice((0, 1 << 20)))
    return f"{checkpoint.path.name}/{name}"


def put(files: rot.Files, name: str, word: Json, record: Json) -> None:
    """Write a rank's manifest, and have the commit record, where that can be, know it."""
    files[name] = json.dumps(word).encode()
    listed = record.get("files") if isinstance(record, dict) else None
    for file in listed if isinstance(listed, list) else ():
        if isinstance(file, dict) and file.get("manifest") == name:
            file["manifest_size"] = len(files[name])
            file["manifest_digest"] = digests_text([digest(files[name])])


def sound(checkpoint: rot.Checkpoint) -> None:
    found, _ = judged(checkpoint)
    assert found is None, found


def judged(checkpoint: rot.Checkpoint) -> tuple[str | None, Counter[str]]:
    acts: list[Callable[[], object]] = [
        lambda: shardckpt.load(checkpoint.path, rot.blank(rot.state()), strict=False, weights_only=True),
        lambda: shardckpt.load(checkpoint.path, weights_only=True),
        lambda: shardckpt.verify(checkpoint.path),
        lambda: shardckpt.tools.inspect(checkpoint.path),
    ]
    outcomes: Counter[str] = Counter()
    for number, act in enumerate(acts):
        try:
            act()
            outcomes["passed"] += 1
        except ShardckptError:
            outcomes["refused"] += 1
        except Exception as error:  # noqa: BLE001 - that is what must not be
            return f"act {number} raised {type(error).__name__}: {str(error)[:300]}", outcomes
    return None, outcomes


if __name__ == "__main__":
    sys.exit(rot.main(sound, hostile, judged))
