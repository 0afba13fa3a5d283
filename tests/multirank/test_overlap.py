"""``overlap="step"`` over several ranks: one snapshot, and one verdict."""

from pathlib import Path

import pytest

import ranks
from multirank import overlap_cases

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
