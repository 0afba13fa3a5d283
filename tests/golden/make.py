"""Makes the golden files: small complete checkpoints of format v1, which every later version must read.

    python tests/golden/make.py            writes tests/golden/v1; what is there already is never changed

Save ids and times are fixed, so that the same state makes the same bytes. A state here is never edited once its
checkpoint is committed: add another checkpoint instead.
"""

import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date, datetime, time, timedelta, timezone
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from unittest import mock

import numpy
import torch
from torch import nn

ROOT = Path(__file__).parent / "v1"
SAVE_ID = "0mwgolden000001"
CREATED = "2026-01-02T03:04:05.678+00:00"


def values() -> dict[str, Any]:
    """Every kind of plain value."""
    return {
        "none": None,
        "bools": [True, False],
        "ints": [0, -5, 2**53, 2**53 + 1, -(2**70), 1 << 5000],
        "floats": [0.1, -0.0, 1e300, 5e-324, float("inf"), float("-inf"), float("nan")],
        "complex": complex(1.5, float("-inf")),
        "str": 'Snow: \u2603, escape: "\\\n\x00, face: \U0001f600',
        "half a pair": "\ud800x",
        "bytes": bytes(range(256)),
        "tuple": (1, (2, [3]), ()),
        "set": {3},
        "frozenset": frozenset({4}),
        "empties": [[], {}, (), set()],
        "dict": {1: "a", (1, "b"): 2, None: 3, "$odd": 4, 1.5: 5, "z": 6},
        "ordered": OrderedDict([("z", 1), ("a", 2)]),
        "counter": Counter({"x": 2, "y": -1}),
        "defaultdict": defaultdict(list, {"x": [1]}),
        "no default": defaultdict(None, {2: 3}),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "path": Path("/data/run 1"),
        "pure paths": [PurePosixPath("a/b"), PureWindowsPath("C:\\a")],
        "numpy": [numpy.float32(1.5), numpy.int64(-7), numpy.bool_(True), numpy.complex64(1 - 2j)],
        "datetime": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=5, minutes=45))),
        "naive": datetime(2026, 1, 2),  # noqa: DTZ001 - naive ones have to be kept too
        "date": date(2026, 1, 2),
        "time": time(3, 4, 5),
        "timedelta": timedelta(days=-1, seconds=5, microseconds=7),
    }


DTYPES = [
    "complex128", "complex64", "complex32", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "int64", "int32", "int16", "int8",
    "uint64", "uint32", "uint16", "uint8", "bool",
]  # fmt: skip


def of_dtype(name: str) -> torch.Tensor:
    """Two by three elements whose bytes count up; of bool, alternating."""
    dtype: torch.dtype = getattr(torch, name)
    count = torch.arange(6 * dtype.itemsize, dtype=torch.uint8)
    return (count % 2 if dtype is torch.bool else count).view(dtype).view(2, 3)


def tensors() -> dict[str, Any]:
    """Every dtype, and every shape and kind that needs care."""
    matrix = torch.arange(20.0).view(4, 5)
    return {
        "dtypes": {name: of_dtype(name) for name in DTYPES},
        "scalar": torch.tensor(2.5),
        "empty": [torch.empty(0), torch.empty(3, 0, 2, dtype=torch.int16)],
        "strided": matrix.t()[1:, ::2],
        "conj": torch.tensor([1 + 2j]).conj(),
        "sparse": torch.eye(3).to_sparse_coo(),
        "csr": torch.sparse_csr_tensor([0, 1, 2], [1, 0], [5.0, 6.0], (2, 2), check_invariants=True),
        "ndarray": numpy.arange(6, dtype=numpy.int16).reshape(2, 3),
        "matrix": matrix,
        "tied": matrix,
        'name with "quotes", [brackets] and \u2603': torch.ones(1),
        "__metadata__": torch.tensor([7]),
    }


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with a buffer, tied weights and an optimizer, whose numbers no arithmetic of torch has touched."""
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "norm": nn.BatchNorm1d(3), "b": nn.Linear(2, 3, bias=False)})
    model["b"].weight = model["a"].weight
    with torch.no_grad():
        for number, tensor in enumerate([*model.parameters(), *model.buffers()]):
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 10 * number)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25, betas=(0.5, 0.75))
    for group in optimizer.param_groups:  # what else is in there depends on the version of torch
        for option in group.keys() - {"params", "lr", "betas"}:
            del group[option]
    for parameter in list(model.parameters())[:2]:
        moments = {"exp_avg": parameter.detach() + 100, "exp_avg_sq": parameter.detach() + 200}
        optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
    return model, optimizer


def plain() -> dict[str, Any]:
    model, optimizer = model_and_optimizer()
    return {
        "values": values(),
        "tensors": tensors(),
        "model": model,
        "optimizer": optimizer,
        "object": {"third": Fraction(1, 3)},
    }


def compressed() -> dict[str, Any]:
    """Some mebibytes that compress well, so that there are several frames, and some that do not."""
    return {
        "long": (torch.arange(700_000, dtype=torch.int32) // 1000),
        "zeros": torch.zeros(3, 400_000),
        "short": torch.arange(5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "noise": of_dtype("uint8"),
    }


def sharded() -> dict[str, Any]:
    """Two ranks: rows of DTensors, and what only rank 1 has. Runs on every rank."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = sharded_values()
    own = {f"on rank {dist.get_rank()}": torch.full((2,), float(dist.get_rank())), "rank": dist.get_rank()}
    return {
        "rows": distribute_tensor(whole["rows"], mesh, [Shard(0)]),
        "columns": distribute_tensor(whole["columns"], mesh, [Shard(1)]),
        "few": distribute_tensor(whole["few"], mesh, [Shard(0)]),
        "replicated": distribute_tensor(whole["replicated"], mesh, [Replicate()]),
        "own": own,
    }


def sharded_values() -> dict[str, Any]:
    """What `sharded` is once put together."""
    return {
        "rows": torch.arange(15.0).view(5, 3),
        "columns": torch.arange(24, dtype=torch.int64).view(2, 4, 3),
        "few": torch.tensor([1, 2, 3], dtype=torch.bfloat16)[:1],
        "replicated": torch.arange(4, dtype=torch.float16),
        "own": {"on rank 0": torch.full((2,), 0.0), "rank": 0, "on rank 1": torch.full((2,), 1.0)},
    }


def by_rank() -> dict[str, Any]:
    """Two ranks, and what differs between them, in structure even. Runs on every rank."""
    import torch.distributed as dist

    from shardckpt import PerRank

    rank = dist.get_rank()
    whole = by_rank_values()
    own = {key: PerRank(whole[key][rank]) for key in ("rng", "position", "mixed")}
    return own | {
        "same": whole["same"],
        "loader": {"epoch": 4, "at": [PerRank(whole["loader"]["at"][0][rank])]},
        "only": {"on rank 1": PerRank("here")} if rank == 1 else {},
    }


def by_rank_values() -> dict[str, Any]:
    """What `by_rank` is once put together: a list of the ranks' values in each place that differs."""
    tied = torch.arange(3, dtype=torch.int16)
    return {
        "rng": [torch.arange(16, dtype=torch.uint8), torch.arange(16, 32, dtype=torch.uint8)],
        "position": [17, (18, 2**60)],
        "mixed": [{"a": tied, "b": tied, "empty": torch.empty(0, 2)}, [torch.tensor(1.5), Fraction(1, 3), None]],
        "same": torch.arange(4.0),
        "loader": {"epoch": 4, "at": [[100, 200]]},
        "only": {"on rank 1": [None, "here"]},
    }


STATES: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any], int]] = {
    "plain": (plain, {}, 1),
    "zstd": (compressed, {"compression": ("zstd", 3)}, 1),
    "sharded": (sharded, {}, 2),
    "per_rank": (by_rank, {}, 2),
}
"""By name: the state, the options and the number of ranks."""


def save(rank: int, name: str, path: str) -> None:
    """Save one of the states with a fixed id and time; every rank calls."""
    from shardckpt import Checkpointer, commit

    state, options, _ = STATES[name]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(commit, "new_save_id", return_value=SAVE_ID))
        stack.enter_context(mock.patch.object(commit.assembly, "now", return_value=CREATED))
        Checkpointer(**options).save(state(), path)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import ranks
    from golden import make  # noqa: PLW0406 - the ranks import it under this name, not as __main__

    for name, (_, _, size) in STATES.items():
        path = ROOT / name
        if path.exists():
            print(f"{path} stays as it is")  # noqa: T201 - a program that people run
            continue
        ranks.world(size).run(make.save, name, str(path))
        print(f"{path} made")  # noqa: T201 - as above
    ranks.stop_all()


if __name__ == "__main__":
    main()
