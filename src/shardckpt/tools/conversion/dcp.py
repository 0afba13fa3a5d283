"""Directories of ``torch.distributed.checkpoint``, and those of Lightning's FSDP and ModelParallel strategies."""

import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver as saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from shardckpt.dcp_directory import FAILURES, Directory, met_by
from shardckpt.errors import SaveFailedError, UsageError, first_line
from shardckpt.storage import temporary_name
from shardckpt.storage.translate import translating

_LIGHTNING: Final = "pytorch-lightning_version"
"""By this key Lightning knows a Trainer's checkpoint."""


def read(path: str, empty: Callable[..., Tensor], *, weights_only: bool) -> dict[str, Any]:
    """What is in a local directory, tensors in room that ``empty`` makes; plain DCP's as the nested dict that it was.

    A Trainer's has the keys of a file of stock Lightning: ``state_dict`` and ``optimizer_states`` in place of what its
    strategy called them. An optimizer's state stays keyed by parameter names, in the order in which torch loads it.
    """
    directory = Directory(path, "cpu", weights_only)
    found = directory.extra
    sources = {source: _with_ids(directory.value(source, empty=empty)) for source in directory.sources}
    if _LIGHTNING not in found:
        return found | sources
    optimizers = [name for name in sources if name.startswith("optimizer_") and name[10:].isdecimal()]
    for name in ("model", "state_dict"):  # FSDP's name for it, and ModelParallel's
        if name in sources:
            found["state_dict"] = sources.pop(name)
    if optimizers or "lr_schedulers" in found:
        states = [sources.pop(name) for name in sorted(optimizers, key=lambda name: int(name[10:]))]
        found["optimizer_states"] = states
    return found | sources


def _with_ids(value: Any) -> Any:
    """``value`` with the parameters of optimizers numbered as they were: DCP makes text of all keys of dicts."""
    if isinstance(value, list):
        return [_with_ids(item) for item in value]
    if not isinstance(value, dict):
        return value
    groups, state = value.get("param_groups"), value.get("state")
    if isinstance(groups, list) and isinstance(state, dict):
        named = [
            group["params"] for group in groups if isinstance(group, dict) and isinstance(group.get("params"), list)
        ]
        ids = {str(number): number for numbers in named for number in numbers}
        return value | {"state": {ids.get(key, key): slots for key, slots in state.items()}}
    return {key: _with_ids(item) for key, item in value.items()}


def write(state: Any, local: str) -> None:
    """Write a local directory that ``dcp.load`` reads: beside it first, then at once in place of what is there.

    Raises UsageError for a state that is no dict.
    """
    if not isinstance(state, dict):
        raise UsageError(f"DCP saves dicts, and this state is a {type(state).__name__}. Nothing was changed.")
    local = os.path.abspath(local)
    parent = os.path.dirname(local)
    written = os.path.join(parent, temporary_name())
    with translating("write", local):
        os.makedirs(parent, exist_ok=True)
        try:
            _save(state, written)
            _replace(written, local)
        finally:
            shutil.rmtree(written, ignore_errors=True)


def _save(state: dict[str, Any], path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no other rank takes part is meant
        try:
            # The public `save` can be told to ask no other rank only since torch 2.7.
            saver._save_state_dict(state, FileSystemWriter(path, sync_files=True), no_dist=True)  # noqa: SLF001
        except FAILURES as error:
            met = met_by(error)
            if isinstance(met, OSError):
                raise met from error
            raise SaveFailedError(f"DCP could not write it: {first_line(met)}. Nothing was changed.") from error


def _replace(written: str, local: str) -> None:
    """Put a directory in the place of whatever is there."""
    aside = None
    if os.path.lexists(local):
        aside = os.path.join(os.path.dirname(local), temporary_name())
        os.rename(local, aside)
    try:
        os.rename(written, local)
    except BaseException:
        if aside is not None:
            os.rename(aside, local)
        raise
    descriptor = os.open(os.path.dirname(local), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if aside is not None:
        shutil.rmtree(aside) if os.path.isdir(aside) and not os.path.islink(aside) else os.unlink(aside)
