"""An independent oracle: what PyTorch's own distributed checkpoints restore, we restore."""

from pathlib import Path

import pytest

import ranks
from lowest import CANNOT
from multirank import oracle
from multirank.matrix_layouts import LAYOUTS

pytestmark = pytest.mark.multiprocess

SOURCES: tuple[str, ...] = ("ddp-2", "fsdp-3", "hsdp 2x2-4", "fsdp+tp-4", "dim 2-4", "two dims-4")
TARGETS: tuple[str, ...] = ("one-1", "fsdp-2", "tp-2", "hsdp 3x1-3", "fsdp+tp-4")
NUMBERS = {repr(layout): number for number, layout in enumerate(LAYOUTS)}
if CANNOT:  # some of the layouts
    SOURCES, TARGETS = (tuple(name for name in names if name in NUMBERS) for names in (SOURCES, TARGETS))


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of DCP's and one of ours per source."""
    root = tmp_path_factory.mktemp("oracle")
    for size in (2, 3, 4):
        numbers = [NUMBERS[name] for name in SOURCES if LAYOUTS[NUMBERS[name]].size == size]
        ranks.world(size).run(oracle.save, str(root), numbers)
    return root


@pytest.mark.parametrize("target", TARGETS)
def test_what_dcp_restores_we_restore(saved_twice, target):
    """Model and optimizer, from one layout into another: every local bit is the one that DCP puts there."""
    number = NUMBERS[target]
    sources = [NUMBERS[name] for name in SOURCES]
    assert min(ranks.world(LAYOUTS[number].size).run(oracle.load, str(saved_twice), number, sources)) > 100
