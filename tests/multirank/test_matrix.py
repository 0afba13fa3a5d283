"""Every layout into every other, with real processes and every kind of optimizer, bit for bit."""

from pathlib import Path

import pytest

import ranks
from multirank import matrix, wrapped
from multirank.matrix_layouts import LAYOUTS

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint per layout, named by its number."""
    root = tmp_path_factory.mktemp("sources")
    for size in sorted({layout.size for layout in LAYOUTS}):
        numbers = [number for number, layout in enumerate(LAYOUTS) if layout.size == size]
        ranks.world(size).run(matrix.save, str(root), numbers)
    return root


@pytest.mark.parametrize("target", range(len(LAYOUTS)), ids=map(repr, LAYOUTS))
def test_every_layout_restores_into_this_one(sources, target):
    """Users save on one cluster and resume on another: no bit differs, and training goes on as if never stopped."""
    assert set(ranks.world(LAYOUTS[target].size).run(matrix.load, str(sources), target)) == {len(LAYOUTS)}


def test_every_layout_loads_whole_on_one_process(sources):
    """Without a model at hand, a checkpoint of any layout is a dict of whole tensors."""
    matrix.load_whole(str(sources))


def test_wrappers_change_no_name(tmp_path):
    """torch.compile, DDP, FSDP2 and activation checkpointing, in any order: each restores what the others saved."""
    names = {"model.first.bias model.first.weight model.rest.0.bias model.rest.0.weight"}
    assert ranks.world(2).run(wrapped.every_wrapper_into_every_other, str(tmp_path)) == [names] * 2
