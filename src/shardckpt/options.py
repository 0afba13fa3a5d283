"""The options of a save: what they may be."""

import os
from collections.abc import Mapping, Sequence
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


def mapping(name: str, value: Any) -> dict[str, Any]:
    """``value`` as a dict of its own; None is an empty one."""
    if value is not None and not isinstance(value, Mapping):
        raise UsageError(f"{name} is a dict or None, not {value!r}")
    return dict(value or {})


def positive(name: str, value: Any) -> Any:
    """``value``, if it is a number above zero."""
    if type(value) not in (int, float) or not value > 0:
        raise UsageError(f"{name} must be a positive number, not {value!r}")
    return value


def patterns(name: str, value: Any) -> tuple[str, ...] | None:
    """``value``, if it is None or a list of strings."""
    if value is None:
        return None
    # A string is a sequence of strings too, and would be taken for patterns of one character.
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{name} takes a list of patterns, not {value!r}")
    return tuple(value)


def replicated(value: Any) -> bool | tuple[str, ...]:
    """``value``, if it is true, false or a list of strings."""
    return value if isinstance(value, bool) else patterns("replicated", value) or False
