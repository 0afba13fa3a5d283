"""States and checkpoints that do not fit: every rank hears which tensor and what on both sides, and nothing changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ranks
import shardckpt
from multirank import misfits

pytestmark = pytest.mark.multiprocess


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Eight rows, four on each of two ranks."""
    ranks.world(2).run(misfits.save_good, str(tmp_path / "ck"))
    return tmp_path / "ck"


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a checkpoint says of its tensor, and nothing else."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest["tensors"]["x"])
    (path / "manifest.json").write_text(json.dumps(manifest))


def refused(told: list[misfits.Verdict], kind: str, *named: str) -> None:
    """Every rank got this error, with all of these words in it, and has the state that it had."""
    for rank, verdict in enumerate(told):
        assert verdict.kind == kind, (rank, verdict)
        assert verdict.unchanged, rank
        for word in named:
            assert word in verdict.text, (rank, verdict.text)


@pytest.mark.parametrize("target", ("replicated", "on the last rank only", "sharded"))
def test_stored_shards_that_overlap(good, target):
    """A checkpoint with two values for one element is damaged, also for a rank that wants none of it."""

    def move(tensor: dict[str, Any]) -> None:
        tensor["starts"][1] = [2, 0]

    edit(good, move)
    told = ranks.world(2).run(misfits.load, str(good), target)
    refused(told, "CorruptCheckpointError", "'x'")
    # Where all have a part to read, one meets the overlap and the other the hole that is left beside it.
    for verdict in told[:1] if target == "sharded" else told:
        for word in ("overlap", "[0:4,0:2]", "[2:6,0:2]"):
            assert word in verdict.text


def test_stored_shards_with_a_hole(good):
    """A part that no file has is not made up."""

    def shorten(tensor: dict[str, Any]) -> None:
        tensor["lengths"][1] = [3, 2]

    edit(good, shorten)
    told = ranks.world(2).run(misfits.load, str(good), "sharded")
    refused(told, "CorruptCheckpointError", "'x'", "14 of its 16 elements")


@pytest.mark.parametrize(
    ("kind", "error", "named"),
    [
        ("global shape", "StateMismatchError", ["x: shape (9, 2) here, (8, 2) in the checkpoint"]),
        (
            "global shape on the last rank",
            "StateMismatchError",
            ["x: shape (9, 2) here, (8, 2) in the checkpoint (on rank 1)"],
        ),
        (
            "placements by rank",
            "ConflictingStateError",
            ["'x'", "(Shard(dim=0),) over the ranks [0, 1] on rank 0", "(Shard(dim=1),) over [0, 1] on rank 1"],
        ),
        ("mesh by rank", "ConflictingStateError", ["'x'", "the ranks [0, 1] on rank 0", "over [1] on rank 1"]),
        ("local shape", "UnserialisableError", ["'x'", "(5, 2)", "(4, 2)"]),
        ("shard of another shape", "ConflictingStateError", ["'x'", "(4, 2) by its metadata", "(1, 2) by its data"]),
        ("names clash", "UsageError", ["'weight'", "'_orig_mod.weight'", "Clashing"]),
    ],
)
def test_states_that_cannot_take_a_checkpoint(good, kind, error, named):
    """Whichever rank is wrong, none begins to restore."""
    refused(ranks.world(2).run(misfits.load, str(good), kind), error, *named)


@pytest.mark.parametrize(
    ("kind", "error", "named"),
    [
        ("overlap", "ConflictingStateError", ["'x'", "[0:8,0:2] on rank 0", "[4:8,0:2] on rank 1"]),
        ("hole", "ConflictingStateError", ["'x'", "8 of its 16 elements", "rank 0"]),
        ("global shape", "ConflictingStateError", ["'x' has shape (7, 2) on rank 0, but (8, 2) on rank 1"]),
        ("local shape", "UnserialisableError", ["'x'", "(3, 2)", "(4, 2)"]),
        ("names clash", "UsageError", ["'weight'", "'_orig_mod.weight'", "Clashing"]),
    ],
)
def test_states_that_are_no_whole(good, kind, error, named):
    """Ranks that hold too much, too little or something else hear of it before a byte is written."""
    before = {file.name: file.read_bytes() for file in good.iterdir()}
    refused(ranks.world(2).run(misfits.save, str(good), kind), error, *named)
    assert {file.name: file.read_bytes() for file in good.iterdir()} == before
    assert shardckpt.load(good)["x"].tolist() == misfits.FULL.tolist()
