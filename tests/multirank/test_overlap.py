"""``overlap="step"`` over several ranks: one snapshot, and one verdict."""

from pathlib import Path

import pytest

import ranks
from multirank import overlap_cases, overlap_sharded_cases

pytestmark = pytest.mark.multiprocess


def test_every_rank_steps_after_its_own_copy(tmp_path: Path) -> None:
    """Parts that ranks copy at different times beside training make up the state at the call."""
    for told in ranks.world(2).run(overlap_cases.step_while_copying, str(tmp_path), None):
        assert told == {"staged": False, "error": None, "stalled": True, "same": True}


def test_a_copy_that_breaks_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    """No rank's step hangs, and all are told why there is no checkpoint."""
    for told in ranks.world(2).run(overlap_cases.step_while_copying, str(tmp_path), 1):
        assert "the copy broke" in told["error"]
    assert not (tmp_path / "ck" / "manifest.json").exists()


@pytest.mark.parametrize("layout", ["fsdp2", "tensor parallel"])
@pytest.mark.parametrize("how", ["plain", "foreach", "fused", "accumulated", "skipped"])
def test_a_sharded_snapshot_is_the_state_at_the_call(tmp_path: Path, layout: str, how: str) -> None:
    """Under FSDP2 and tensor parallelism forward and backward run beside the copy too, and the step waits for it."""
    for told in ranks.world(2).run(overlap_sharded_cases.step_while_copying, str(tmp_path), layout, how):
        assert told == {"staged": False, "asked": True, "errors": [], "same": True, "changed": True}


@pytest.mark.parametrize("layout", ["fsdp2", "tensor parallel"])
@pytest.mark.parametrize("what", ["parameter", "local", "state"])
def test_a_change_of_a_shard_that_is_no_step_fails_the_save(tmp_path: Path, layout: str, what: str) -> None:
    """On one rank or all, through the DTensor or its local part: no checkpoint may be a mixture, and all are told."""
    told = ranks.world(2).run(overlap_sharded_cases.change_while_copying, str(tmp_path), layout, what)
    # Rank 1 may still be writing when rank 0 clears up after a failure of its own, and then tells of that.
    assert "wait_until_staged" in told[0]
    assert all("left no checkpoint behind" in text for text in told)
