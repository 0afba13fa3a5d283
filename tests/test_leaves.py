"""What one rank holds of a tensor: boxes as torch itself cuts them, on real ranks and every kind of layout."""

import pytest
import torch

import ranks
import shardckpt
from multirank import layouts
from shardckpt.box import Box
from shardckpt.state import leaves
from shardckpt.state.leaves import local_tensor, memory_key, overlaps_itself


def test_a_plain_tensor_is_one_box():
    """A tensor without a mesh is held whole; one without elements is held by nobody."""
    leaf = local_tensor("x", torch.zeros(2, 3), split=False)
    assert leaf.boxes == (Box((0, 0), (2, 3)),)
    assert not leaf.split
    assert leaf.location == "cpu"
    assert local_tensor("x", torch.zeros(()), split=True).boxes == (Box((), ()),)
    assert local_tensor("x", torch.zeros(3, 0), split=False).boxes == ()


def test_memory_keys_tell_views_apart():
    """Equal keys are one view of one memory, and nothing else is."""
    x = torch.zeros(4, 4, dtype=torch.complex64)
    same = [x, x.detach(), x.view(4, 4), torch.nn.Parameter(x)]
    assert len({memory_key(tensor) for tensor in same}) == 1
    others = [x.t(), x[:2], x.view(16), x.conj(), x.clone(), x.view(torch.float32), x.real, x.conj().imag]
    assert len({memory_key(tensor) for tensor in [x, *others]}) == 1 + len(others)
    assert memory_key(x[:0]) is None
    assert memory_key(torch.empty(3, device="meta")) is None


def test_elements_that_share_memory():
    """An expanded tensor overlaps itself; a strided or one-element one does not."""
    assert overlaps_itself(torch.zeros(3, 1).expand(3, 2))
    assert not overlaps_itself(torch.zeros(1).expand(1))
    assert not overlaps_itself(torch.zeros(4, 4)[::2].t())


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", (2, 4))
def test_boxes_are_those_that_torch_cuts(size):
    """Shard, _StridedShard and Replicate of any dimension, even and uneven, on 1-D and 2-D meshes."""
    assert min(ranks.world(size).run(layouts.boxes_are_torchs_own)) > 30


@pytest.mark.multiprocess
@pytest.mark.parametrize(("source", "target"), [(2, 4), (4, 2)])
def test_every_layout_restores_into_every_other(tmp_path, source, target):
    """What one world saved in its layouts fills the layouts of another, and loads whole on one process."""
    path = str(tmp_path / "ck")
    expected = ranks.world(source).run(layouts.save_layouts, path)[0]
    assert min(ranks.world(target).run(layouts.load_layouts, path, expected)) > 20
    for name, tensor in shardckpt.load(path).items():
        assert tensor.flatten().tolist() == expected[name], name


@pytest.mark.multiprocess
def test_partial_is_refused_with_the_reason(tmp_path):
    """A sum that has not been reduced has no value yet; the message says what to do."""
    for told in ranks.world(2).run(layouts.partial_is_refused, str(tmp_path / "ck")):
        assert "'sum'" in told
        assert "redistribute" in told
    assert not (tmp_path / "ck").exists()


@pytest.mark.multiprocess
def test_a_tensor_on_some_ranks_only(tmp_path):
    """A DTensor on a part of the world is stored by that part."""
    assert all(ranks.world(4).run(layouts.sub_mesh, str(tmp_path / "ck")))
    assert shardckpt.load(tmp_path / "ck")["x"].flatten().tolist() == list(range(1, 13))


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", (2, 4))
def test_sharded_tensors(tmp_path, size):
    """A ShardedTensor's shards are its boxes."""
    assert all(ranks.world(size).run(layouts.sharded_tensor, str(tmp_path / "ck")))


@pytest.mark.multiprocess
def test_a_fresh_optimizer_is_sharded_like_its_parameters(tmp_path):
    """Optimizer state is never made whole on a rank that holds a part."""
    assert all(ranks.world(2).run(layouts.fresh_optimizer_is_sharded_like_its_parameters, str(tmp_path / "ck")))


@pytest.mark.multiprocess
def test_names_that_look_like_boxes(tmp_path):
    """No name makes two entries of a shard one."""
    assert all(ranks.world(2).run(layouts.names_like_boxes, str(tmp_path / "ck")))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_ordinary_tensors_are_said_alike_by_the_quick_way_and_by_the_long_one(shape, dtype, monkeypatch):
    """The quick way is for most tensors of most states: what it left out would be missing from their checkpoints."""
    tensor = torch.zeros(shape, dtype=dtype).t() if len(shape) == 2 else torch.zeros(shape, dtype=dtype)
    assert leaves.ordinary(tensor) is not None
    quick = local_tensor("t", tensor, split=True)
    monkeypatch.setattr(leaves, "ordinary", lambda _: None)
    slow = local_tensor("t", tensor, split=True)
    assert quick[:4] == slow[:4]
    assert quick[5:] == slow[5:]
    assert [view.data_ptr() for view in quick.views] == [view.data_ptr() for view in slow.views]


def test_what_is_not_ordinary_takes_the_long_way():
    """Such tensors are sparse, of a class of their own, or have no data."""

    class Special(torch.Tensor):
        pass

    others = [
        torch.zeros(2, device="meta"),
        torch.zeros(2).to_sparse(),
        torch.zeros(2).as_subclass(Special),
    ]
    assert [leaves.ordinary(tensor) for tensor in others] == [None] * len(others)
