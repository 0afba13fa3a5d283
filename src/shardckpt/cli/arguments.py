"""Arguments that several commands take, and what they mean."""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import typer

CHECKPOINT = Annotated[str, typer.Argument(metavar="CKPT", help="A checkpoint: a local path or any fsspec URL.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")]
STORAGE_OPTIONS = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        "-o",
        metavar="KEY=VALUE",
        help="For the file system behind a URL; may be repeated. KEY may be dotted, KEY:=VALUE takes JSON.",
        show_default=False,
    ),
]
TARGET_STORAGE_OPTIONS = Annotated[
    list[str] | None,
    typer.Option(
        "--target-storage-option",
        metavar="KEY=VALUE",
        help="Those of TARGET, where it has others.",
        show_default=False,
    ),
]
INCLUDE = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="PATTERN", help="Only names like this; may be repeated.", show_default=False),
]
EXCLUDE = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="No names like this; may be repeated.", show_default=False),
]


def storage_options(given: Sequence[str] | None) -> dict[str, Any]:
    """``key=text``, ``key:=json`` and ``outer.inner=text`` as the dict that fsspec understands.

    Text stays text, though it look like a number: keys and secrets may. Raises typer.BadParameter.
    """
    found: dict[str, Any] = {}
    for item in given or ():
        name, equals, text = item.partition("=")
        value: Any = text
        if not equals or not name.rstrip(":"):
            raise typer.BadParameter("an option is KEY=VALUE or KEY:=JSON", param_hint="--storage-option")
        if name.endswith(":"):
            name = name[:-1]
            try:
                value = msgspec.json.decode(text)
            except msgspec.DecodeError as error:
                raise typer.BadParameter(f"{name}:= takes JSON: {error}", param_hint="--storage-option") from error
        *outer, last = name.split(".")
        place = found
        for key in outer:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise typer.BadParameter(f"{name} lies within {key}, which is no dict", param_hint="--storage-option")
        place[last] = value
    return found


def renames(given: Sequence[str] | None) -> dict[str, str]:
    """``REGEX=TEXT`` as regular expressions and what replaces them, in order; the last ``=`` divides.

    Raises typer.BadParameter.
    """
    found = {}
    for item in given or ():
        pattern, equals, text = item.rpartition("=")
        if not equals or not pattern:
            raise typer.BadParameter("a rename is REGEX=TEXT", param_hint="--rename")
        found[pattern] = text
    return found
