"""What the launcher's variables tell of other ranks on the same host: a hint, and never an error."""

import os
from typing import Any

import pytest
import torch.distributed as dist

from shardckpt import launch

Said = dict[str, str]


def torchrun(rank: Any, position: Any, size: Any) -> Said:
    return {"RANK": f"{rank}", "LOCAL_RANK": f"{position}", "LOCAL_WORLD_SIZE": f"{size}"}


def open_mpi(rank: int, position: int, size: int) -> Said:
    return {f"OMPI_COMM_WORLD_{n}": f"{v}" for n, v in (("RANK", rank), ("LOCAL_RANK", position), ("LOCAL_SIZE", size))}


def slurm(rank: int, position: int, node: int, tasks: str, **more: str) -> Said:
    found = {"PROCID": f"{rank}", "LOCALID": f"{position}", "NODEID": f"{node}", "STEP_TASKS_PER_NODE": tasks} | more
    return {f"SLURM_{name}": text for name, text in found.items()}


def told(monkeypatch: pytest.MonkeyPatch, said: Said, group: tuple[int, int] | None) -> tuple[Any, int]:
    """`siblings`, and `cores_per_rank` of 64 cores, where ``said`` is all that the environment says."""
    for names in launch._SAID:
        for name in (*names, "SLURM_NODEID"):
            monkeypatch.delenv(name, raising=False)
    for name, text in said.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(dist, "is_initialized", lambda: group is not None)
    rank, size = group or (0, 1)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: size)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return launch.siblings(), launch.cores_per_rank(size)


@pytest.mark.parametrize(
    ("said", "group", "siblings", "cores"),
    [
        ({}, None, None, 64),
        ({}, (0, 1), None, 64),
        ({}, (3, 16), (3, 16), 4),
        (torchrun(1, 1, 4), None, (1, 4), 16),
        (torchrun(1021, 1, 4), (1021, 1024), (1, 4), 16),
        (torchrun(1, 0, 1), (1, 2), None, 64),  # one on each host
        (open_mpi(5, 1, 4), (5, 8), (1, 4), 16),
        (open_mpi(5, 1, 4), None, (1, 4), 16),
        ({"PMI_RANK": "5", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}, (5, 8), (1, 4), 16),
        (slurm(2, 2, 0, "4"), (2, 4), (2, 4), 16),
        (slurm(5, 1, 1, "4(x2),2"), (5, 10), (1, 4), 16),
        (slurm(9, 1, 2, "4(x2),2"), (9, 10), (1, 2), 32),
        (slurm(9, 1, 2, "2,4(x2)"), None, (1, 4), 16),
        # Launchers within launchers: the inner one has started this process.
        (slurm(0, 0, 0, "1(x2)") | torchrun(3, 3, 4), (3, 8), (3, 4), 16),
        (slurm(0, 0, 0, "1(x2)") | open_mpi(3, 3, 4), (3, 8), (3, 4), 16),
        (slurm(9, 1, 2, "4(x2),2", STEP_NUM_TASKS="10"), (9, 10), (1, 2), 32),
        # One task, or one for each node, has started the ranks itself: each gets as many cores as the others.
        *((slurm(0, 0, 0, "1", STEP_NUM_TASKS="1"), (rank, 4), (rank, 4), 16) for rank in range(4)),
        *((slurm(1, 0, 1, "1(x2)", STEP_NUM_TASKS="2"), (rank, 8), (rank, 8), 8) for rank in range(8)),
        # One process of a batch job that asked for four.
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "4"}, None, None, 64),
    ],
)
def test_launchers_say_who_is_here(
    monkeypatch: pytest.MonkeyPatch, said: Said, group: tuple[int, int] | None, siblings: Any, cores: int
) -> None:
    """Ranks of a host share its cores and its page cache, however many of them each host has."""
    assert told(monkeypatch, said, group) == (siblings, cores)


@pytest.mark.parametrize(
    "said",
    [
        torchrun(3, 4, 4),
        torchrun(3, 0, 0),
        torchrun(3, 1, 9),  # more than there are
        torchrun(2, 1, 4),  # another rank's: of a process that started this one
        torchrun(3, -1, 4),
        torchrun(3, "many", "²"),
        torchrun(3, 1, "9" * 5000),
        slurm(3, 1, 2, "4(x2)"),
        slurm(3, 1, 0, "4(x"),
        slurm(3, 1, 0, ""),
        {"LOCAL_RANK": "3"},
        {"LOCAL_WORLD_SIZE": "2"},
    ],
)
def test_what_cannot_be_so_is_passed_over(monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    """Then all ranks of the group are taken to be here; and an innermost lie does not hide an outer truth."""
    assert told(monkeypatch, said, (3, 8)) == ((3, 8), 8)
    if "SLURM_PROCID" not in said:
        assert told(monkeypatch, slurm(3, 1, 1, "2,4,2") | said, (3, 8)) == ((1, 4), 16)
