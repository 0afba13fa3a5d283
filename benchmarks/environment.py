"""What a benchmark's record says about the machine and the software, so that a figure can be judged later."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TAKING_PART = ("shardckpt", "torch", "xxhash", "msgspec", "fsspec", "s3fs", "safetensors", "lightning", "moto")
PEERS = ("torchsnapshot", "torch_checkpointing")
"""Looked for, and never installed by us."""


def machine(folder: Path) -> dict[str, Any]:
    """Processor, memory, kernel, and the filesystem that ``folder`` is on."""
    cpu = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "unknown")
    memory = next((int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if "MemTotal" in line), 0)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "filesystem": _filesystem(folder.resolve()),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that take part."""
    return {"python": platform.python_version(), **{name: _version(name) for name in (*TAKING_PART, *PEERS)}}


def checkout() -> dict[str, Any] | None:
    """The commit that runs, and whether files differ from it; None where this is no git checkout."""
    root = Path(__file__).parent.parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "src", "benchmarks"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def keep(record: dict[str, Any], path: Path) -> None:
    """Write a benchmark's record, and say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"record: {path}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def _filesystem(folder: Path) -> str:
    mounts = [line.split()[:3] for line in _lines("/proc/mounts")]
    holding = [(len(place), kind, device) for device, place, kind in mounts if folder.is_relative_to(place)]
    _, kind, device = max(holding, default=(0, "unknown", "unknown"))
    return f"{kind} on {Path(device).name}"
