"""What the ranks do in the tests of Fabric: a Fabric of either package over the process group that is there already."""

import contextlib
import hashlib
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import shardckpt
from shardckpt.lightning import ShardedCheckpointIO
from shardckpt.lightning.snapshot import fingerprint
from shardckpt.state.names import parameter_names


def environment(package: str) -> Any:
    """A cluster environment that says the processes are running, and who they are."""
    base = importlib.import_module(f"{package}.plugins.environments").LightningEnvironment

    class Running(base):  # type: ignore[misc]
        creates_processes_externally = True

        def world_size(self) -> int:
            return dist.get_world_size() if dist.is_initialized() else 1

        def global_rank(self) -> int:
            return dist.get_rank() if dist.is_initialized() else 0

        local_rank = global_rank

    return Running()


def fabric(kind: str, package: str = "lightning.fabric", *, plugin: bool = True) -> Any:
    """``kind``: single, ddp, fsdp2 or tp."""
    strategies = importlib.import_module(f"{package}.strategies")
    world = dist.get_world_size() if dist.is_initialized() else 1
    strategy: Any = "auto" if kind == "single" else kind
    if kind == "fsdp2":
        strategy = strategies.ModelParallelStrategy(_fsdp2, data_parallel_size=world, tensor_parallel_size=1)
    elif kind == "tp":
        strategy = strategies.ModelParallelStrategy(_tp, data_parallel_size=1, tensor_parallel_size=world)
    plugins = [environment(package)]
    if plugin:
        plugins.append(ShardedCheckpointIO(timeout=40, commit_timeout=40))
    made = importlib.import_module(package).Fabric(
        accelerator="cpu", devices=1 if kind == "single" else world, strategy=strategy, plugins=plugins
    )
    made.launch()
    return made


def _fsdp2(model: Any, mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for part in (model[0], model[2]):
        fully_shard(part, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def _tp(model: Any, mesh: Any) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def trained(made: Any, *, steps: int = 2, seed: int = 0) -> tuple[Any, Any]:
    """A module and an optimizer with two param groups, set up by Fabric and trained."""
    model = made.setup_module(net(seed))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name.endswith("weight")], "weight_decay": 0.1},
        {"params": [p for name, p in named if name.endswith("bias")], "lr": 0.5},
    ]
    optimizer = made.setup_optimizers(torch.optim.AdamW(groups, lr=0.01))
    torch.manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        made.backward(model(torch.randn(4, 6)).square().sum())
        optimizer.step()
    return model, optimizer


def digests(model: nn.Module, optimizer: Any) -> dict[str, str]:
    """A digest of every whole tensor and every option, by name; every rank calls, since shards are gathered."""
    names = parameter_names({"model": getattr(model, "_forward_module", model)})
    found = {name: _digest(value) for name, value in model.state_dict().items()}
    optimizer = getattr(optimizer, "optimizer", optimizer)
    for index, group in enumerate(optimizer.param_groups):
        found[f"group{index}"] = repr(sorted((k, v) for k, v in group.items() if k != "params"))
        for parameter in group["params"]:
            for key, value in optimizer.state[parameter].items():
                found[f"{names[id(parameter)]}.{key}"] = _digest(value)
    return found


def _digest(value: torch.Tensor) -> str:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    kind = f"{whole.dtype}{tuple(whole.shape)}".encode()
    return hashlib.sha256(kind + whole.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write(rank: int, folder: str, kinds: list[tuple[str, str, bool]]) -> dict[str, Any]:
    """Save by each (kind, package, plugin) to ``<kind>-<package>-<plugin>``; returns digests, by that name."""
    with quiet():
        return {name_of(*kind): _write(rank, Path(folder) / name_of(*kind), *kind) for kind in kinds}


def name_of(kind: str, package: str, plugin: bool) -> str:
    return f"{kind}-{package}-{'ours' if plugin else 'stock'}.ckpt"


def _write(rank: int, path: Path, kind: str, package: str, plugin: bool) -> dict[str, str]:
    made = fabric(kind, package, plugin=plugin)
    model, optimizer = trained(made)
    # Ranks that name another path follow rank 0.
    where = path if rank == 0 or not plugin else path.with_name("elsewhere")
    made.save(where, {"model": model, "optimizer": optimizer, "step": 2, "note": {"a": [1, "b"]}, "rank": rank})
    assert path.exists()
    return digests(model, optimizer)


def read(rank: int, folder: str, kind: str, package: str, names: list[str]) -> dict[str, Any]:
    """Load each checkpoint into a fresh state; returns digests, what became of plain values, and the remainder."""
    with quiet():
        return {name: _read(Path(folder) / name, kind, package) for name in names}


def _read(path: Path, kind: str, package: str) -> tuple[dict[str, str], int, dict[str, Any]]:
    made = fabric(kind, package)
    model, optimizer = trained(made, steps=0, seed=9)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    rest = made.load(path, state)
    assert state["model"] is model
    return digests(model, optimizer), state["step"], dict(rest)


def read_plainly(rank: int, path: str) -> dict[str, str]:
    """Load without Fabric, under torchrun as it were, into a module that nothing wraps."""
    model = net(9)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim <= 1]},
        ]
    )
    shardckpt.load(path, {"model": model, "optimizer": optimizer})
    return digests(model, optimizer)


def part_ways(rank: int, folder: str) -> None:
    """Save together, then load into a state that on one rank has a name that the checkpoint lacks."""
    with quiet():
        made = fabric("ddp")
        model, optimizer = trained(made)
        made.save(Path(folder) / "together", {"model": model, "n": 1})
        before = digests(model, optimizer)
        bare = model.module
        if rank == 1:
            bare.only_here = nn.Parameter(torch.ones(1))
        try:
            made.load(Path(folder) / "together", {"model": bare, "n": 1})
        finally:
            assert before.items() <= digests(model, optimizer).items()


def marked(rank: int, folder: str, kind: str) -> list[Any]:
    """Values that differ by rank, through Fabric: saved, and restored in place."""
    with quiet():
        made = fabric(kind)
        model, optimizer = trained(made)
        path = Path(folder) / kind
        made.save(path, {"model": model, "optimizer": optimizer, "rng": shardckpt.PerRank({"n": torch.tensor([rank])})})
        live = {"model": model, "optimizer": optimizer, "rng": shardckpt.PerRank({"n": torch.tensor([-1])})}
        inner = live["rng"].value["n"]
        made.load(path, live)
        return [inner.item(), live["rng"].value["n"] is inner]


def shards_itself(rank: int, folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """A ``ZeroRedundancyOptimizer``, whose whole state only rank 0 gets to see; before and after."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def made_of(made: Any, seed: int, steps: int) -> tuple[Any, Any]:
        model = made.setup_module(net(seed))
        optimizer = made.setup_optimizers(ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1))
        for _ in range(steps):
            optimizer.zero_grad()
            made.backward(model(torch.ones(4, 6)).square().sum())
            optimizer.step()
        return model, optimizer

    with quiet():
        made = fabric("ddp")
        model, optimizer = made_of(made, 0, 2)
        made.save(Path(folder) / "zero", {"model": model, "optimizer": optimizer})
        twin, other = made_of(made, 3, 0)
        made.load(Path(folder) / "zero", {"model": twin, "optimizer": other})
        return digests(model, optimizer.optim), digests(twin, other.optim)


def fingerprints(rank: int) -> list[bool]:
    """Whether one DTensor has one fingerprint, and another of the same samples, elsewhere in memory, has another."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    live, other = (DTensor.from_local(torch.zeros(100, 100), mesh, [Shard(0)], run_check=False) for _ in range(2))
    before = fingerprint({"w": live}, 0)
    same = before is not None and before == fingerprint({"w": live.detach()}, 0)
    other.to_local().numpy()[1, 1] = 1  # no sample, and no version counter
    replaced = before != fingerprint({"w": other}, 0)
    live.to_local().add_(0)  # changes the counter alone
    return [same, replaced, before != fingerprint({"w": live}, 0)]
