"""What is saved and loaded: as shardckpt takes it, as DCP takes it, and tensor by tensor."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.bench import device
from benchmarks.options import GIB

WIDTH = 2048
"""Of the square layers: 16 MiB of float32 each, 48 MiB with their optimizer state."""
LAYOUTS = ("sharded", "replicated", "huge")


class State:
    """Nested tensors. ``live`` is what shardckpt is given; this plain one is also what DCP and the others are given."""

    replicated = False
    """Whether the ranks hold the same, so that one of them can write all of it."""

    def __init__(self, live: dict[str, Any], nbytes: int) -> None:
        self.live = live
        self.nbytes = nbytes
        """Of the whole checkpoint."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What this rank holds, by name."""
        for name, tensor in self.live.items():
            yield name, _local(tensor)

    def for_dcp(self) -> dict[str, Any]:
        """The state dict that DCP saves, or loads into."""
        return dict(self.live)

    def take(self, loaded: dict[str, Any]) -> None:
        """Put what DCP loaded into place, where it did not load there."""

    def whole(self) -> dict[str, Any]:
        """All of it, on rank 0."""
        return dict(self.live)

    def take_whole(self, loaded: dict[str, Any]) -> None:
        """Restore from what `whole` gave; every rank has it and takes what it holds."""
        for name, tensor in self.live.items():
            tensor.copy_(loaded[name])

    def held_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def fingerprint(self) -> list[int]:
        """A digest of each tensor's bytes."""
        return [xxhash.xxh3_64_intdigest(_bytes(tensor)) for _, tensor in self.tensors()]

    def scramble(self) -> None:
        """Overwrite the state, so that a load that does nothing is found out."""
        for _, tensor in self.tensors():
            tensor.zero_()


class Training(State):
    """A model and its AdamW, as a user has them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, replicated: bool) -> None:
        self.model, self.optimizer, self.replicated = model, optimizer, replicated
        super().__init__({"model": model, "optimizer": optimizer}, 0)
        held = self.held_bytes()
        self.nbytes = held if replicated else _total(held)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, _local(parameter.detach())
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                if value.dim():  # the count of steps is on every rank, and not worth counting
                    yield f"{name}.{kind}", _local(value)

    def for_dcp(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def take(self, loaded: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
        )

    def whole(self) -> dict[str, Any]:
        if self.replicated:
            return self.for_dcp()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

    def take_whole(self, loaded: dict[str, Any]) -> None:
        # Tensor by tensor: load_state_dict of an optimizer would adopt the mapped tensors, and read nothing yet.
        for name, parameter in self.model.named_parameters():
            name = name.removeprefix("module.")
            _copy_part(parameter.detach(), loaded["model"][name])
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                _copy_part(value, loaded["optimizer"]["state"][name][kind])


class Huge(nn.Module):
    """One parameter, as of an embedding that dwarfs the rest."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max(1, nbytes // (4 * WIDTH)), WIDTH, device=device()))


def training(layout: str, gib: float) -> Training:
    """About ``gib`` GiB of state: FSDP2's shards, DDP's replicas, or one parameter under DDP and no optimizer state."""
    model: nn.Module
    if layout == "huge":
        model = DistributedDataParallel(Huge(int(gib * GIB)), gradient_as_bucket_view=True)
        _fill(parameter.detach() for parameter in model.parameters())
        return Training(model, torch.optim.SGD(model.parameters(), lr=1e-4), replicated=True)
    layers = max(1, round(gib * GIB / (3 * 4 * WIDTH * WIDTH)))
    if layout == "replicated":
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, device=device()) for _ in range(layers)))
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, device="meta") for _ in range(layers)))
        for layer in model:
            fully_shard(layer, mesh=mesh())
        fully_shard(model, mesh=mesh())
        model.to_empty(device=device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        # As the first step would leave it, without the memory that gradients take.
        kept = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **kept}
    state = Training(model, optimizer, replicated=layout == "replicated")
    _fill(tensor for _, tensor in state.tensors())
    return state


def sharded(names: list[str], placement: Placement, fill: Callable[[int], torch.Tensor] | None) -> State:
    """Square tensors of `WIDTH` as DTensors over all ranks; ``fill`` gives a whole one by its number, None zeros."""
    world, rank = dist.get_world_size(), dist.get_rank()
    live = {}
    for number, name in enumerate(names):
        local = fill(number) if fill else torch.zeros(WIDTH, WIDTH)
        if isinstance(placement, Shard):
            local = torch.tensor_split(local, world, dim=placement.dim)[rank].clone()
        shape = torch.Size((WIDTH, WIDTH))
        live[name] = DTensor.from_local(
            local.to(device()), mesh(), [placement], run_check=False, shape=shape, stride=(WIDTH, 1)
        )
    return State(live, len(names) * WIDTH * WIDTH * 4)


def small(count: int, nbytes: int) -> State:
    """Many small tensors, the same on every rank."""
    torch.manual_seed(0)
    live = {f"layers.{number}.weight": torch.rand(nbytes // 4, device=device()) for number in range(count)}
    state = State(live, count * nbytes)
    state.replicated = True
    return state


def mesh() -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh(device().type, (dist.get_world_size(),))


def _fill(tensors: Iterator[torch.Tensor]) -> None:
    for number, tensor in enumerate(tensors):
        torch.manual_seed(number)
        tensor.uniform_()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copy_part(live: torch.Tensor, whole: torch.Tensor) -> None:
    """Into ``live`` what it holds of ``whole``: of a sharded one, the rows of this rank."""
    if isinstance(live, DTensor):
        chunks = whole.chunk(dist.get_world_size())
        whole = chunks[dist.get_rank()] if dist.get_rank() < len(chunks) else whole[:0]
    _local(live).copy_(whole)


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _total(value: int) -> int:
    whole = torch.tensor(value)
    dist.all_reduce(whole)
    return int(whole)
