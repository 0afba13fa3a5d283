"""Files of safetensors: one, or several with an index, as Hugging Face lays models out."""

import ctypes
import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from shardckpt.codecs import DTYPE_NAMES, SAFETENSORS_TAGS, torch_dtype
from shardckpt.errors import CorruptCheckpointError, UnsupportedFormatError, UsageError
from shardckpt.safetensors_format import HeaderEntry, build_header, list_entries, parse_safetensors_header
from shardckpt.storage import Storage, join, open_storage
from shardckpt.storage.translate import translating
from shardckpt.tools.conversion.output import Count, Output, writing
from shardckpt.tools.conversion.selecting import tensors_of

SUFFIX: Final = ".safetensors"
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

_LAYOUT: Final = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_NAMES: Final = {tag: name for name, tag in SAFETENSORS_TAGS.items() if tag is not None}
_INDEX_BYTES: Final = 256 << 20
"""Bytes of an index past which nobody writes one."""


class _Tensor(NamedTuple):
    name: str
    tensor: Tensor
    tag: str


# -- reading ----------------------------------------------------------------------------------------------------------


def read(path: str) -> dict[str, Tensor]:
    """The tensors of a local file, or of a directory with an index or one file in it. They are mapped.

    Raises CorruptCheckpointError for what is no such file or misses tensors, UnsupportedFormatError for a dtype that
    this torch lacks.
    """
    with translating("read", path):
        if not os.path.isdir(path):
            return _read_file(path)
        if not os.path.exists(os.path.join(path, INDEX)):
            return _read_file(os.path.join(path, _only_file(path)))
        found: dict[str, Tensor] = {}
        for file, names in _read_index(os.path.join(path, INDEX)).items():
            tensors = _read_file(os.path.join(path, file))
            if missing := [name for name in names if name not in tensors]:
                raise CorruptCheckpointError(f"{path}/{file} lacks {missing[0]!r}, which {INDEX} says is in it.")
            found |= {name: tensors[name] for name in names}
        return found


def _only_file(path: str) -> str:
    files = sorted(name for name in os.listdir(path) if name.endswith(SUFFIX))
    if SINGLE in files or len(files) == 1:
        return SINGLE if SINGLE in files else files[0]
    raise UsageError(f"{path} has {len(files)} {SUFFIX} files and no {INDEX}; name the one that is meant.")


def _read_index(path: str) -> dict[str, list[str]]:
    """The names of tensors, by the file that an index says they are in."""
    if os.path.getsize(path) > _INDEX_BYTES:
        raise CorruptCheckpointError(f"{path} is too large for an index.")
    try:
        with open(path, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        files = {str(name): os.fspath(found) for name, found in weight_map.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is no index of safetensors files: {error}") from error
    by_file: dict[str, list[str]] = {}
    for name, found in files.items():
        if os.path.basename(found) != found or found in ("", ".", ".."):
            raise CorruptCheckpointError(f"{path} names a file outside of its directory: {found!r}.")
        by_file.setdefault(found, []).append(name)
    return by_file


def _read_file(path: str) -> dict[str, Tensor]:
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            # Private, since torch warns of memory that it may not write.
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is empty.") from error
    length = int.from_bytes(mapping[:8], "little")
    try:
        header = parse_safetensors_header(mapping[: min(size, 8 + length)])
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{path}: {error}") from error
    if header.file_size != size:
        raise CorruptCheckpointError(f"{path} should have {header.file_size} bytes, and has {size}.")
    tensors = {}
    for name, entry in header.entries.items():
        if entry.tag not in _NAMES:
            raise UnsupportedFormatError(f"{path}: {name!r} is {entry.tag}, which this version does not know.")
        dtype = torch_dtype(_NAMES[entry.tag])
        if not entry.nbytes:
            tensors[name] = torch.empty(entry.shape, dtype=dtype)
            continue
        octets = torch.frombuffer(mapping, dtype=torch.uint8, offset=entry.offset, count=entry.nbytes)
        tensors[name] = octets.view(dtype).view(entry.shape)
    return tensors


# -- writing ----------------------------------------------------------------------------------------------------------


def write(
    state: Any,
    path: str,
    count: Count,
    *,
    most: int,
    storage_options: Mapping[str, Any] | None,
) -> list[str]:
    """Write the tensors of ``state``; returns the names of those that are another's second names, which are left out.

    ``path`` is a file if it ends so; else a directory, which gets one file of at most ``most`` bytes, or several and
    an index, in place of those of a model that is there. Other files in it stay. Raises UsageError for a tensor that
    safetensors cannot hold.
    """
    tensors, seconds = _listed(state)
    metadata = {"format": "pt", **seconds}
    if path.endswith(SUFFIX):
        with writing(path, sum(one.tensor.nbytes for one in tensors), count, storage_options) as output:
            _write_file(tensors, metadata, output)
        return list(seconds)
    storage = open_storage(path, storage_options)
    before = model_files(storage)
    shards = list(_shards(tensors, most))
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else [SINGLE]
    for file, shard in zip(files, shards, strict=True):
        with writing(join(path, file), sum(one.tensor.nbytes for one in shard), count, storage_options) as output:
            _write_file(shard, metadata, output)
    written = set(files)
    if len(files) > 1:
        weight_map = {one.name: file for file, shard in zip(files, shards, strict=True) for one in shard}
        index = {"metadata": {"total_size": sum(one.tensor.nbytes for one in tensors)}, "weight_map": weight_map}
        storage.put(INDEX, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n", replace=True)
        written.add(INDEX)
    # Last: readers prefer one file to an index, and each other's files are no part of this model.
    storage.delete([name for name in before if name not in written])
    storage.sync()
    return list(seconds)


def model_files(storage: Storage) -> list[str]:
    """The files of a model that are there, by their names."""
    return [stat.name for stat in storage.list() if _LAYOUT.fullmatch(stat.name)]


def _listed(state: Any) -> tuple[list[_Tensor], dict[str, str]]:
    """The tensors to be written, and by each further name of one the name that it has."""
    found: list[_Tensor] = []
    first: dict[Any, str] = {}
    seconds: dict[str, str] = {}
    for name, tensor in tensors_of(state):
        dtype = DTYPE_NAMES.get(tensor.dtype)
        tag = SAFETENSORS_TAGS.get(dtype) if dtype is not None else None
        if tag is None or tensor.layout is not torch.strided:
            raise UsageError(
                f"safetensors holds no {tensor.dtype} with layout {tensor.layout}: leave {name!r} out (--exclude), or"
                " convert it (--dtype). Nothing was changed."
            )
        # Views of other shapes or strides are other tensors, and are written each.
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.nbytes else name
        if first.setdefault(memory, name) != name:
            seconds[name] = first[memory]
            continue
        found.append(_Tensor(name, tensor, tag))
    if not found:
        raise UsageError("there is no tensor in it, and safetensors holds nothing else. Nothing was changed.")
    return found, seconds


def _shards(tensors: list[_Tensor], most: int) -> Iterator[list[_Tensor]]:
    """``tensors`` in order, cut so that none but one that is alone has more than ``most`` bytes."""
    shard: list[_Tensor] = []
    nbytes = 0
    for one in tensors:
        if shard and nbytes + one.tensor.nbytes > most:
            yield shard
            shard, nbytes = [], 0
        shard.append(one)
        nbytes += one.tensor.nbytes
    yield shard


def _write_file(tensors: list[_Tensor], metadata: Mapping[str, str], output: Output) -> None:
    listed = list_entries(HeaderEntry(one.name, one.tag, tuple(one.tensor.shape)) for one in tensors)
    output.write(build_header(listed, metadata))
    for _, tensor, _ in tensors:
        if tensor.nbytes:
            flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
            # Where numpy is missing, which is torch's way to a buffer, this is one all the same.
            output.write((ctypes.c_uint8 * flat.nbytes).from_address(flat.data_ptr()))
