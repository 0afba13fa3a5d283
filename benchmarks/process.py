"""What this process, and the ones it started, have used: processor time and memory."""

import os
from collections.abc import Iterator
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """User and system time of this process and of its living descendants (DCP may save in a process of its own)."""
    times = os.times()
    finished = times.children_user + times.children_system
    return times.user + times.system + finished + sum(_cpu_of(pid) for pid in _descendants(os.getpid()))


def resident() -> int:
    """Bytes that are in memory now; shared ones count in each process that has them."""
    return sum(_status(pid, "VmRSS") for pid in _family())


def forget_peak() -> None:
    """Let `peak_resident` begin anew."""
    for pid in _family():
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def peak_resident() -> int:
    """The most that was in memory since `forget_peak`."""
    return sum(_status(pid, "VmHWM") for pid in _family())


def bytes_written() -> int:
    """Handed to the disk by this process so far, in direct writes or by dirtying pages of the cache."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def _family() -> list[int]:
    return [os.getpid(), *_descendants(os.getpid())]


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = [int(child) for child in task.read_text(encoding="ascii").split()]
        except OSError:  # the thread has ended
            continue
        for child in found:
            yield child
            yield from _descendants(child)


def _cpu_of(pid: int) -> float:
    try:
        # The name of the program is in brackets and may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _status(pid: int, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
