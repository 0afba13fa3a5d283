"""Exit codes: what a script can tell without reading what was printed. ``docs/cli.md`` has them for people."""

from enum import IntEnum

from shardckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ShardckptError,
    StorageError,
    TensorNotFoundError,
    UnsupportedFormatError,
    UsageError,
)


class ExitCode(IntEnum):
    """How a command ended. 2 is also typer's own, for arguments that it does not understand."""

    FINE = 0
    DIFFERENT = 1
    """`diff` alone: both were read, and they differ."""
    USAGE = 2
    NOT_FOUND = 3
    """There is no checkpoint: nothing, something else, or one that was never finished."""
    DAMAGED = 4
    NEWER = 5
    """Of a format, a codec or a dtype that this version of shardckpt or torch does not know."""
    STORAGE = 6
    """The storage refused: credentials, permissions, room, network."""
    FAILED = 7
    """Anything else that shardckpt says is wrong."""
    CLOSED = 141
    """Whoever read the output has gone, as ``head`` does."""


_CODES: tuple[tuple[type[ShardckptError], ExitCode], ...] = (
    (UsageError, ExitCode.USAGE),
    (TensorNotFoundError, ExitCode.USAGE),  # a name that somebody gave
    (CheckpointNotFoundError, ExitCode.NOT_FOUND),
    (UnsupportedFormatError, ExitCode.NEWER),
    (CorruptCheckpointError, ExitCode.DAMAGED),
    (StorageError, ExitCode.STORAGE),
)


def code_of(error: ShardckptError) -> ExitCode:
    """The exit code that stands for an error: that of its first class in the list above."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.FAILED)
