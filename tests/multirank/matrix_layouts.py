"""Every way to lay a model over ranks, with values that follow from names alone. Runs in the processes of `ranks`.

The values are put into a bare model before it is wrapped, so that torch itself cuts them up; nothing here asks
shardckpt where a part belongs.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from lowest import CANNOT


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)


class Experts(nn.Module):
    """Three experts, so that neither two ranks nor four can share them evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 5, 7))


class Net(nn.Module):
    """Dimensions that two to four ranks divide and do not, fewer rows than ranks, buffers, a second dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.block = Block()
        self.experts = Experts()
        self.thin = nn.Linear(9, 1)
        self.low = nn.Linear(2, 7, dtype=torch.bfloat16)
        self.bn = nn.BatchNorm1d(6)


CHILDREN = ("embed", "block", "experts", "thin", "low", "bn")


def truth(name: str, like: Tensor) -> Tensor:
    """The value that follows from a name: normal noise, or for integers a number."""
    seed = zlib.crc32(name.encode())
    if not like.is_floating_point():
        return torch.full_like(like, seed % 1000)
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def bare(key: str, children: tuple[str, ...] = CHILDREN) -> nn.Module:
    """A model of the given children whose every tensor is `truth` of ``key`` and its name; empty key: all zeros."""
    model: nn.Module = Net()
    for child in CHILDREN:
        if child not in children:
            delattr(model, child)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(truth(f"{key}:{name}", tensor) if key else torch.zeros_like(tensor))
    return model


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[2 - len(shape) :])


def over(ranks: list[int]) -> DeviceMesh | None:
    """A mesh of some ranks, made on all of them; None on the others."""
    mesh = DeviceMesh("cpu", ranks)
    return mesh if dist.get_rank() in ranks else None


def shard_all(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for child in model.children():
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def place(model: nn.Module, mesh: DeviceMesh, placements: Callable[[Tensor], tuple[Placement, ...]]) -> nn.Module:
    """Every parameter a DTensor with the placements that it gets, cut by torch's code for each placement."""
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            layout = placements(parameter)
            setattr(module, name, nn.Parameter(cut(parameter.detach(), mesh, layout)))
    return model


def cut(full: Tensor, mesh: DeviceMesh, layout: tuple[Placement, ...]) -> DTensor:
    local, coordinate = full, mesh.get_coordinate()
    assert coordinate is not None
    for dim, placement in enumerate(layout):
        if not isinstance(placement, Replicate):
            local = placement._split_tensor(local, mesh.size(dim), with_padding=False)[0][coordinate[dim]]
    return DTensor.from_local(local.clone(), mesh, layout, run_check=False, shape=full.shape, stride=full.stride())


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {
        "embed": RowwiseParallel(),
        "block.up": ColwiseParallel(),
        "block.down": RowwiseParallel(),
        "block.norm": SequenceParallel(),
        "thin": RowwiseParallel(),
        "low": ColwiseParallel(),
    }
    return parallelize_module(model, mesh, {name: style for name, style in plan.items() if _has(model, name)})


def _has(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())


def one(key: str) -> nn.Module:
    return bare(key)


def ddp(key: str) -> nn.Module:
    return nn.parallel.DistributedDataParallel(bare(key))


def fsdp(key: str) -> nn.Module:
    return shard_all(bare(key), mesh_of(dist.get_world_size()))


def hsdp(*shape: int) -> Callable[[str], nn.Module]:
    return lambda key: shard_all(bare(key), mesh_of(*shape))


def tp(key: str) -> nn.Module:
    return tensor_parallel(bare(key), mesh_of(dist.get_world_size()))


def fsdp_tp(key: str) -> nn.Module:
    """Rows of what is sharded by columns already: `_StridedShard`."""
    mesh = mesh_of(2, 2)
    return shard_all(tensor_parallel(bare(key), mesh["inner"]), mesh["outer"])


def by_dim(dim: int) -> Callable[[str], nn.Module]:
    """Every parameter on one of its dimensions, as experts are on their first; its last where it has fewer."""
    return lambda key: place(
        bare(key), mesh_of(dist.get_world_size()), lambda parameter: (Shard(min(dim, parameter.dim() - 1)),)
    )


def crossed(key: str) -> nn.Module:
    """Two dimensions of one tensor over two of a mesh."""
    return place(bare(key), mesh_of(2, 2), lambda parameter: (Shard(parameter.dim() - 1), Shard(0)))


def strided(key: str) -> nn.Module:
    """Several boxes a rank: each of two halves is divided over all ranks."""
    return place(bare(key), mesh_of(dist.get_world_size()), lambda _: (_StridedShard(0, split_factor=2),))


def stage(key: str) -> nn.Module:
    """A pipeline: each rank has children that no other has."""
    return bare(key, CHILDREN[dist.get_rank() :: dist.get_world_size()])


def stages(wrap: Callable[[nn.Module, DeviceMesh], nn.Module]) -> Callable[[str], nn.Module]:
    """A pipeline of two stages, each on two ranks in another way."""

    def build(key: str) -> nn.Module:
        mesh = mesh_of(2, 2)
        return wrap(bare(key, CHILDREN[mesh.get_local_rank("outer") :: 2]), mesh["inner"])

    return build


def partial(key: str) -> nn.Module:
    """The last rank has no experts, which are sharded over the others; the rest is everywhere, each parameter whole."""
    mesh = over(list(range(dist.get_world_size() - 1)))
    model = bare(key, CHILDREN if mesh else tuple(child for child in CHILDREN if child != "experts"))
    if mesh:
        place(model.experts, mesh, lambda _: (Shard(0),))
    return model


class ShardedTensors(nn.Module):
    """What FSDP1 makes of a state dict: ShardedTensors by rows, the first ranks having more."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.found = {name: _by_rows(tensor) for name, tensor in bare(key).state_dict().items()}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.found


def _by_rows(tensor: Tensor) -> Any:
    if tensor.dim() == 0:
        return tensor
    rank, parts = dist.get_rank(), tensor.chunk(dist.get_world_size())
    if rank >= len(parts):
        return init_from_local_shards([], *tensor.shape)
    offsets = [sum(len(part) for part in parts[:rank]), *[0] * (tensor.dim() - 1)]
    metadata = ShardMetadata(offsets, list(parts[rank].shape), f"rank:{rank}/cpu")
    return init_from_local_shards([LocalShard(parts[rank].clone(), metadata)], *tensor.shape)


class Layout(NamedTuple):
    name: str
    size: int
    build: Callable[[str], nn.Module]

    @property
    def is_module(self) -> bool:
        return self.build is not ShardedTensors

    def __repr__(self) -> str:
        return f"{self.name}-{self.size}"


LAYOUTS: list[Layout] = [
    Layout("one", 1, one),
    *(Layout("ddp", size, ddp) for size in (2, 4)),
    *(Layout("fsdp", size, fsdp) for size in (1, 2, 3, 4)),
    Layout("hsdp 1x2", 2, hsdp(1, 2)),
    Layout("hsdp 3x1", 3, hsdp(3, 1)),
    Layout("hsdp 2x2", 4, hsdp(2, 2)),
    *(Layout("tp", size, tp) for size in (2, 3)),
    Layout("fsdp+tp", 4, fsdp_tp),
    Layout("dim 1", 2, by_dim(1)),
    Layout("dim 2", 4, by_dim(2)),
    Layout("two dims", 4, crossed),
    Layout("strided", 4, strided),
    Layout("pipeline", 2, stage),
    Layout("pipeline+ddp", 4, stages(lambda model, mesh: nn.parallel.DistributedDataParallel(model, device_mesh=mesh))),
    Layout("pipeline+fsdp", 4, stages(shard_all)),
    Layout("partial mesh", 3, partial),
    Layout("ShardedTensor", 4, ShardedTensors),
]
if CANNOT:  # this release's FSDP2 does not run here, and its strided shards are even ones
    LAYOUTS = [one for one in LAYOUTS if not any(kind in one.name for kind in ("fsdp", "hsdp", "strided"))]

# -- optimizers -------------------------------------------------------------------------------------------------------


class Factored(torch.optim.Optimizer):
    """Adafactor's kind of state: a row and a column for a matrix, unlike it in shape; a scalar tensor for a step."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] += 1
                if "row" in state:
                    # Of the sums that Adafactor takes here torch 2.13 has none for DTensors.
                    for key in ("row", "column"):
                        state[key].mul_(0.9).add_(0.1)
                    scale = state["row"].abs().mean() + state["column"].abs().mean()
                else:
                    scale = state["square"].mul_(0.9).add_(parameter.grad**2)
                parameter.add_(parameter.grad * scale, alpha=-group["lr"] / state["step"].item())


class Counted(torch.optim.Optimizer):
    """Momentum whose step is a Python number."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.5, 0.25)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] += 1
                state["average"].mul_(group["betas"][0]).add_(parameter.grad)
                parameter.add_(state["average"], alpha=-group["lr"] / state["step"])


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "foreach": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, betas=(0.5, 0.75), foreach=True),
    "fused": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, fused=True),
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr),
    "momentum": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.5),
    "factored": Factored,
    "counted": Counted,
}


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        yield name.removeprefix("module."), parameter


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """What torch's foreach and fused kernels can take together: plain tensors apart from DTensors, mesh by mesh."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{"params": parameters} for parameters in groups.values()]


def optimizers(model: nn.Module, lr: float) -> dict[str, torch.optim.Optimizer]:
    """One of each kind, all on the same parameters, and none with state yet."""
    return {kind: make(groups_of(model), lr) for kind, make in OPTIMIZERS.items()}


def fill(optimizer: torch.optim.Optimizer, kind: str, model: nn.Module, first: nn.Module, second: nn.Module) -> None:
    """State as after some steps, from two models laid out alike: other values for each kind of optimizer."""
    scale = 2.0 ** list(OPTIMIZERS).index(kind)  # a power of two changes no bit of the mantissa
    firsts, seconds = dict(named_parameters(first)), dict(named_parameters(second))
    for name, parameter in named_parameters(model):
        one, two = firsts[name].detach() * scale, (seconds[name].detach() * scale).abs()
        count = zlib.crc32(f"{kind}:{name}".encode()) % 1000 + 1
        step = torch.tensor(float(count))
        match kind:
            case "foreach" | "fused":
                optimizer.state[parameter] = {"step": step, "exp_avg": one, "exp_avg_sq": two}
            case "momentum":
                optimizer.state[parameter] = {"momentum_buffer": one}
            case "factored" if parameter.dim() == 2:
                row, column = (
                    truth(f"{kind}:{name}:{dim}", torch.empty(parameter.shape[dim], dtype=parameter.dtype))
                    for dim in (0, 1)
                )
                optimizer.state[parameter] = {
                    "step": step,
                    "row": _beside(parameter, row),
                    "column": _beside(parameter, column),
                }
            case "factored":
                optimizer.state[parameter] = {"step": step, "square": two}
            case "counted":
                optimizer.state[parameter] = {"step": count, "average": one}


def _beside(parameter: Tensor, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(value, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim, run_check=False)


def step(states: dict[str, torch.optim.Optimizer], model: nn.Module, gradients: nn.Module) -> None:
    """One step of each optimizer, with gradients that follow from names."""
    given = dict(named_parameters(gradients))
    for name, parameter in named_parameters(model):
        parameter.grad = given[name].detach()
    for optimizer in states.values():
        optimizer.step()
