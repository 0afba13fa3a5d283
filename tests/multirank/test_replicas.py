"""Who writes what several ranks hold: equal data once and evenly, what may differ whole, and nothing mixed."""

import pytest

import ranks
from multirank import replicas

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize(
    ("size", "shape"), [(2, None), (3, None), (4, None), (4, (2, 2)), (2, (2, 1)), (2, (1, 2)), (3, (3, 1))]
)
def test_replicas_share_the_writing(tmp_path, size, shape):
    """Data is written once, and by no rank more than its fair part and 1 MiB: under DDP and on a mesh's replicas."""
    told = ranks.world(size).run(replicas.write_replicated, str(tmp_path / "ck"), shape)
    nbytes = 2 * sum(p.numel() * 4 for p in replicas.big().parameters())
    headers = size * (16 << 10)
    assert nbytes <= sum(one["written"] for one in told) == told[0]["all"] <= nbytes + headers
    assert max(one["written"] for one in told) <= (nbytes + headers) / size + replicas.MIB
    assert replicas.whole_is(str(tmp_path / "ck"))


@pytest.mark.parametrize("kind", ("ddp", "fsdp", "not on rank 0"))
def test_buffers_that_differ_come_whole_from_the_lowest_rank(tmp_path, kind):
    """Statistics that drift apart by rank must be one rank's, never a mixture that no rank ever had."""
    lowest = 1.0 if kind == "not on rank 0" else 0.0
    for told in ranks.world(3).run(replicas.buffers_that_differ, str(tmp_path / "ck"), kind):
        assert told == {"seen": [lowest], "norm.running_mean": [lowest]}


def test_buffers_that_are_declared_equal_are_shared(tmp_path):
    """``replicated=`` is believed: only what its patterns name is split."""
    told = ranks.world(3).run(replicas.buffers_that_differ, str(tmp_path / "ck"), "declared")[0]
    assert told == {"seen": [0.0, 1.0, 2.0], "norm.running_mean": [0.0]}


@pytest.mark.parametrize(("size", "rows", "columns"), [(2, 8, 6), (3, 7, 6), (4, 3, 6), (2, 2, 1), (3, 2, 1)])
def test_local_state_of_a_sharded_parameter_is_sharded(tmp_path, size, rows, columns):
    """An optimizer that works on ``to_local()`` has different state on each rank: none of it may be lost."""
    assert all(ranks.world(size).run(replicas.local_state, str(tmp_path / "ck"), rows, columns))


def test_state_that_nothing_explains_is_refused(tmp_path):
    """Storing one rank's vector for all would lose the others' without a word; declared equal, it is stored."""
    for failed in ranks.world(2).outcomes(replicas.unknown_state, str(tmp_path / "ck")):
        assert failed.kind == "UnserialisableError"
        assert "optimizer.state.param_groups.0.0.column" in failed.text
        assert "replicated=" in failed.text
    assert not (tmp_path / "ck").exists()
    told = ranks.world(2).run(replicas.unknown_state, str(tmp_path / "ck"), replicated=["*.column"])
    assert told == [[4.0] * 6] * 2


def test_sparse_tensors_come_whole_from_the_lowest_rank(tmp_path):
    """Indices of one rank with the values of another would be a third tensor."""
    expected = [[1.0 if (row < 2 and column == 0) else 0.0 for column in range(4)] for row in range(4)]
    assert ranks.world(2).run(replicas.sparse_parts, str(tmp_path / "ck"), [2, 2]) == [expected] * 2


def test_sparse_tensors_of_other_lengths_conflict(tmp_path):
    """Where ranks have other numbers of entries, the error names the part and both sides."""
    for failed in ranks.world(2).outcomes(replicas.sparse_parts, str(tmp_path / "ck"), [2, 3]):
        assert failed.kind == "ConflictingStateError"
        assert "'table.indices' has shape (2, 2) on rank 0, but (2, 3) on rank 1" in failed.text
