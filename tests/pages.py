"""The blocks of code in the documentation, and running them."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """Those of a page of ``docs``, or of the README, in order."""
    path = DOCS.parent / page if page == "README.md" else DOCS / page
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_python(page: str, names: dict[str, object], **instead: str) -> None:
    """Run the blocks of a page one after the other, with ``instead`` of some words others."""
    found = blocks(page, "python")
    assert found
    for block in found:
        for word, other in instead.items():
            block = block.replace(word, other)
        exec(compile(block, f"{page}: {block.splitlines()[0]}", "exec"), names)
