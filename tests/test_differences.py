"""What ranks find separately becomes one verdict: nothing is lost, and nobody lacks what is another's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import ConflictingStateError
from shardckpt.state import meshes
from shardckpt.state.differences import Differences, together

NAMES = ("a", "a.b", "a.b.c", "d", "d.e")
subsets = st.lists(st.sampled_from(NAMES), unique=True)


def test_what_any_rank_has_a_place_for_is_expected():
    """A pipeline's stages each lack what the others restore."""
    first = Differences(unexpected=["model.1.w", "model.gone"])
    second = Differences(unexpected=["model.0.w", "model.gone"])
    verdict, own = together([first, second], 1)
    assert verdict.unexpected == own.unexpected == ["model.gone"]


def test_a_rank_that_lacks_a_container_has_not_looked_into_it():
    """It must not vouch for names that it has never seen."""
    inside = Differences(unexpected=["model.gone"])
    for outside in (Differences(skipped=["model"]), Differences(unexpected=["model"])):
        verdict, _ = together([inside, outside], 0)
        assert "model.gone" in verdict.unexpected
    assert together([inside, Differences(skipped=["mode"])], 0)[0].unexpected == []


def test_a_line_says_on_which_ranks_it_holds():
    """Whoever reads the error on rank 0 is told where to look."""
    ranks = [Differences(missing=["w"]), Differences(missing=["w"], mismatched=["b: two"]), Differences(missing=["w"])]
    verdict, own = together(ranks, 0)
    assert verdict.missing == ["w"]
    assert verdict.mismatched == ["b: two (on rank 1)"]
    assert own.mismatched == []


@given(st.lists(st.tuples(subsets, subsets), min_size=1, max_size=4))
def test_every_rank_comes_to_the_same_verdict(found):
    """All raise, or none does; one rank alone has the verdict that it always had."""
    ranks = [Differences(unexpected=list(unexpected), mismatched=list(bad)) for unexpected, bad in found]
    verdicts = [together(ranks, rank)[0] for rank in range(len(ranks))]
    assert all(verdict == verdicts[0] for verdict in verdicts)
    assert bool(verdicts[0].mismatched) == any(bad for _, bad in found)
    if len(ranks) == 1:
        assert verdicts[0] == ranks[0]


def test_meshes_are_compared_where_they_differ_only():
    """Equal layouts cost one digest; a rank without a tensor is no conflict, one with another layout is."""
    assert not meshes.may_differ([[([0, 1], "x")], [([0, 1], "x")], []])
    assert meshes.may_differ([[([0, 1], "x")], [([0, 1], "y")]])
    assert meshes.may_differ([[([0, 1], "x")], []])
    assert not meshes.may_differ([[([0, 1], "x")]])  # of a rank that is not in this job nothing is known
    by_rank = [meshes.Meshes(), meshes.Meshes()]
    by_rank[0]._layouts["w"] = ("[0, 1]", "Shard(0)")
    meshes.check([one.encode() for one in by_rank])
    by_rank[1]._layouts["w"] = ("[0, 1]", "Shard(1)")
    with pytest.raises(ConflictingStateError, match=r"'w'.*Shard\(0\).*rank 0.*Shard\(1\).*rank 1"):
        meshes.check([one.encode() for one in by_rank])
    plain = meshes.Meshes()
    plain.add("plain", torch.ones(2))
    assert plain.digests() == []
