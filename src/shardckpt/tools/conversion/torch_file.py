"""One file of ``torch.save``: a model's state dict, a training script's own, a ``.ckpt`` of stock Lightning."""

import errno
import pickle
from typing import IO, Any, cast

import torch

from shardckpt.errors import CorruptCheckpointError, LoadFailedError, UnsafeLoadError, first_line
from shardckpt.storage.translate import translating
from shardckpt.tools.conversion.output import Output


def read(path: str, *, weights_only: bool) -> Any:
    """What is in a local file; its tensors are mapped, and read when they are looked at.

    A file in torch's old format, which cannot be mapped, is read into memory. Raises UnsafeLoadError where something
    in it would have to be unpickled and ``weights_only`` forbids that, LoadFailedError where its code is not here, and
    CorruptCheckpointError for what is no such file.
    """
    with translating("read", path):
        try:
            mapped = _is_zip(path)
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=weights_only)
        except pickle.UnpicklingError as error:
            if not weights_only or "weights_only" not in str(error).lower():
                raise _damaged(path, error) from error
            raise UnsafeLoadError(
                f"{path} holds pickled objects, and to unpickle them runs code. If you trust whoever wrote it, pass"
                f" weights_only=False (--no-weights-only). Nothing was changed. ({first_line(error)})"
            ) from error
        except (AttributeError, ImportError) as error:
            if weights_only:
                raise _damaged(path, error) from error
            raise LoadFailedError(
                f"{path} holds pickled objects that need code which is not here: {error}. Nothing was changed; make"
                " that code importable (PYTHONPATH)."
            ) from error
        except Exception as error:  # what a damaged file does to its reader; EINVAL: its end is missing
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path} is damaged, or no file of torch.save: {type(error).__name__}: {first_line(error)}"
    )


def _is_zip(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def write(state: Any, output: Output) -> None:
    """Write ``state`` as ``torch.save`` does, a tensor after the other."""
    torch.save(state, cast("IO[bytes]", output))
