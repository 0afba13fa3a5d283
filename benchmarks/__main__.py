"""Run a suite of benchmarks and write its record, its table and its picture.

python -m benchmarks save --size small
python -m benchmarks --list
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import PEERS, checkout, keep, machine, versions
from benchmarks.options import Launch, Options
from benchmarks.peers import installed
from benchmarks.plots import plot
from benchmarks.record import Measurement, as_json, judged, rows_of, table
from benchmarks.s3_server import s3_server
from benchmarks.states import LAYOUTS
from benchmarks.suites import NAMES, description, suite

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", choices=NAMES, help="what to measure")
    parser.add_argument("--list", action="store_true", help="say what the suites are, and stop")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="small: to see that it runs")
    parser.add_argument("--ranks", type=int, help="processes; by default what the targets speak of")
    parser.add_argument("--storage", choices=("local", "s3", "throttled"), default="local", help="throttled: reshard")
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmark"), help="emptied; on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record and the picture")
    parser.add_argument("--repeats", type=int, help="counted ones, after a warm-up; 5 at full size, 1 at small")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="CONTENDER",
        help="those whose name contains it; the record's name ends in -partial, and it replaces no whole one",
    )
    parser.add_argument("--layout", nargs="+", default=[], choices=LAYOUTS, help="of save, load and stall")
    parser.add_argument("--gib", nargs="+", type=float, default=[], help="other sizes of the state than the suite's")
    return parser


def main() -> None:
    parser = arguments()
    given = parser.parse_args()
    if given.list:
        for name in NAMES:
            print(f"{name:12}{description(name)}")
        return
    if given.suite is None:
        parser.error("which suite? --list names them")
    if given.storage == "throttled" and given.suite != "reshard":
        parser.error("only the suite reshard has a throttled storage")
    options = Options(
        suite=given.suite,
        size=given.size,
        ranks=given.ranks,
        storage="s3" if given.suite in ("s3", "s3_link") else given.storage,
        repeats=given.repeats or (5 if given.size == "full" else 1),
        folder=given.dir.absolute(),
        only=tuple(given.only),
        layouts=tuple(given.layout),
        gib=tuple(given.gib),
    )
    record = run(options)
    keep(record, given.out / f"{_name(options, record)}.json")
    rows = rows_of(Measurement(**one) for one in record["measurements"])
    print(table(rows, record["targets"]))
    if options.size == "small":
        print("The targets are set for --size full.")
    for what, why in record["not_measured"].items():
        print(f"not measured: {what}: {why}")
    picture = given.out / f"{_name(options, record)}.png"
    if rows and plot(rows, f"{options.suite}, {record['date']}, {record['machine']['cpu']}", picture):
        print(f"picture: {picture}")


def run(options: Options) -> dict[str, Any]:
    """Every job of the suite, one after the other, and what came of them."""
    load, start = os.getloadavg()[0], time.monotonic()
    chosen = suite(options.suite)
    measurements: list[Measurement] = []
    skipped = {name: version for name, version in versions().items() if name in PEERS and name not in installed()}
    launches = list(chosen.launches(options))
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    try:
        with contextlib.ExitStack() as stack:
            environment = stack.enter_context(s3_server()) if options.storage == "s3" else {}
            for number, launch in enumerate(launches, start=1):
                print(f"{number}/{len(launches)}: {launch.ranks} ranks, {launch.arguments}", file=sys.stderr)
                found = run_job(options, launch, environment)
                measurements += [Measurement(**one) for one in found["measurements"]]
                skipped |= found["skipped"]
        seen = machine(options.folder)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    rows = rows_of(measurements)
    return {
        "suite": options.suite,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "config": {
            "size": options.size,
            "gib": options.gib,
            "layouts": options.layouts,
            "ranks": sorted({launch.ranks for launch in launches}),
            "storage": options.storage,
            "repeats": options.repeats,
            "warm_up": 1,
            "only": options.only,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "load_average_before": load,
            "seconds": time.monotonic() - start,
        },
        "machine": seen,
        "versions": versions(),
        "checkout": checkout(),
        "command": ["python", "-m", "benchmarks", *_without_folders(sys.argv[1:])],
        "targets": judged(rows, chosen.TARGETS),
        "medians": as_json(rows),
        "not_measured": skipped,
        "measurements": [asdict(one) for one in measurements],
    }


def run_job(options: Options, launch: Launch, environment: dict[str, str]) -> dict[str, Any]:
    """Start one job's ranks under torchrun and wait for what rank 0 has to tell."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(launch.ranks)]
        worker = ["-m", "benchmarks.worker", options.text(), json.dumps(launch.arguments), str(result)]
        # One thread of torch a rank: torchrun's own choice for several ranks, of which it would warn.
        own = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
        root = Path(__file__).parent.parent
        said = Path(scratch) / "output.txt"
        with said.open("w") as output:
            command = [sys.executable, *torchrun, *worker]
            done = subprocess.run(command, cwd=root, env=own, stdout=output, stderr=output, check=False)
        if done.returncode:
            sys.exit(f"{said.read_text(errors='replace')}\n{options.suite}, {launch.arguments}: failed, see above")
        told: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return told


def _without_folders(arguments: Sequence[str]) -> list[str]:
    """The command line less `--dir` and `--out`: what they name is there on one machine only."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--dir", "--out"):
            next(rest)
        elif not argument.startswith(("--dir=", "--out=")):
            kept.append(argument)
    return kept


def _name(options: Options, record: dict[str, Any]) -> str:
    ranks: Sequence[int] = record["config"]["ranks"]
    sizes = [f"{gib:g}GiB" for gib in options.gib] or [options.size]
    parts = [options.suite, *options.layouts, *sizes, "-".join(map(str, ranks)) + "ranks"]
    if options.only:  # part of the contenders never takes the place of a record of all
        parts.append("partial")
    if options.storage != "local" and options.suite not in ("s3", "s3_link"):
        parts.append(options.storage)
    return "-".join(parts)


if __name__ == "__main__":
    main()
