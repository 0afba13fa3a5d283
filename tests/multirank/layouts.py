"""What the ranks do in the tests of tensor layouts. Runs in the processes of `ranks`, never in pytest itself."""

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import shardckpt
from shardckpt.box import covers_exactly, slices
from shardckpt.state.leaves import local_tensor

SHAPES = ((8,), (7,), (3,), (4, 6), (5, 7), (1, 9), (6, 3, 5), (0, 4), ())
"""Even, uneven, fewer rows than ranks, and none."""


def whole(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)


def meshes() -> list[DeviceMesh]:
    size = dist.get_world_size()
    found = [init_device_mesh("cpu", (size,))]
    if size == 4:
        found.append(init_device_mesh("cpu", (2, 2)))
    return found


def placements(mesh: DeviceMesh, ndim: int) -> list[tuple[Placement, ...]]:
    """Every combination of Replicate and Shard of any dimension over a mesh, and the strided ones."""
    kinds: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(ndim))]
    found = list(itertools.product(kinds, repeat=mesh.ndim))
    if mesh.ndim == 1:
        found += [(_StridedShard(dim, split_factor=factor),) for dim in range(ndim) for factor in (2, 3)]
    else:
        found += [(_StridedShard(dim, split_factor=mesh.size(1)), Shard(dim)) for dim in range(ndim)]
    return found


def distributed(mesh: DeviceMesh, layout: tuple[Placement, ...], full: Tensor) -> DTensor:
    """A DTensor cut by torch's own code for each placement, one mesh dimension after the other."""
    if not any(isinstance(placement, _StridedShard) for placement in layout):
        return distribute_tensor(full, mesh, layout)
    local, coordinate = full, mesh.get_coordinate()
    for dim, placement in enumerate(layout):
        parts, _ = placement._split_tensor(local, mesh.size(dim), with_padding=False)
        local = parts[coordinate[dim]]
    return DTensor.from_local(local, mesh, layout, run_check=False, shape=full.shape, stride=full.stride())


def boxes_are_torchs_own(rank: int) -> int:
    """On every mesh, layout and shape: each view is the part of the whole tensor that its box says."""
    count = 0
    for mesh in meshes():
        for shape in SHAPES:
            full = whole(shape)
            for layout in placements(mesh, len(shape)):
                tensor = distributed(mesh, layout, full)
                leaf = local_tensor("x", tensor, split=False)
                assert leaf.shape == shape
                assert leaf.split
                for box, view in zip(leaf.boxes, leaf.views, strict=True):
                    assert view.shape == box.lengths
                    assert torch.equal(view, full[slices(box)]), (mesh, layout, shape, box)
                assert sum(box.volume for box in leaf.boxes) == tensor.to_local().numel(), (mesh, layout, shape)
                held: list[Any] = [None] * dist.get_world_size()
                if count % 7 == 0:  # a collective each; the check above already covers every layout
                    dist.all_gather_object(held, leaf.boxes)
                    distinct = {box for boxes in held for box in boxes}
                    assert covers_exactly(shape, sorted(distinct)).exact, (mesh, layout, shape)
                count += 1
    return count


def state(fill: bool) -> dict[str, Any]:
    """Every layout of this world, under names that say what they are not: so any world can restore them."""
    found: dict[str, Any] = {}
    mesh = meshes()[-1]
    for shape in SHAPES:
        for number, layout in enumerate(placements(mesh, len(shape))):
            full = whole(shape) + 100 * number
            tensor = distributed(mesh, layout, full if fill else torch.zeros_like(full))
            found[f"{'x'.join(map(str, shape))}-{number}"] = tensor
    return found


def save_layouts(rank: int, path: str) -> dict[str, list[float]]:
    shardckpt.save(state(fill=True), path)
    return {
        f"{'x'.join(map(str, shape))}-{number}": (whole(shape) + 100 * number).flatten().tolist()
        for shape in SHAPES
        for number in range(len(placements(meshes()[-1], len(shape))))
    }


def load_layouts(rank: int, path: str, expected: dict[str, list[float]]) -> int:
    """Into this world's own layouts, as far as the checkpoint has them by name."""
    live = {name: tensor for name, tensor in state(fill=False).items() if name in expected}
    shardckpt.load(path, live)
    for name, tensor in live.items():
        leaf = local_tensor(name, tensor, split=False)
        full = torch.tensor(expected[name]).view(leaf.shape)
        for box, view in zip(leaf.boxes, leaf.views, strict=True):
            assert torch.equal(view, full[slices(box)]), (name, tensor.placements)
    return len(live)


def partial_is_refused(rank: int, path: str) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    try:
        shardckpt.save({"sum": tensor}, path)
    except shardckpt.UnserialisableError as error:
        return str(error)
    return ""


def sub_mesh(rank: int, path: str) -> bool:
    """A tensor that lives on some ranks only is saved by those, and comes back to those."""
    mesh = DeviceMesh("cpu", [0, 1])
    full = whole((6, 2))

    def make(tensor: Tensor) -> DTensor:
        local = tensor.chunk(2)[rank] if rank < 2 else tensor.new_empty(0)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())

    shardckpt.save({"x": make(full), "n": rank}, path)
    live = {"x": make(torch.zeros(6, 2)), "n": -1}
    shardckpt.load(path, live)
    return rank >= 2 or bool(torch.equal(live["x"].to_local(), full.chunk(2)[rank]))


def sharded_tensor(rank: int, path: str) -> bool:
    """A ShardedTensor in two columns of blocks, one rank after the other; saved, and restored in place."""
    from torch.distributed._shard.sharded_tensor import Shard as LocalShard
    from torch.distributed._shard.sharded_tensor import ShardedTensor, init_from_local_shards
    from torch.distributed._shard.sharding_spec import ShardMetadata

    size = dist.get_world_size()
    full = whole((2 * size, 6))

    def make(tensor: Tensor) -> ShardedTensor:
        shards = []
        for column in (0, 2):
            offsets, sizes = [2 * rank, column], [2, 2 if column == 0 else 4]
            part = tensor[2 * rank : 2 * rank + 2, column : column + sizes[1]].clone()
            shards.append(LocalShard(part, ShardMetadata(offsets, sizes, f"rank:{rank}/cpu")))
        return init_from_local_shards(shards, *full.shape)

    shardckpt.save({"x": make(full)}, path)
    live = make(torch.zeros(full.shape))
    shardckpt.load(path, {"x": live})
    for shard in live.local_shards():
        (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        assert torch.equal(shard.tensor, full[row : row + rows, column : column + columns])
    return bool(torch.equal(shardckpt.load(path)["x"], full))


def fresh_optimizer_is_sharded_like_its_parameters(rank: int, path: str) -> bool:
    """State made for an optimizer that has none is a DTensor where its parameter is one, and read by parts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def make(seed: int) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        parameter = torch.nn.Parameter(distribute_tensor(torch.randn(5, 3), mesh, [Shard(0)]))
        return parameter, torch.optim.AdamW([parameter], foreach=False)

    parameter, optimizer = make(0)
    parameter.grad = distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)])
    optimizer.step()
    shardckpt.save({"p": parameter, "optimizer": optimizer}, path)
    other, restored = make(1)
    shardckpt.load(path, {"p": other, "optimizer": restored})
    ours, theirs = optimizer.state[parameter], restored.state[other]
    assert not isinstance(theirs["step"], DTensor)
    assert theirs["step"] == 1
    assert theirs["exp_avg"].placements == (Shard(0),)
    return bool(torch.equal(ours["exp_avg"].to_local(), theirs["exp_avg"].to_local()))


def names_like_boxes(rank: int, path: str) -> bool:
    """A tensor whose name is what a part of another one is called in a shard."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = whole((2, 3))
    state = {"x": distribute_tensor(full, mesh, [Shard(0)])}
    for name in ("x[0:1,0:3]", "x[1:2,0:3]"):
        state[name] = distribute_tensor(full * 10, mesh, [Replicate()])
    shardckpt.save(state, path)
    dist.barrier()
    loaded = shardckpt.load(path)
    dist.barrier()
    assert all(torch.equal(loaded[name], full if name == "x" else full * 10) for name in state)
    return len(loaded) == 3
