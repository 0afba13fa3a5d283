"""The benchmarks run as the command that their documentation gives, at a size that takes no time."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint.staging

if not hasattr(torch.distributed.checkpoint.staging, "DefaultStager"):
    pytest.skip("the benchmarks measure DCP with the stagers that came with torch 2.9", allow_module_level=True)

from benchmarks.record import Measurement, Target, judged, rows_of, table
from benchmarks.suites.small import WATCHED, Clock
from shardckpt import save

ROOT = Path(__file__).parent.parent


def benchmark(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.multiprocess
def test_a_suite_writes_a_record_that_can_be_judged_later(tmp_path: Path) -> None:
    """A figure is worth what its record says of it: settings, versions, machine, every repeat, medians, targets."""
    printed = benchmark(
        *("save", "--layout", "sharded", "--only", "shardckpt", "DCP, 2", "raw"),
        *("--repeats", "2", "--dir", str(tmp_path / "scratch"), "--out", str(tmp_path)),
    )

    record = json.loads((tmp_path / "save-sharded-small-2ranks-partial.json").read_text())
    assert record["config"]["repeats"] == 2
    assert record["config"]["device"] in ("cpu", "cuda")
    assert record["versions"]["torch"]
    assert record["versions"]["torchsnapshot"]
    assert record["machine"]["cores"] > 0
    disks = (
        f"raw disk{kind}, {count}"
        for kind in ("", " with copy and digest")
        for count in ("1 thread", "2 threads", "4 threads")
    )
    names = ("shardckpt", "DCP, 2 threads", *disks)
    assert {(row["what"], row["contender"], row["counted"]) for row in record["medians"]} == {
        ("save", name, 2) for name in names
    }
    # The warm-up is there, and nobody always comes after the same one.
    repeats = [(one["repeat"], one["contender"]) for one in record["measurements"]]
    assert sorted(repeats) == sorted((number, name) for number in range(3) for name in names)
    orders = [tuple(name for number, name in repeats if number == repeat) for repeat in range(3)]
    assert len(set(orders)) == 3
    for one in record["measurements"]:
        assert one["value"] > 0
        assert one["unit"] == "s"
        assert one["nbytes"] > 2**20
        assert {"cpu_seconds", "peak_memory", "setting", "details"} <= set(one)
    medians = {row["contender"]: row["median"] for row in record["medians"]}
    reached = {verdict["over"][1]: verdict for verdict in record["targets"] if verdict["of"][1].startswith("DCP")}
    assert reached["shardckpt"]["reached"] == pytest.approx(medians["DCP, 2 threads"] / medians["shardckpt"])
    assert reached["shardckpt"]["verdict"] == "too few repeats"
    assert record["command"][:4] == ["python", "-m", "benchmarks", "save"]
    assert str(tmp_path) not in json.dumps(record["command"])
    assert "save: DCP, 2 threads" in printed
    assert (tmp_path / "save-sharded-small-2ranks-partial.png").stat().st_size > 1000
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize(
    ("repeats", "seconds", "verdict"),
    [(5, 0.3, "met"), (5, 0.31, "MISSED"), (4, 0.1, "too few repeats"), (4, 0.9, "too few repeats")],
)
def test_a_verdict_needs_five_counted_repeats_of_each_side(repeats: int, seconds: float, verdict: str) -> None:
    """A target is not called met, nor missed, on the word of a few noisy repeats; the warm-up does not count."""
    found = [Measurement("x", "s", "us", number, seconds) for number in range(repeats + 1)]
    found += [Measurement("x", "s", "them", number, 1.0) for number in range(6)]
    rows = rows_of(found)

    (alone,) = judged(rows, [Target("t", ("x", "us"), at_most=0.3)])
    (ratio,) = judged(rows, [Target("t", ("x", "us"), ("x", "them"), at_most=0.3)])
    (unbound,) = judged(rows, [Target("t", ("x", "us"), ("x", "them"))])

    assert (alone["verdict"], ratio["verdict"]) == (verdict, verdict)
    assert unbound["verdict"] == ("reported" if repeats == 5 else "too few repeats")
    assert verdict in table(rows, [alone])


def test_the_list_names_every_suite_and_every_suite_is_documented() -> None:
    """Nobody runs what nobody can find."""
    listed = [line.split()[0] for line in benchmark("--list").splitlines()]

    files = {path.stem for path in (ROOT / "benchmarks" / "suites").glob("*.py")} - {"__init__"}
    assert set(listed) == files
    documented = (ROOT / "benchmarks" / "README.md").read_text()
    assert all(f"| `{name}` |" in documented for name in listed)


def test_what_the_suite_of_small_tensors_watches_is_what_a_save_does(tmp_path: Path) -> None:
    """A function that was renamed, or is called by another name, would be counted as taking no time."""
    clock = Clock()
    with ExitStack() as stack:
        for number, (_, owner, function) in enumerate(WATCHED):
            stack.enter_context(clock.watch(str(number), owner, function))
        save({"weight": torch.arange(3.0)}, tmp_path / "checkpoint")

    called = [
        f"{owner.__name__}.{function}"
        for number, (_, owner, function) in enumerate(WATCHED)
        if str(number) in clock.spent
    ]

    assert called == [f"{owner.__name__}.{function}" for _, owner, function in WATCHED]
