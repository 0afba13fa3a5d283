"""What the documentation shows is run, so that it stays true."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ("async.md", "manager.md", "partial.md"))
def test_the_examples_of_a_page_run(page, tmp_path):
    """A reader may paste the blocks of a page one after the other; ``path`` is theirs to choose."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    names = {"path": str(tmp_path / "ck"), "__name__": page}
    for block in blocks:
        exec(compile(block, f"{page}: {block.splitlines()[0]}", "exec"), names)
