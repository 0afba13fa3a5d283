"""The options of a save: what they may be."""

import os
from typing import Any, Final, Literal

from shardckpt.errors import UsageError

Compression = Literal["zstd"] | tuple[Literal["zstd"], int] | None
Path = str | os.PathLike[str]

_DEFAULT_LEVEL: Final = 1
"""zstd's level where none is named: checkpoints are written often, and noise compresses no better at higher ones."""


def codec(compression: Any) -> tuple[str, int] | None:
    """The codec and its level, or None. Raises UsageError, as do the others."""
    if compression is None:
        return None
    match (compression, _DEFAULT_LEVEL) if isinstance(compression, str) else compression:
        case ("zstd", int(level)) if type(level) is int and 1 <= level <= 22:
            return "zstd", level
    raise UsageError(f"compression is None, 'zstd' or ('zstd', level from 1 to 22), not {compression!r}")


def positive(name: str, value: Any) -> Any:
    """``value``, if it is a number above zero."""
    if type(value) not in (int, float) or not value > 0:
        raise UsageError(f"{name} must be a positive number, not {value!r}")
    return value


def patterns(name: str, value: Any) -> tuple[str, ...]:
    """``value``, if it is a list of strings."""
    # A string is a sequence of strings too, and would be taken for patterns of one character.
    if isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value):
        raise UsageError(f"{name} takes a list of patterns, not {value!r}")
    return tuple(value)
