"""The floors of the library: a module imports only from floors below its own.

CONTRIBUTING.md describes the floors. This is their contract: who breaks it, or adds a module without giving it a floor,
is told here, by module and line.
"""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import shardckpt

PACKAGE = Path(shardckpt.__file__).parent

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "box", "workers", "reports", "filenames", "garbage", "progress"}),
    frozenset(
        {
            "launch",
            "storage",
            "codecs",
            "safetensors_format",
            "sharing",
            "manifest",
            "wordstore",
            "background",
            "options",
            "indexing",
            "relocation",
            "retention",
            "safety",
        }
    ),
    frozenset({"state", "planner", "coordinator", "dcp_directory"}),
    frozenset({"staging"}),
    frozenset({"writer", "reader"}),
    frozenset({"commit"}),
    frozenset({"saving", "loading"}),
    frozenset({"checkpointer"}),
    frozenset({"api", "lightning", "manager", "tools"}),
    frozenset({"cli"}),
)
"""Module or sub-package names, lowest floor first. Modules of one sub-package may import each other."""


IMPORTED_LATE = {("lightning.fabric", "lightning.plugin"), ("lightning.model_checkpoint", "lightning.plugin")}
"""What the plugin installs into Lightning when one is made looks for the plugin of a Trainer, by its class."""


class Import(NamedTuple):
    """One module importing another, both as names below ``shardckpt``; the package itself is ``""``."""

    importer: str
    line: int
    imported: str


def floor_of(name: str) -> int:
    unit = name.split(".", maxsplit=1)[0]
    found = [floor for floor, units in enumerate(FLOORS) if unit in units]
    assert found, f"{unit} has no floor"
    return found[0]


def units() -> set[str]:
    """The modules and sub-packages directly in the package, without the package's own files."""
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return {name for name in found if not name.startswith("__")}


def test_contributing_shows_the_same_floors() -> None:
    """The table that people read says what is enforced."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| ((?:`\w+`(?:, )?)+) \|", text, flags=re.MULTILINE)
    assert {(int(floor), unit) for floor, cell in rows for unit in re.findall(r"`(\w+)`", cell)} == {
        (floor, unit) for floor, units in enumerate(FLOORS) for unit in units
    }


def modules() -> set[str]:
    """Every module and sub-package, by its dotted name below the package."""
    paths = [path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")]
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in paths} - {""}


def imports() -> Iterator[Import]:
    """Every import of a module of ours by another: at the top, in a function, or under ``TYPE_CHECKING``."""
    known = modules()
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        importer = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative imports hide which floor is meant"
                # `from shardckpt import errors` imports a module, `from shardckpt import save` the package.
                within = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name.removeprefix("shardckpt.") in known else node.module or "" for name in within]
            else:
                continue
            for name in dict.fromkeys(names):
                if name == "shardckpt" or name.startswith("shardckpt."):
                    yield Import(importer, node.lineno, name.removeprefix("shardckpt").removeprefix("."))


def test_every_module_has_a_floor() -> None:
    """A new module cannot slip in beside the floors, and the table names no module that is gone."""
    placed = {unit for floor in FLOORS for unit in floor}
    assert units() == placed, "give every module a floor, here and in CONTRIBUTING.md"
    assert sum(len(floor) for floor in FLOORS) == len(placed), "a module stands on two floors"


def test_imports_go_down() -> None:
    """Cycles and upward imports cannot creep in: with them no floor can be tested or replaced alone."""
    wrong = [
        f"{importer}:{line} imports {imported or 'the package itself'}"
        for importer, line, imported in imports()
        if importer  # the package's own __init__ stands above all floors
        and importer.split(".")[0] != imported.split(".")[0]
        and (not imported or floor_of(imported) >= floor_of(importer))
    ]
    assert wrong == []


def test_modules_of_a_package_import_in_one_direction() -> None:
    """Within a package too data flows one way: of two modules that need each other neither can be read alone."""
    needs: dict[str, set[str]] = {}
    for importer, _, imported in imports():
        if importer != imported and (importer, imported) not in IMPORTED_LATE:
            needs.setdefault(importer, set()).add(imported)
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle


def test_the_lowest_floors_need_no_torch() -> None:
    """Boxes and manifests are read by tools that have no torch; planning stays pure arithmetic."""
    for unit in ("errors", "box", "manifest", "planner"):
        files = [*PACKAGE.glob(f"{unit}.py"), *PACKAGE.glob(f"{unit}/*.py")]
        nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
        assert nodes, f"{unit} is gone"
        modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {name for name in modules if name.split(".")[0] == "torch"}, f"{unit} imports torch"
