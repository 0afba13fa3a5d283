"""Where output goes and how it looks: 80 columns on a terminal, a row a line in a pipe, JSON for programs."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from shardckpt.cli.codes import ExitCode
from shardckpt.errors import StorageError

Meter = Callable[[int, int], None]
"""Hears of bytes done, and of all bytes."""

_PIPE_WIDTH = 100_000


def show(*parts: Text | str | Table | Tree) -> None:
    """Print to standard output, with names as they are: brackets are no markup.

    In a pipe nothing is wrapped or cut, so that each row is one line, and nothing is coloured.
    """
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    screen = Console(highlight=False, width=None if is_terminal else _PIPE_WIDTH)
    with screen.capture() as capture:
        for part in parts:
            screen.print(Text(printable(part)) if isinstance(part, str) else part)
    # Tables fill their last column with blanks.
    text = capture.get()
    _print(text if is_terminal else "\n".join(line.rstrip() for line in text.split("\n")))


def show_json(value: Any) -> None:
    """Print a value, dataclasses too, as indented JSON; floats that are not finite are null."""
    try:
        data = msgspec.json.encode(value)
    except UnicodeEncodeError:  # names of files may be any bytes
        data = msgspec.json.encode(_encodable(msgspec.to_builtins(value)))
    _print(msgspec.json.format(data, indent=2).decode() + "\n")


def _print(text: str) -> None:
    """Raises StorageError where it cannot be written; a reader that has gone ends the program as a signal would."""
    try:
        typer.echo(text, nl=False)
        sys.stdout.flush()
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at the end fails again
        raise typer.Exit(ExitCode.CLOSED) from error
    except (OSError, AttributeError) as error:  # sys.stdout is None where it was closed
        sys.stdout = None  # or flushing at the end fails again
        raise StorageError(f"cannot print: {error}") from error


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list) else value


def printable(text: str) -> str:
    """Text on one line that does nothing to a terminal: names come from checkpoints, which may be anybody's."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def complain(message: str) -> None:
    """Say what is wrong, on standard error."""
    typer.echo(f"shardckpt: {message}", err=True)


def table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """A table without lines; ``numbers`` are aligned to the right and never wrapped."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        is_number = name in numbers
        made.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return made


def row(made: Table, *cells: Any) -> None:
    """Add cells as they are; None is a dash."""
    made.add_row(
        *(cell if isinstance(cell, Text) else Text("-" if cell is None else printable(str(cell))) for cell in cells)
    )


@contextmanager
def meter(what: str) -> Iterator[Meter]:
    """A bar on standard error while something is read or written; nothing where that is no terminal."""
    screen = Console(stderr=True)
    if not screen.is_terminal:  # where older releases of rich print an empty line, though the bar is disabled
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def ago(seconds: float | None) -> str | None:
    """An age for people, in its largest unit."""
    if seconds is None:
        return None
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def number(value: float | None) -> str | None:
    """A figure in at most ten characters or so; integers whole."""
    return None if value is None else f"{value:.4g}" if type(value) is float else str(value)


def shorten(text: str, width: int) -> str:
    """Text of at most ``width`` characters."""
    return text if len(text) <= width else f"{text[: width - 3]}..."
