"""The demonstration behind ``scripts/launch_ddp.sh``: train, kill, resume on other numbers of processes, compare.

Runs ``worker.py`` under torchrun, once for each number of processes. The first run is killed with SIGKILL, all its
processes at once, when a checkpoint is committed and training is past it. Exits non-zero unless every rank of every
resumed run held exactly the state that had been saved.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, NoReturn

import fsspec
import show

HERE = Path(__file__).parent
PHASE_TIMEOUT = 900.0
"""Seconds after which a run that has neither ended nor come to the point where it is killed counts as hung."""

Notes = list[dict[str, Any]]


class Phase(NamedTuple):
    """One run of the training script."""

    number: int
    processes: int
    max_steps: int
    kill_after: int | None
    """The step from which on it may be killed; None lets it run to its end."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", choices=["local", "s3"], required=True)
    parser.add_argument("--max-steps", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", required=True, help="the first run, then each resumption")
    args = parser.parse_args()
    if args.max_steps < 4 * len(args.processes) or len(args.processes) < 2:
        parser.error("at least two runs, and four steps for each of them")

    run_dir: Path = args.run_dir.resolve()
    empty(run_dir)
    save_every = max(1, args.max_steps // (4 * len(args.processes)))
    phases = plan(args.processes, args.max_steps, save_every)
    with contextlib.ExitStack() as stack:
        env = dict(os.environ, WITNESS_DIR=str(run_dir / "notes"))
        root = str(run_dir / "checkpoints")
        if args.storage == "s3":
            env |= stack.enter_context(s3_server(run_dir / "s3-server.log"))
            os.environ.update(env)
            root = "s3://demo/checkpoints"
        for phase in phases:
            train(phase, root, env, ["--width", str(args.width), "--save-every", str(save_every)])
            print(f"in {root}:\n{show.shards(files_below(root))}", flush=True)
        return report(phases, root, run_dir)


def empty(run_dir: Path) -> None:
    """Make the folder, or empty the one that an earlier demonstration left; anything else is left alone."""
    if run_dir.exists() and not (run_dir / "notes").is_dir() and any(run_dir.iterdir()):
        sys.exit(f"{run_dir} is not empty and not from an earlier demonstration; set RUN_DIR to another folder")
    shutil.rmtree(run_dir, ignore_errors=True)
    (run_dir / "notes").mkdir(parents=True)


def plan(processes: Sequence[int], max_steps: int, save_every: int) -> list[Phase]:
    """Equal parts of the steps for each run. The first is meant to do all of them, and is killed between two saves."""
    count = len(processes)
    first = Phase(0, processes[0], max_steps, kill_after=max_steps // count + save_every // 2)
    ends = (max_steps * (index + 1) // count for index in range(1, count))
    return [first, *(Phase(index, processes[index], end, None) for index, end in enumerate(ends, start=1))]


def train(phase: Phase, root: str, env: Mapping[str, str], options: Sequence[str]) -> None:
    """Run one phase to its end, be that its own or ours."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(phase.processes), str(HERE / "worker.py")]
    command += ["--checkpoints", root, "--max-steps", str(phase.max_steps), *options]
    if phase.number > 0:
        command += ["--resume", "last"]
    heading = f"run {phase.number + 1}: {phase.processes} process{'es' if phase.processes > 1 else ''}"
    heading += ", to be killed" if phase.kill_after is not None else f", resumed, up to step {phase.max_steps}"
    print(f"\n── {heading} ".ljust(88, "─"), flush=True)

    job = subprocess.Popen(command, env={**env, "WITNESS_PHASE": str(phase.number)}, start_new_session=True)
    try:
        if phase.kill_after is None:
            code = job.wait(PHASE_TIMEOUT)
            if code != 0:
                sys.exit(f"the run ended with exit code {code}")
            return
        step, saved = wait_for_the_moment(job, phase, root, Path(env["WITNESS_DIR"]))
        killed = kill_all(job)
        print(f"\n✗ SIGKILL to {killed} processes at step {step}; the last committed checkpoint is of step {saved}")
    finally:
        if job.poll() is None:
            kill_all(job)


def wait_for_the_moment(job: "subprocess.Popen[bytes]", phase: Phase, root: str, notes: Path) -> tuple[int, int]:
    """Wait until training has passed both its part of the steps and a committed checkpoint; return these two steps."""
    assert phase.kill_after is not None
    deadline = time.monotonic() + PHASE_TIMEOUT
    while time.monotonic() < deadline:
        if job.poll() is not None:
            remedy = "; raise MAX_STEPS or WIDTH" if job.returncode == 0 else ""
            sys.exit(f"the run ended with exit code {job.returncode} before it could be killed{remedy}")
        steps = [note["step"] for note in read_notes(notes, phase.number, rank=0) if note["event"] == "step"]
        if steps and steps[-1] > phase.kill_after:
            committed = committed_steps(root)
            if committed and steps[-1] > committed[-1]:
                return steps[-1], committed[-1]
        time.sleep(0.05)
    sys.exit(f"no checkpoint was committed, and passed by training, in {PHASE_TIMEOUT:.0f} s")


def committed_steps(root: str) -> list[int]:
    """The steps whose checkpoints are complete, that is, have a manifest."""
    names = {name.split("/")[-2] for name in files_below(root) if name.endswith("/manifest.json")}
    return sorted(int(name.removeprefix("step=").removesuffix(".ckpt")) for name in names if name.startswith("step="))


def files_below(root: str) -> dict[str, int]:
    """Size in bytes of each file, by its path below ``root``."""
    filesystem, path = fsspec.core.url_to_fs(root)
    filesystem.invalidate_cache()
    found = filesystem.find(path, detail=True)
    return {name.removeprefix(path).lstrip("/"): entry["size"] for name, entry in found.items()}


def kill_all(job: "subprocess.Popen[bytes]") -> int:
    """SIGKILL the job: torchrun, and its workers, each of which torchrun gave a process group. Return how many died."""
    processes = {job.pid: job.pid}
    for pid, parent, group in sorted(process_table()):
        if parent in processes:
            processes[pid] = group
    for group in set(processes.values()):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    job.wait(30)
    return len(processes)


def process_table() -> Iterator[tuple[int, int, int]]:
    """(pid, parent's pid, process group) of every process, from Linux's ``/proc``."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            fields = stat.read_text().rpartition(")")[2].split()
            yield int(stat.parent.name), int(fields[1]), int(fields[2])


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[dict[str, str]]:
    """An S3 server on a free port of 127.0.0.1, with an empty bucket; yields the environment to find it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    with log.open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"the S3 server did not start; see {log}")
                time.sleep(0.1)
            make_bucket = (
                f"import boto3; boto3.client('s3', endpoint_url='http://127.0.0.1:{port}').create_bucket(Bucket='demo')"
            )
            subprocess.run([sys.executable, "-c", make_bucket], env={**os.environ, **env}, check=True, timeout=60)
            print(f"an S3 server listens on 127.0.0.1:{port} (process {server.pid})")
            yield env
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def read_notes(folder: Path, phase: int, rank: int) -> Notes:
    """What the witness of one rank wrote. A last line that was cut off by the kill is left out."""
    path = folder / f"{phase}-rank{rank}.jsonl"
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]


def report(phases: Sequence[Phase], root: str, run_dir: Path) -> int:
    """Show what happened; return the exit code."""
    notes = {phase: read_notes(run_dir / "notes", phase.number, rank=0) for phase in phases}
    curves = []
    for phase, lines in notes.items():
        steps = [note for note in lines if note["event"] == "step"]
        label = f"{phase.processes} process{'es' if phase.processes > 1 else ''}"
        label += " ✗ killed" if phase.kill_after is not None else ""
        curves.append(show.Curve(label, [note["step"] for note in steps], [note["loss"] for note in steps]))
    saves = sorted({note["step"] for lines in notes.values() for note in lines if note["event"] == "save"})

    print("\n── the loss across the restarts ".ljust(88, "─"))
    print(show.text_plot(curves))
    show.picture(curves, saves, run_dir / "loss.png")
    print(f"as a picture: {run_dir / 'loss.png'}")

    print("\n── the checkpoints, in bytes ".ljust(88, "─"))
    print(show.tree(root, files_below(root)))

    print("\n── time that training was blocked by each save ".ljust(88, "─"))
    for phase, lines in notes.items():
        print(f"  {phase.processes} process{'es:' if phase.processes > 1 else ':  '} {blocked(lines)}")

    print("\n── is the state restored the state saved? ".ljust(88, "─"))
    verdicts = [verdict(phases[: phase.number], phase, run_dir / "notes") for phase in phases[1:]]
    equal = all(verdicts)
    print(f"\n{'EQUAL: bit for bit, on every rank of every resumed run' if equal else 'NOT EQUAL'}")
    return 0 if equal else 1


def blocked(lines: Notes) -> str:
    """The first save, which allocates memory, and the others, beside a step of training."""
    by_step: dict[int, float] = {}
    for note in lines:
        if note["event"] == "save":  # step=N.ckpt and last.ckpt
            by_step[note["step"]] = by_step.get(note["step"], 0.0) + note["seconds"]
    times = [note["time"] for note in lines if note["event"] == "step"]
    step = median(after - before for before, after in itertools.pairwise(times))
    first, *others = (seconds * 1e3 for seconds in by_step.values())
    rest = f", the {len(others)} after it {median(others):.1f} ms (at most {max(others):.1f} ms)" if others else ""
    return f"first save {first:.1f} ms{rest}; a step of training {step * 1e3:.1f} ms"


def verdict(earlier: Sequence[Phase], phase: Phase, notes: Path) -> bool:
    """Compare what each rank held when training went on with what was in memory when that step was saved."""
    saved = {
        note["step"]: (before.processes, note["digests"])
        for before in earlier
        for note in read_notes(notes, before.number, rank=0)
        if note["event"] == "saved"
    }
    equal = True
    for rank in range(phase.processes):
        started = next(note for note in read_notes(notes, phase.number, rank) if note["event"] == "started")
        step, digests = started["step"], started["digests"]
        where = f"  step {step}, restored on {phase.processes}, rank {rank}: "
        if step not in saved:
            print(where + "no checkpoint of that step was ever saved")
            equal = False
            continue
        processes, expected = saved[step]
        wrong = sorted(name for name in digests.keys() | expected.keys() if digests.get(name) != expected.get(name))
        found = f"{len(wrong)} differ: {', '.join(wrong[:5])}" if wrong else f"all {len(expected)} entries equal"
        print(f"{where}{found} (saved on {processes})")
        equal = equal and not wrong
    return equal


def stop(signum: int, frame: object) -> NoReturn:
    """End by an exception, so that the job and the server are stopped on the way out."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
