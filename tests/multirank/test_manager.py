"""`CheckpointManager` on several ranks: all see, keep and restore the same."""

from pathlib import Path

import pytest

import ranks
from multirank import manager_cases as cases

pytestmark = pytest.mark.multiprocess


def test_all_ranks_keep_and_restore_the_same(tmp_path: Path) -> None:
    """Ranks that looked for themselves could see different checkpoints, and train on from different steps."""
    root = str(tmp_path / "run")
    results = ranks.world(2).run(cases.keep_and_restore, root)
    assert results == [([1, 3, 4], f"{root}/step=1", 3, 3, [3.0] * 5)] * 2
    assert sorted(path.name for path in Path(root).iterdir()) == ["step=1", "step=3", "step=4"]
