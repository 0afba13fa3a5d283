"""Which format a path holds, which it is to get, and whether there is room for it."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, get_args

from shardckpt import commit
from shardckpt.errors import CheckpointNotFoundError, ObjectNotFoundError, UsageError
from shardckpt.filenames import MANIFEST, is_checkpoint_file
from shardckpt.storage import join, local_path, open_storage, split
from shardckpt.tools.conversion.safetensors_files import SUFFIX, model_files

Format = Literal["shardckpt", "torch", "dcp", "safetensors"]
FORMATS: Final[tuple[Format, ...]] = get_args(Format)

_TORCH: Final = (".pt", ".pth", ".bin", ".ckpt", ".tar")


def source_format(path: str, local: str | None, storage_options: Mapping[str, Any] | None) -> Format:
    """What lies at a path. Raises CheckpointNotFoundError for nothing.

    ``local`` is where it lies on this machine; None for a storage, where files are known by their names.
    """
    if local is None:
        if commit.is_checkpoint(path, storage_options):
            return "shardckpt"
        names = [stat.name for stat in open_storage(path, storage_options).list()]
        return _by_suffix(path) or ("safetensors" if _are_a_model(names) else "shardckpt")
    if os.path.isfile(local):
        return "safetensors" if local.endswith(SUFFIX) else "torch"
    if not os.path.isdir(local):
        raise CheckpointNotFoundError(f"nothing is at {path}.")
    from shardckpt import dcp_directory  # imports DCP, which only this needs

    names = os.listdir(local)
    if MANIFEST not in names and dcp_directory.is_directory(local):
        return "dcp"
    return "safetensors" if _are_a_model(names) else "shardckpt"


def _are_a_model(names: Iterable[str]) -> bool:
    """Whether files are somebody's model: what a save of ours left unfinished has files of safetensors, too."""
    return any(name.endswith(SUFFIX) for name in names) and not any(map(is_checkpoint_file, names))


def target_format(path: str, source: Format, to: str | None) -> Format:
    """``to``, or what the name of the target says. Raises UsageError where it says nothing."""
    if to is not None:
        if to not in FORMATS:
            raise UsageError(f"there is no format {to!r}; there are {', '.join(FORMATS)}.")
        return to
    found = _by_suffix(path)
    if found == "safetensors" or (found == "torch" and source == "shardckpt"):
        return found
    if source != "shardckpt" and (found is None or path.endswith(".ckpt")):
        return "shardckpt"  # .ckpt is what Lightning calls a directory of ours
    if found is not None:
        return found
    raise UsageError(f"{path} does not say what is to be made of it: give a format (--to {'|'.join(FORMATS)}).")


def _by_suffix(path: str) -> Format | None:
    name = split(path)[1]
    if name.endswith(SUFFIX):
        return "safetensors"
    return "torch" if name.endswith(_TORCH) else None


def local_place(path: str) -> str | None:
    """Where a path is on this machine; None where it is on another."""
    local = local_path(commit.checkpoint_path(path))
    return None if local is None else os.path.expanduser(local)


def check_free(path: str, made: Format, storage_options: Mapping[str, Any] | None, *, overwrite: bool) -> None:
    """Raise UsageError where something lies at a path that may not be replaced, or not by this format."""
    local = local_place(path)
    into_directory = made == "safetensors" and not path.endswith(SUFFIX)
    if local is None and made == "dcp":
        raise UsageError(f"{path} is no local path, and DCP directories are written to those only.")
    if local is not None and made != "dcp" and os.path.lexists(local):
        is_file, wants_file = not os.path.isdir(local), made != "shardckpt" and not into_directory
        if is_file != wants_file:
            found, wanted = ("file", "directory") if is_file else ("directory", "file")
            raise UsageError(f"{path} is a {found}, and a {wanted} is to be written. Nothing was changed.")
    if not overwrite and (there := _there(path, local, made, storage_options, into_directory=into_directory)):
        raise UsageError(f"{there} is there already. Nothing was changed; overwrite (--overwrite) replaces it.")


def _there(
    path: str, local: str | None, made: Format, storage_options: Mapping[str, Any] | None, *, into_directory: bool
) -> str | None:
    if made == "shardckpt":
        return path if commit.is_checkpoint(path, storage_options) else None
    if into_directory:
        return next((join(path, name) for name in model_files(open_storage(path, storage_options))), None)
    if local is not None:
        return path if os.path.lexists(local) else None
    parent, name = split(path)
    try:
        open_storage(parent, storage_options).size(name)
    except ObjectNotFoundError:
        return None
    return path
