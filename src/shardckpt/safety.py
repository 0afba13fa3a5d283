"""What is still safe when a load fails: whether anything has been changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shardckpt.errors import LoadFailedError, ShardckptError, first_line


@contextmanager
def telling(path: str, changed: Callable[[], bool]) -> Iterator[None]:
    """Have what is raised in a load of ``path`` say whether something may have been changed."""
    try:
        yield
    except Exception as error:
        raise _with_safety(error, path, changed=changed()) from error


def _with_safety(error: Exception, path: str, *, changed: bool) -> Exception:
    safety = (
        "The live state may be partly restored: load a checkpoint again before training on."
        if changed
        else "Nothing was changed."
    )
    if isinstance(error, ShardckptError):
        return type(error)(f"{error} {safety}")
    return LoadFailedError(f"the load of {path} failed: {type(error).__name__}: {error}. {safety}")


@contextmanager
def enough_memory(path: str) -> Iterator[None]:
    """Have a refusal of memory for what ``path`` holds, before anything is read, be a LoadFailedError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise LoadFailedError(
            f"{path}: no memory for what is to be restored: {first_line(error)}. Nothing was changed."
        ) from error
