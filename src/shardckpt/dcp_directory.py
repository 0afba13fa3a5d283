"""Directories that DCP wrote, by itself or for Lightning's FSDP and ModelParallel strategies, which add ``meta.pt``.

``torch.distributed.checkpoint`` reads each tensor straight into the live one, whole or this rank's part, so no copy of
the whole state is ever made. By itself it unpickles what it finds without asking; here nothing is unpickled that is not
allowed by ``weights_only``.
"""

import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader as dcp
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from shardckpt.errors import CorruptCheckpointError, LoadFailedError, UnsafeLoadError, first_line
from shardckpt.relocation import relocation

META: Final = "meta.pt"
METADATA: Final = ".metadata"

_METADATA_CLASSES: Final = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
"""What DCP's metadata is made of, besides plain values and dtypes."""


FAILURES: Final = (Exception, CheckpointException)
"""What DCP raises; it wraps what it meets into an exception that is none of Python's ``Exception``."""


def met_by(error: BaseException) -> BaseException:
    """What DCP has wrapped, or the error itself."""
    if isinstance(error, CheckpointException):
        return next((met for met, _ in error.failures.values()), error)
    return error


def is_directory(path: str) -> bool:
    """Whether ``path`` is a local directory with DCP files in it, complete or not."""
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return any(name in (METADATA, META) or name.endswith(".distcp") for name in names)


class Stored(NamedTuple):
    """A tensor in a checkpoint that is not ours."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Directory:
    """A directory of DCP files whose metadata and ``meta.pt`` have been read."""

    def __init__(self, path: str, map_location: Any, weights_only: bool | None) -> None:
        self.path = path
        self._weights_only = weights_only
        self._relocate = relocation("cpu" if map_location is None else map_location)
        self._metadata = self._read_metadata()
        known = self._metadata.planner_data or {}
        self._places = {key: tuple(known.get(key, (key,))) for key in self._metadata.state_dict_metadata}
        self._extra = self._read_extra(map_location)

    @property
    def extra(self) -> dict[str, Any]:
        """What Lightning kept beside the tensors."""
        return dict(self._extra)

    @property
    def sources(self) -> list[str]:
        """What DCP has, by top-level keys: the states of modules and optimizers."""
        return list(dict.fromkeys(place[0] for place in self._places.values()))

    def under(self, *prefix: Any) -> dict[tuple[Any, ...], str]:
        """What lies below a place: DCP's keys, by the rest of their places."""
        depth = len(prefix)
        return {place[depth:]: key for key, place in self._places.items() if place[:depth] == prefix}

    def tensor(self, key: str) -> Stored | None:
        """The tensor that DCP has under ``key``; None where it has something else."""
        entry = self._metadata.state_dict_metadata[key]
        return Stored(tuple(entry.size), entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None

    def value(self, *prefix: Any, empty: Callable[[Iterable[int], torch.dtype], Tensor] | None = None) -> Any:
        """The value at a place, made anew on this process; None where there is none.

        ``empty`` makes its tensors, of a shape and a dtype; by default they are in memory.
        """
        keys = self.under(*prefix)
        entries = {key: self.tensor(key) for key in keys.values()}
        tensors = {
            key: torch.empty(entry.shape, dtype=entry.dtype) if empty is None else empty(entry.shape, entry.dtype)
            for key, entry in entries.items()
            if entry is not None
        }
        others = self.read(tensors, [key for key, entry in entries.items() if entry is None])
        root: dict[str, Any] = {}
        for rest, key in keys.items():
            set_element(root, ("", *rest), self._relocate(tensors[key], "cpu") if key in tensors else others[key])
        return root.get("")

    def read(self, tensors: Mapping[str, Tensor], others: Iterable[str]) -> dict[str, Any]:
        """Fill tensors, by DCP's keys, and return what is no tensor."""
        planner = _Planner()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no other rank is asked is meant
            try:
                # The public `load` can be told to ask no other rank only since torch 2.7.
                dcp._load_state_dict(  # noqa: SLF001 - no public one can in torch 2.6
                    {**tensors, **dict.fromkeys(others)},
                    _Reader(self.path, self._metadata),
                    no_dist=True,
                    planner=planner,
                )
            except FAILURES as error:
                raise LoadFailedError(f"{self.path} cannot be read: {first_line(met_by(error))}") from error
        return {key: self._unpickled(raw, key, None) for key, raw in planner.raw.items()}

    # -- inside -------------------------------------------------------------------------------------------------------

    def _read_metadata(self) -> Metadata:
        try:
            with open(os.path.join(self.path, METADATA), "rb") as file:
                found = (pickle.Unpickler if self._weights_only is False else _MetadataUnpickler)(file).load()
        except FileNotFoundError as error:
            raise CorruptCheckpointError(
                f"{self.path} has no {METADATA}: its save, by another program, was cut short. Take another checkpoint."
            ) from error
        except UnsafeLoadError:
            raise
        except Exception as error:  # what a damaged pickle does to its reader
            raise CorruptCheckpointError(f"{self.path}/{METADATA} cannot be read: {error}") from error
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise CorruptCheckpointError(f"{self.path}/{METADATA} is no metadata of DCP's.")
        for stored in found.storage_data.values():
            name = getattr(stored, "relative_path", None)
            if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
                raise CorruptCheckpointError(f"{self.path}/{METADATA} names a file outside its directory: {name!r}")
        return found

    def _read_extra(self, map_location: Any) -> dict[str, Any]:
        path = os.path.join(self.path, META)
        if not os.path.isfile(path):  # DCP's alone, without Lightning
            return {}
        with open(path, "rb") as file:
            found = self._unpickled(file, META, "cpu" if map_location is None else map_location)
        if not isinstance(found, dict):
            raise CorruptCheckpointError(f"{path} holds a {type(found).__name__}, and not the dict of a checkpoint.")
        return found

    def _unpickled(self, file: Any, name: str, map_location: Any) -> Any:
        try:
            return torch.load(file, map_location=map_location, weights_only=self._weights_only)
        except pickle.UnpicklingError as error:
            if self._weights_only is False:
                raise LoadFailedError(f"{self.path}: {name!r} cannot be unpickled: {error}") from error
            raise UnsafeLoadError(
                f"{self.path} holds pickled objects in {name!r}, and weights_only forbids to load them: unpickling runs"
                f" code. If you trust whoever wrote it, pass weights_only=False. Nothing was changed. ({error})"
            ) from error


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise UnsafeLoadError(
            f"{METADATA} of a DCP directory wants {module}.{name}, which has no place there: unpickling runs code. If"
            " you trust whoever wrote it, pass weights_only=False. Nothing was changed."
        )


class _Reader(FileSystemReader):
    def __init__(self, path: str, metadata: Metadata) -> None:
        super().__init__(path)
        self._found = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002 - as its base, which reads
        return self._found


class _Planner(DefaultLoadPlanner):
    """Takes DCP's own keys, and leaves what is pickled as it is."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.raw: dict[str, io.BytesIO] = {}

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.raw[read_item.dest_index.fqn] = value
