"""The options of saves and loads: what they may be."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypedDict

from shardckpt.errors import UsageError
from shardckpt.reports import LoadReport, SaveReport

Compression = Literal["zstd"] | tuple[Literal["zstd"], int] | None
Path = str | os.PathLike[str]
ShareReads = Literal["auto"] | bool
Overlap = Literal["step"] | None
OnSaveError = Literal["raise", "warn"]


class CheckpointerOptions(TypedDict, total=False):
    """What `shardckpt.Checkpointer` takes, for those who pass it on: editors and type checkers then know the names."""

    storage_options: Mapping[str, Any] | None
    compression: Compression
    replicated: bool | Sequence[str]
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    staging_limit: int | None
    overlap: Overlap
    timeout: float
    commit_timeout: float
    on_save_error: OnSaveError
    on_report: Callable[[SaveReport | LoadReport], None] | None
    share_reads: ShareReads


_DEFAULT_LEVEL: Final = 1
"""zstd's level where none is named: checkpoints are written often, and noise compresses no better at higher ones."""


@dataclass(frozen=True)
class SaveOptions:
    """What a save takes and how it is stored; see `shardckpt.Checkpointer` for each."""

    codec: tuple[str, int] | None
    replicated: bool | tuple[str, ...]
    include: tuple[str, ...] | None
    exclude: tuple[str, ...] | None
    overlap: Overlap

    @classmethod
    def of(
        cls,
        compression: Compression,
        replicated: bool | Sequence[str],
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        overlap: Overlap,
    ) -> "SaveOptions":
        """From what a caller passes. Raises UsageError that names the option, as do the functions below."""
        return cls(
            codec(compression),
            replicated if isinstance(replicated, bool) else patterns("replicated", replicated) or False,
            patterns("include", include),
            patterns("exclude", exclude),
            check_overlap(overlap),
        )


def path_text(path: Any) -> str:
    """``path`` as text."""
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(
            f"a path is text or an os.PathLike, not {type(path).__name__}. The order is save(state, path) and"
            " load(path, state)."
        )
    return os.fspath(path)


def codec(compression: Any) -> tuple[str, int] | None:
    """The codec and its level, or None."""
    if compression is None:
        return None
    match (compression, _DEFAULT_LEVEL) if isinstance(compression, str) else compression:
        case ("zstd", int(level)) if type(level) is int and 1 <= level <= 22:
            return "zstd", level
    raise UsageError(f"compression is None, 'zstd' or ('zstd', level from 1 to 22), not {compression!r}")


def share_reads(value: Any) -> ShareReads:
    """``value``, if it is "auto", True or False."""
    match value:
        case bool() | "auto":
            return value
    raise UsageError(f"share_reads is 'auto', True or False, not {value!r}")


def check_overlap(value: Any) -> Overlap:
    """``value``, if it is "step" or None."""
    match value:
        case None | "step":
            return value
    raise UsageError(f"overlap is 'step' or None, not {value!r}")


def on_save_error(value: Any) -> OnSaveError:
    """``value``, if it is "raise" or "warn"."""
    match value:
        case "raise":
            return "raise"
        case "warn":
            return "warn"
    raise UsageError(f"on_save_error is 'raise' or 'warn', not {value!r}")


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


def function(name: str, value: Any) -> Any:
    """``value``, if it can be called or is None."""
    if value is not None and not callable(value):
        raise UsageError(f"{name} is a function or None, not {value!r}")
    return value
