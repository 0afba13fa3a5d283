"""What the ranks do in the tests of states and checkpoints that do not fit. Runs in the processes of `ranks`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, init_from_local_shards
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import shardckpt
from multirank.matrix_layouts import cut
from shardckpt import Checkpointer
from states import bits

FULL = torch.arange(16.0).view(8, 2)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(placement: Placement, full: Tensor = FULL) -> DTensor:
    return cut(full, mesh(), (placement,))


def claimed(local: Tensor, placement: Placement, shape: tuple[int, ...] = (8, 2)) -> DTensor:
    """A DTensor that is what somebody says it is."""
    return DTensor.from_local(local, mesh(), (placement,), run_check=False, shape=torch.Size(shape), stride=(2, 1))


def save_good(rank: int, path: str) -> None:
    Checkpointer(timeout=30).save({"x": sharded(Shard(0)), "other": torch.ones(3)}, path)


class Verdict(NamedTuple):
    """What a rank was told, and whether its state kept every bit."""

    kind: str
    text: str
    unchanged: bool


def images(state: dict[str, Any]) -> dict[str, bytes]:
    found = {}
    for name, value in state.items():
        if isinstance(value, nn.Module):
            found |= {f"{name}.{key}": bits(tensor) for key, tensor in value.state_dict().items()}
        elif isinstance(value, ShardedTensor):
            found |= {f"{name}.{index}": bits(shard.tensor) for index, shard in enumerate(value.local_shards())}
        else:
            found[name] = bits(value.to_local() if isinstance(value, DTensor) else value)
    return found


def attempt(state: dict[str, Any], call: Callable[[dict[str, Any]], Any]) -> Verdict:
    before = images(state)
    try:
        call(state)
    except shardckpt.ShardckptError as error:
        return Verdict(type(error).__name__, str(error), images(state) == before)
    return Verdict("", "", images(state) == before)


def load(rank: int, path: str, kind: str) -> Verdict:
    """Load what `save_good` saved into a state that is wrong in one way, on all ranks or on rank 1 alone."""
    is_last = rank == dist.get_world_size() - 1
    state: dict[str, Any] = {"other": torch.zeros(3)}
    match kind:
        case "sharded":
            state["x"] = sharded(Shard(0), FULL * 0)
        case "replicated":
            state["x"] = torch.zeros(8, 2)
        case "on the last rank only":
            state |= {"x": torch.zeros(8, 2)} if is_last else {}
        case "global shape":
            state["x"] = sharded(Shard(0), torch.zeros(9, 2))
        case "global shape on the last rank":
            state["x"] = torch.zeros(9 if is_last else 8, 2)
        case "placements by rank":
            state["x"] = sharded(Shard(1 if is_last else 0), FULL * 0)
        case "mesh by rank":
            alone = DeviceMesh("cpu", [1])
            state["x"] = cut(FULL * 0, alone, (Shard(0),)) if rank == 1 else sharded(Shard(0), FULL * 0)
        case "local shape":
            state["x"] = claimed(torch.zeros(5, 2), Shard(0)) if is_last else sharded(Shard(0), FULL * 0)
        case "shard of another shape":
            state["x"] = sharded_tensor(rank, torch.zeros(8 // dist.get_world_size(), 2))
            if is_last:
                state["x"].local_shards()[0].tensor = torch.zeros(1, 2)
        case "names clash":
            state["x"] = torch.zeros(8, 2)
            state["model"] = Clashing() if is_last else nn.Linear(1, 1)
    return attempt(state, lambda state: Checkpointer(timeout=30).load(path, state))


def sharded_tensor(rank: int, part: Tensor) -> ShardedTensor:
    offsets = [rank * len(part), 0]
    metadata = ShardMetadata(offsets, list(part.shape), f"rank:{rank}/cpu")
    return init_from_local_shards([LocalShard(part, metadata)], *FULL.shape)


class Clashing(nn.Module):
    """Two parameters with one name, once the prefix that torch.compile adds is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self._orig_mod = nn.Linear(1, 1, bias=False)


def save(rank: int, path: str, kind: str) -> Verdict:
    """Save a state of which ranks hold too much, too little, or not what they say."""
    is_last = rank == dist.get_world_size() - 1
    half = FULL.chunk(2)[min(rank, 1)].clone()
    state: dict[str, Any] = {"other": torch.zeros(3)}
    match kind:
        case "overlap":
            state["x"] = claimed(half, Shard(0)) if is_last else claimed(FULL.clone(), Replicate())
        case "hole":
            state |= {} if is_last else {"x": claimed(half, Shard(0))}
        case "global shape":
            state["x"] = claimed(half, Shard(0)) if is_last else sharded(Shard(0), torch.zeros(7, 2))
        case "local shape":
            state["x"] = claimed(torch.zeros(3, 2), Shard(0)) if is_last else sharded(Shard(0))
        case "names clash":
            state["model"] = Clashing() if is_last else nn.Linear(1, 1)
    return attempt(state, lambda state: Checkpointer(timeout=30).save(state, path))
