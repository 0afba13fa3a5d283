"""What the ranks do in the multi-rank tests. Runs in the processes of `ranks`, never in pytest itself."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import shardckpt
from shardckpt import Checkpointer, coordinator
from shardckpt import checkpointer as module
from shardckpt.saving import halves
from states import TinyNet, digest_of, train


def surroundings(rank: int, variable: str) -> tuple[int, str | None]:
    return hash("layer.weight"), os.environ.get(variable)


def save_ddp(rank: int, path: str, mode: str = "save", **options: Any) -> dict[str, Any]:
    """Train a small model under DDP for a few steps and save it; returns what was saved and what rank wrote what."""
    model, optimizer = train(seed=7, steps=3, ddp=dist.get_world_size() > 1)
    state = {"model": model, "optimizer": optimizer, "step": 3, "rank": rank, "loose": torch.arange(5.0) + rank}
    checkpointer = Checkpointer(timeout=60, commit_timeout=60, **options)
    report = checkpointer.save(state, path) if mode == "save" else checkpointer.async_save(state, path).result(60)
    checkpointer.close()
    return {"digest": digest_of(state), "rank_nbytes": report.rank_nbytes, "nbytes": report.nbytes}


def load_ddp(rank: int, path: str) -> dict[str, Any]:
    """Load into a freshly made, differently initialised model on this world size."""
    model, optimizer = train(seed=100 + rank, steps=0, ddp=False)
    pointers = [p.data_ptr() for p in model.parameters()]
    state = {"model": model, "optimizer": optimizer, "step": 0, "rank": -1, "loose": torch.zeros(5)}
    report = shardckpt.load(path, state)
    assert [p.data_ptr() for p in model.parameters()] == pointers, "restored into new memory, not in place"
    return {
        "digest": digest_of(state),
        "rank_value": state["rank"],
        "bytes_read": report.bytes_read,
        "world_size": report.world_size,
    }


def save_big_replicated(rank: int, path: str, mebibytes: int) -> dict[str, Any]:
    model = nn.Module()
    torch.manual_seed(1)
    model.w = nn.Parameter(torch.randn(mebibytes, 1 << 18))
    report = Checkpointer(timeout=60).save({"model": model}, path)
    return {"rank_nbytes": report.rank_nbytes, "nbytes": report.nbytes}


def save_fsdp(rank: int, path: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, optimizer = train(seed=7, steps=3, ddp=False, wrap=lambda m: fully_shard(m, mesh=mesh))
    state = {"model": model, "optimizer": optimizer, "step": 3}
    shardckpt.save(state, path)
    return digest_of(state)


def load_fsdp(rank: int, path: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, optimizer = train(seed=9, steps=1, ddp=False, wrap=lambda m: fully_shard(m, mesh=mesh))
    state = {"model": model, "optimizer": optimizer, "step": 0}
    shardckpt.load(path, state)
    return digest_of(state)


def load_plain(rank: int, path: str, steps: int = 0) -> str:
    model, optimizer = train(seed=50 + rank, steps=steps, ddp=False)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    shardckpt.load(path, state)
    return digest_of(state)


def snapshot_is_one_instant(rank: int, path: str) -> bool:
    """Change every tensor right after async_save returned, while the save is being written."""
    model = nn.Linear(1024, 2048)
    expected = {name: p.detach().clone() for name, p in model.state_dict().items()}
    checkpointer = Checkpointer(timeout=60)
    pending = checkpointer.async_save({"model": model, "values": (values := [1, 2, 3])}, path)
    assert pending.staged
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    values.append(4)
    pending.result(60)
    dist.barrier()
    saved = shardckpt.load(path)
    dist.barrier()
    if dist.get_world_size() == 1 or rank == 0:
        assert saved["values"] == [1, 2, 3]
        # Linear's initial values differ by rank here, and each rank wrote its own part of them.
        assert not any(torch.isnan(t).any() for t in saved["model"].values())
    del expected
    return True


def conflicting_shapes(rank: int, path: str) -> None:
    Checkpointer(timeout=30).save({"t": torch.zeros(3 + rank)}, path)


def different_paths(rank: int, path: str) -> None:
    Checkpointer(timeout=30).save({"t": torch.zeros(3)}, f"{path}-{rank}")


def missed_call(rank: int, path: str, caller: int) -> str:
    """One rank alone calls save; what it is told. Then all call, and are in step again."""
    told = ""
    if rank == caller:
        coordinator.ranks._GRACE_SECONDS = 0.5  # type: ignore[misc]
        try:
            Checkpointer(timeout=1.0).save({"t": torch.zeros(3)}, path)
        except shardckpt.RankTimeoutError as error:
            told = str(error)
        finally:
            coordinator.ranks._GRACE_SECONDS = 20.0  # type: ignore[misc]
    dist.barrier()
    for value in range(3):
        Checkpointer(timeout=30).save({"t": torch.full((3,), float(value))}, path)
        assert shardckpt.load(path)["t"][0].item() == value
        dist.barrier()
    return told


def long_words(rank: int, path: str) -> int:
    """Every rank describes more tensors than one value of the Store can hold."""
    names = {f"a/rather/long/name/{i:06d}/{rank}/" + "x" * 400: torch.zeros(1) for i in range(12_000)}
    operation = coordinator.begin("long", timeout=30)
    heard = operation.agree("words", b"".join(name.encode() for name in names))
    return sum(map(len, heard))


def interrupted(rank: int, path: str) -> str:
    """Ctrl-C on one rank while it stages: the other is told at once, and the process can go on."""
    checkpointer = Checkpointer(timeout=30, commit_timeout=30)
    if rank == 1:
        original = halves.stage
        halves.stage = _interrupt  # type: ignore[assignment]
        try:
            checkpointer.async_save({"w": torch.ones(4)}, path)
        except KeyboardInterrupt:
            pass
        finally:
            halves.stage = original
    else:
        checkpointer.async_save({"w": torch.ones(4)}, path)
    try:
        checkpointer.wait()
    except shardckpt.SaveFailedError as error:
        told = str(error)
    else:
        told = ""
    checkpointer.save({"w": torch.ones(4)}, path)
    return told


def _interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def tied_dtensors(rank: int, path: str) -> bool:
    """Tied parameters of which one rank holds no row."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    tensor = distribute_tensor(torch.arange(3.0).reshape(1, 3), init_device_mesh("cpu", (2,)), [Shard(0)])
    shardckpt.save({"a": tensor, "b": tensor}, path)
    dist.barrier()
    saved = shardckpt.load(path)
    dist.barrier()
    return saved["a"] is saved["b"] and torch.equal(saved["a"], torch.arange(3.0).reshape(1, 3))


NO_SPACE = shardckpt.StorageFullError("no space left on device")


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("not this one")


def unserialisable_on_one(rank: int, path: str) -> None:
    Checkpointer(timeout=30).save({"t": torch.zeros(3), "odd": Unpicklable() if rank == 1 else 1}, path)


def failing_background(rank: int, path: str, failing: int) -> dict[str, Any]:
    """One rank cannot write its shard: who is told what, and when."""
    from storage.wrappers import FaultyStorage

    checkpointer = Checkpointer(timeout=30, commit_timeout=30)
    checkpointer.save({"w": torch.ones(4)}, path)
    original = module.open_storage
    if rank == failing:
        module.open_storage = lambda *a, **k: FaultyStorage(original(*a, **k), "create", NO_SPACE)
    told: dict[str, Any] = {}
    try:
        pending = checkpointer.async_save({"w": torch.zeros(4)}, path)
        try:
            pending.result(60)
        except shardckpt.SaveFailedError as error:
            told["result"] = str(error)
    finally:
        module.open_storage = original
    dist.barrier()
    told["survivor"] = shardckpt.load(path)["w"].tolist()
    dist.barrier()
    told["files"] = sorted(os.listdir(path))
    # A failure nobody asked for surfaces at the next save, on every rank, and at close.
    if rank == failing:
        module.open_storage = lambda *a, **k: FaultyStorage(original(*a, **k), "create", NO_SPACE)
    try:
        checkpointer.async_save({"w": torch.zeros(4)}, path)
    finally:
        module.open_storage = original
    try:
        checkpointer.async_save({"w": torch.zeros(4)}, path)
    except shardckpt.SaveFailedError as error:
        told["next"] = str(error)
    checkpointer.save({"w": torch.full((4,), 2.0)}, path)
    told["after"] = shardckpt.load(path)["w"].tolist()
    dist.barrier()
    checkpointer.close()
    return told


def in_flight(rank: int, path: str) -> bool:
    """A second save waits for the first; both are committed."""
    checkpointer = Checkpointer(timeout=30)
    first = checkpointer.async_save({"w": torch.ones(1000)}, path + "/a")
    second = checkpointer.async_save({"w": torch.zeros(1000)}, path + "/b")
    assert first.done()
    second.result(60)
    return shardckpt.is_checkpoint(path + "/a") and shardckpt.is_checkpoint(path + "/b")


def mismatch_on_one_rank(rank: int, path: str) -> Any:
    """One rank's live tensor has another shape: nobody's state changes."""
    Checkpointer(timeout=30).save({"a": torch.ones(4), "b": torch.ones(4)}, path)
    state = {"a": torch.zeros(4), "b": torch.zeros(4 if rank == 0 else 5)}
    try:
        shardckpt.load(path, state)
    except shardckpt.StateMismatchError as error:
        return str(error), state["a"].sum().item()
    return None


def missing_on_load(rank: int, path: str) -> str:
    try:
        shardckpt.load(path, {"a": torch.zeros(1)})
    except shardckpt.CheckpointNotFoundError as error:
        return str(error)
    return ""


def options_of_stages(rank: int, path: str) -> list[tuple[float, float, list[str]]]:
    """Save and restore a stage whose param groups have their own order and learning rate."""
    stage = nn.ModuleDict({f"{kind}{rank}": nn.Linear(2, 2) for kind in ("plain", "decayed")})
    names = {id(parameter): name for name, parameter in stage.named_parameters()}
    kinds = ["plain", "decayed"] if rank % 2 else ["decayed", "plain"]
    optimizer = torch.optim.AdamW(
        [{"params": list(stage[f"{kind}{rank}"].parameters()), "weight_decay": len(kind)} for kind in kinds],
        lr=1.0 + rank,
    )
    shardckpt.save({"model": stage, "optimizer": optimizer}, path)
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 99.0
    shardckpt.load(path, {"model": stage, "optimizer": optimizer})
    return [
        (group["lr"], group["weight_decay"], [names[id(parameter)] for parameter in group["params"]])
        for group in optimizer.param_groups
    ]


def pipeline(rank: int, path: str) -> dict[str, Any]:
    """Each rank has its own names, as pipeline stages have."""
    stage = nn.Linear(4, 4)
    with torch.no_grad():
        stage.weight.fill_(float(rank))
    shardckpt.save({"model": nn.ModuleDict({f"stage{rank}": stage}), "only": {f"on{rank}": rank}}, path)
    dist.barrier()
    saved = shardckpt.load(path)
    dist.barrier()
    return {
        "weights": [saved["model"][f"stage{r}.weight"][0, 0].item() for r in range(dist.get_world_size())],
        "only": saved["only"],
    }


def beside_training(rank: int, path: str) -> bool:
    """Training's own collectives run while saves are in flight, many times over."""
    checkpointer = Checkpointer(timeout=60)
    tensor = torch.ones(1 << 16)
    for step in range(6):
        pending = checkpointer.async_save({"w": torch.full((1 << 20,), float(step))}, path)
        for _ in range(20):
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
        pending.result(60)
    checkpointer.close()
    return bool(torch.equal(tensor, torch.ones(1 << 16)))


def threads_left(rank: int, path: str) -> list[str]:
    """An idle process has no thread of ours."""
    checkpointer = Checkpointer(timeout=60)
    checkpointer.save({"w": torch.ones(10)}, path)
    checkpointer.close()
    time.sleep(0.2)
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("shardckpt")]


def overwrite(rank: int, path: str) -> list[str]:
    checkpointer = Checkpointer(timeout=60)
    for value in range(3):
        checkpointer.save({"w": torch.full((100,), float(value))}, path)
    dist.barrier()
    assert shardckpt.load(path)["w"][0].item() == 2.0
    return sorted(p.suffix for p in Path(path).iterdir())


def alias(rank: int, root: str) -> dict[str, Any]:
    checkpointer = Checkpointer(timeout=60)
    model = nn.Linear(512, 512)
    first = checkpointer.async_save({"model": model, "name": "first"}, f"{root}/a", state_version=1)
    second = checkpointer.async_save({"model": model, "name": "second"}, f"{root}/b", state_version=1)
    reports = first.result(60), second.result(60)
    dist.barrier()
    shards = {name: sorted(Path(root, name).glob("*.safetensors")) for name in "ab"}
    inodes = {name: [file.stat().st_ino for file in files] for name, files in shards.items()}
    names = [shardckpt.load(f"{root}/{name}")["name"] for name in "ab"]
    weights = [shardckpt.load(f"{root}/{name}")["model"]["weight"] for name in "ab"]
    dist.barrier()
    third = checkpointer.save({"model": model, "name": "third"}, f"{root}/b", state_version=2)
    dist.barrier()
    return {
        "aliases": [report.alias for report in (*reports, third)],
        "same_inodes": inodes["a"] == inodes["b"] and len(inodes["a"]) == dist.get_world_size(),
        "names": names,
        "equal": torch.equal(*weights),
        "third": shardckpt.load(f"{root}/b")["name"],
    }


__all__ = ["TinyNet"]
