"""The suites by name, in the order of ``--list``."""

import ast
from importlib import import_module
from pathlib import Path
from typing import cast

from benchmarks.options import Suite

NAMES = ("save", "stall", "load", "steps", "reshard", "small", "memory", "lightning", "s3", "s3_link")


def suite(name: str) -> Suite:
    return cast(Suite, import_module(f"benchmarks.suites.{name}"))


def description(name: str) -> str:
    """The first line of the suite's docstring, without importing what the suite needs."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
