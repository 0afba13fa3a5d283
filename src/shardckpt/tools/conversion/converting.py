"""One conversion: source → nested state of mapped tensors → the part that is wanted → target."""

import os
import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from shardckpt import options
from shardckpt.checkpointer import Checkpointer
from shardckpt.codecs import torch_dtype
from shardckpt.errors import UnsupportedFormatError, UsageError
from shardckpt.options import Path
from shardckpt.reader import ReadStats
from shardckpt.state.selection import Selection
from shardckpt.tools.conversion import safetensors_files, torch_file
from shardckpt.tools.conversion.choosing import ChoosingMaker
from shardckpt.tools.conversion.fetching import fetch
from shardckpt.tools.conversion.formats import Format, check_free, local_place, source_format, target_format
from shardckpt.tools.conversion.output import writing
from shardckpt.tools.conversion.scratch import Scratch
from shardckpt.tools.conversion.selecting import Wanted, at, others_of, select, tensors_of
from shardckpt.tools.opened import Progress, nbytes_of, unheard

SHARD: Final = 5_000_000_000
"""Bytes of tensors in one file of several: what Hugging Face's own tools take."""
_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


@dataclass(frozen=True)
class ConvertReport:
    """What was read and what was written."""

    source: str
    target: str
    source_format: Format
    target_format: Format
    tensors: int
    nbytes: int
    """Of the tensors in the target, each counted once, whatever its names."""
    left_out: list[str] = field(default_factory=list)
    """Places that the target's format has no room for: of safetensors, all that is no tensor, and second names."""


def convert(
    source: Path,
    target: Path,
    *,
    to: str | None = None,
    prefix: str = "",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    dtype: str | None = None,
    weights_only: bool = True,
    overwrite: bool = False,
    max_shard_size: int = SHARD,
    storage_options: Mapping[str, Any] | None = None,
    target_storage_options: Mapping[str, Any] | None = None,
    progress: Progress = unheard,
) -> ConvertReport:
    """Bring a checkpoint into another format: ``"shardckpt"``, ``"torch"``, ``"dcp"`` or ``"safetensors"``.

    What lies at ``source`` is known by looking; of ``target`` its name tells, or ``to``. ``prefix`` takes a part of the
    state for the whole; ``include`` and ``exclude`` are patterns (``fnmatch``) of the places below it; ``rename`` maps
    regular expressions to what replaces them in the keys of dicts that hold tensors; ``dtype`` is what floating-point
    tensors of a dimension or more become. Tensors go through files on the disk of the target (of the source, if that is
    elsewhere), never all through memory, so there has to be room for them there twice.

    ``overwrite`` is whether something at ``target`` may be replaced; it is, at once, when the new is whole.
    ``weights_only=False`` unpickles what is pickled in the source, which runs code. ``max_shard_size`` is in bytes, for
    a directory of safetensors. ``target_storage_options`` are by default those of the source.

    Raises UsageError for what cannot be said in the target's format, and where something is there already; what
    opening and reading a checkpoint do; UnsafeLoadError; StorageError and its kinds.
    """
    asked, into = options.path_text(source), options.path_text(target)
    told = options.mapping("storage_options", storage_options)
    told_target = told if target_storage_options is None else options.mapping("target_", target_storage_options)
    local = local_place(asked)
    found = source_format(asked, local, told)
    made = target_format(into, found, to)
    if found == made == "shardckpt" and not (prefix or include or exclude or rename or dtype):
        raise UsageError("source and target are of one format, and nothing is to be changed: use cp.")
    if local is not None and local_place(into) is not None and _same(local, local_place(into)):
        raise UsageError(f"{into} is what is to be converted. Nothing was changed; convert it to another place.")
    check_free(into, made, told_target, overwrite=overwrite)
    wanted = Wanted(prefix, Selection(include, exclude), _renames(rename), _dtype(dtype))
    work = _Work(asked, into, told, told_target, weights_only=weights_only, progress=progress)
    with ExitStack() as stack:
        scratch = Scratch(work.room())
        stack.callback(scratch.close)
        state = select(work.read(found, local, wanted, scratch, stack), wanted, scratch.empty)
        distinct = {_memory(tensor): _nbytes(tensor) for _, tensor in tensors_of(state)}
        left_out = work.write(made, state, sum(distinct.values()), max_shard_size)
    return ConvertReport(asked, into, found, made, len(distinct), sum(distinct.values()), left_out)


def _same(a: str, b: str | None) -> bool:
    return b is not None and os.path.exists(b) and os.path.samefile(a, b)


def _memory(tensor: Tensor) -> Any:
    if tensor.layout is not torch.strided or not tensor.nbytes:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _nbytes(tensor: Tensor) -> int:
    return tensor.nbytes if tensor.layout is torch.strided else tensor.numel() * tensor.element_size()


def _renames(rename: Mapping[str, str] | None) -> list[tuple[re.Pattern[str], str]]:
    try:
        return [(re.compile(pattern), replacement) for pattern, replacement in (rename or {}).items()]
    except re.error as error:
        raise UsageError(f"rename: {error.pattern!r} is no regular expression: {error}.") from error


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    try:
        dtype = torch_dtype(_DTYPES.get(name, name.removeprefix("torch.")))
    except UnsupportedFormatError as error:
        raise UsageError(f"there is no dtype {name!r}.") from error
    if not dtype.is_floating_point:
        raise UsageError(f"dtype is for floating-point tensors, and {name} is none.")
    return dtype


class _Work:
    """Where one conversion goes from and to."""

    def __init__(
        self,
        source: str,
        target: str,
        storage_options: dict[str, Any],
        target_storage_options: dict[str, Any],
        *,
        weights_only: bool,
        progress: Progress,
    ) -> None:
        self._source = source
        self._target = target
        self._storage_options = storage_options
        self._target_storage_options = target_storage_options
        self._weights_only = weights_only
        self._progress = progress
        self._lock = threading.Lock()
        self._done = self._total = 0

    def room(self) -> str:
        """A folder of this machine with room for the state: where it goes to, or comes from, else for temporaries."""
        for path in (self._target, self._source):
            local = local_place(path)
            if local is None:
                continue
            folder = os.path.dirname(os.path.abspath(local))
            while not os.path.isdir(folder):
                folder = os.path.dirname(folder)
            if os.access(folder, os.W_OK):
                return folder
        return tempfile.gettempdir()

    def read(self, found: Format, local: str | None, wanted: Wanted, scratch: Scratch, stack: ExitStack) -> Any:
        """The state that is there, tensors in files: of ours, the wanted places of it; else all, less the prefix."""
        if found == "shardckpt":
            return self._read_ours(wanted, scratch)
        if found == "dcp":
            from shardckpt.tools.conversion import dcp  # imports much of torch.distributed, for this alone

            return at(dcp.read(local or self._source, scratch.empty, weights_only=self._weights_only), wanted.prefix)
        if local is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=self.room(), prefix=".shardckpt-"))
            local = fetch(self._source, folder, self._count, self._storage_options)
        if found == "torch":
            return at(torch_file.read(local, weights_only=self._weights_only), wanted.prefix)
        return at(safetensors_files.read(local), wanted.prefix)

    def write(self, made: Format, state: Any, nbytes: int, max_shard_size: int) -> list[str]:
        """Returns what there was no room for."""
        self._total, self._done = nbytes, 0
        options = self._target_storage_options
        if made == "shardckpt":
            engine = Checkpointer(alone=True, storage_options=options)
            try:
                engine.save(state, self._target)
            finally:
                engine.close()
            return []
        if made == "dcp":
            from shardckpt.tools.conversion import dcp  # as above

            dcp.write(state, local_place(self._target) or self._target)
            return []
        if made == "torch":
            with writing(self._target, nbytes, self._count, options) as output:
                torch_file.write(state, output)
            return []
        seconds = safetensors_files.write(
            state, self._target, self._count, most=max_shard_size, storage_options=options
        )
        return [*others_of(state), *seconds]

    def _read_ours(self, wanted: Wanted, scratch: Scratch) -> Any:
        engine = Checkpointer(alone=True, storage_options=self._storage_options)
        try:
            opened = engine.open(self._source)
            self._total, self._done = nbytes_of(opened.manifest), 0
            maker = ChoosingMaker(opened.manifest, wanted, scratch.empty)
            stats = ReadStats(heard=self._count)
            return opened.materialise(wanted.prefix, weights_only=self._weights_only, maker=maker, stats=stats)
        finally:
            engine.close()

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._progress(min(self._done, self._total), self._total)
