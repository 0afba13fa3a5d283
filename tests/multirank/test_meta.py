"""Sharded models on the meta device, filled with real gloo processes."""

import pytest
import torch

import ranks
from multirank import cases, meta_cases

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A checkpoint of a DDP job of 2, and the digest of what was saved."""
    path = str(tmp_path_factory.mktemp("written") / "ck")
    return path, ranks.world(2).run(cases.save_ddp, path, "save")[0]["digest"]


@pytest.mark.parametrize("model_first", (True, False))
def test_a_meta_model_under_fully_shard_is_filled(written, model_first):
    """No rank ever has the whole model: each gets its shards, ties and identities stay, and training goes on."""
    path, digest = written
    results = ranks.world(2).run(meta_cases.load_meta_fsdp, path, model_first)
    for result in results:
        assert result["digest"] == digest
        assert result["same"]
        assert result["left"] == []
    assert results[0]["stepped"] == results[1]["stepped"] != digest


def test_training_goes_on_as_without_meta(written):
    """After a step, a model that was filled on meta and sharded is the one that was neither."""
    path, digest = written
    expected = ranks.world(1).run(meta_cases.load_and_step, path)[0]
    assert expected["digest"] == digest
    for weights in ranks.world(2).run(meta_cases.weights_after_a_step, path):
        for ours, theirs in zip(weights, expected["weights"], strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", (8192, 3))
def test_each_rank_reads_its_rows_only(tmp_path, rows):
    """Memory and bytes are those of the shard, uneven ones too."""
    for nbytes, right in ranks.world(2).run(meta_cases.reads_its_own_rows, str(tmp_path / "ck"), rows):
        assert right
        assert nbytes <= rows * 1024 * 4 // 2 + (64 << 10)


def test_a_difference_on_one_rank_leaves_all_on_meta(written):
    """One verdict for all ranks, before any of them has changed anything."""
    for told in ranks.world(2).run(meta_cases.missing_on_one_rank, written[0]):
        assert "extra" in told
