"""The typed manifests of format v1: what they say, how they are written, and what is refused on reading.

Two kinds of JSON file lie in a checkpoint. ``rank-NNNNN-<save_id>.json`` is one rank's word on its shard: what landed
where, with the digests to prove it. ``manifest.json`` is the commit record: the skeleton of the state and, for each
tensor, the shards that hold it. A directory without the second is not a checkpoint.

Nothing here does I/O. Parsing treats its input as hostile: every name, size and box is checked before anyone uses it.
"""

import json
import re
from collections.abc import Iterable
from itertools import islice
from math import prod
from typing import Any, Final, TypeVar

import msgspec
import zstandard

from shardckpt.box import Box
from shardckpt.errors import CorruptCheckpointError, UnsupportedFormatError
from shardckpt.filenames import OBJECTS, RANK_MANIFEST, SHARD

FORMAT: Final = "shardckpt"
VERSION: Final = 1
COMPRESS_ABOVE: Final = 1 << 20
"""Bytes of JSON past which a manifest is stored zstd-compressed."""
MAX_MANIFEST_BYTES: Final = 1 << 30
"""Bytes of JSON past which a manifest is refused: the bound on what a hostile file can make us allocate."""

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SAVE_ID = re.compile(r"[0-9a-z]{8,40}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{16}", re.ASCII)
_DIGESTS = re.compile(r"(?:[0-9a-f]{16})*", re.ASCII)
_MAX_NDIM = 64
"""Dimensions of a tensor; torch has no more."""

Json = Any
"""A JSON value. The skeleton of the state is one; ``shardckpt.state.values`` gives it meaning."""


class ShardEntry(msgspec.Struct, omit_defaults=True):
    """One entry of a rank's shard. Offsets and sizes are bytes; ``offset`` counts from the start of the file."""

    fqn: str
    dtype: str
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    offset: int
    nbytes: int
    digests: str
    """xxh3-64 of each block of stored bytes, 16 hex digits each, concatenated."""
    codec: str | None = None
    frames: list[int] | None = None
    """Sizes of the compressed frames, in order; present exactly when ``codec`` is."""


class RankManifest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one rank wrote."""

    format: str = FORMAT
    version: int = VERSION
    save_id: str
    rank: int
    file: str
    size: int
    header_nbytes: int
    header_digest: str
    entries: dict[str, ShardEntry]
    """By the key under which the shard's safetensors header lists them."""
    state: Json = None
    """This rank's skeleton, where it has containers that rank 0's lacks."""
    objects: dict[str, "ObjectEntry"] = {}
    """Pickled objects of this rank's skeleton, by path."""

    def __post_init__(self) -> None:
        _check_format(self.format, self.version)


class FileEntry(msgspec.Struct):
    """A shard and the manifest of the rank that wrote it; sizes in bytes."""

    name: str
    size: int
    manifest: str
    manifest_size: int
    manifest_digest: str


class TensorEntry(msgspec.Struct, omit_defaults=True):
    """A tensor and its shards. The lists are columns, one element a shard; ``starts`` and ``lengths`` are its box."""

    dtype: str
    shape: tuple[int, ...]
    file: list[int]
    """Index into ``Manifest.files``."""
    offset: list[int]
    nbytes: list[int]
    starts: list[tuple[int, ...]]
    lengths: list[tuple[int, ...]]
    codec: str | None = None
    location: str = "cpu"
    """Location tag in the sense of ``torch.load``: where the tensor lived when it was saved."""

    def boxes(self) -> list[Box]:
        return [Box(start, length) for start, length in zip(self.starts, self.lengths, strict=True)]


class ObjectEntry(msgspec.Struct):
    """One pickled object: where its bytes lie and their digest."""

    file: str
    offset: int
    nbytes: int
    digest: str


class Manifest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The commit record of a checkpoint."""

    format: str = FORMAT
    version: int = VERSION
    requires: list[str] = []
    """Features of v1 that a reader must know to read this right; those that came after it was first written."""
    save_id: str
    created: str
    """UTC, ISO 8601."""
    world_size: int
    writer: dict[str, str]
    files: list[FileEntry]
    state: Json
    tensors: dict[str, TensorEntry]
    aliases: dict[str, str] = {}
    """Names of tensors that share another's memory, by the name under which that one is stored."""
    objects: dict[str, ObjectEntry] = {}

    def __post_init__(self) -> None:
        _check_format(self.format, self.version)
        if self.requires:
            raise UnsupportedFormatError(f"it requires {self.requires}, which this shardckpt lacks. Upgrade shardckpt.")

    def resolve(self, fqn: str) -> TensorEntry | None:
        """The entry of a tensor, through its alias; None where the checkpoint lacks it."""
        return self.tensors.get(self.aliases.get(fqn, fqn))

    def file_names(self) -> list[str]:
        """Every file the manifest names, itself not among them."""
        names = [name for file in self.files for name in (file.name, file.manifest)]
        return names + sorted({entry.file for entry in self.objects.values()})


def encode(manifest: Manifest | RankManifest) -> bytes:
    """The bytes of a manifest: JSON with one line per tensor, zstd-compressed past ``COMPRESS_ABOVE``."""
    lines = []
    for field in msgspec.structs.fields(type(manifest)):
        value = getattr(manifest, field.name)
        absent: Any = {} if field.default_factory is dict else [] if field.default_factory is list else None
        if value != absent or field.required:
            lines.append(f' "{field.name}": {_rows(value)}')
    text = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    return text if len(text) <= COMPRESS_ABOVE else zstandard.ZstdCompressor(level=3).compress(text)


def _rows(value: Any) -> str:
    """A dict or list as JSON with one row a line, so that a person can read it and ``diff`` it."""
    if isinstance(value, dict) and value:
        rows = [
            f"  {msgspec.json.encode(key).decode()}: {msgspec.json.encode(item).decode()}"
            for key, item in value.items()
        ]
        return "{\n" + ",\n".join(rows) + "\n }"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {msgspec.json.encode(item).decode()}" for item in value) + "\n ]"
    return msgspec.json.encode(value).decode()


AnyManifest = TypeVar("AnyManifest", Manifest, RankManifest)


def _decode(data: bytes, kind: type[AnyManifest], where: str) -> AnyManifest:
    try:
        if data[:4] == _ZSTD_MAGIC:
            data = _decompress(data)
        manifest = msgspec.json.decode(data, type=kind)
        _check_doubles(data)
        return manifest
    except UnsupportedFormatError as error:
        raise UnsupportedFormatError(f"{where}: {error}") from error
    except (ValueError, zstandard.ZstdError, RecursionError, MemoryError) as error:
        _refuse_newer(data, where, error)
        raise CorruptCheckpointError(
            f"{where} is not a manifest of format v{VERSION}: {error}. It is damaged or truncated; load another "
            f"checkpoint."
        ) from error


def _decompress(data: bytes) -> bytes:
    # First of all, since `decompress` allocates what the frame claims to hold, whatever limit it is given.
    size = zstandard.get_frame_parameters(data).content_size
    if not 0 < size <= MAX_MANIFEST_BYTES:
        raise ValueError(f"it would be {size} bytes long, where {MAX_MANIFEST_BYTES} are allowed")
    return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)


def _check_doubles(data: bytes) -> None:
    """Raise ValueError where an object has a key twice: readers would disagree which of the two counts."""
    # Our own writing comes back as it was, at the speed of msgspec; anybody else's is looked at more closely.
    if msgspec.json.encode(msgspec.json.decode(data)) != msgspec.json.format(data, indent=-1):
        json.loads(data, object_pairs_hook=_without_doubles)


def _without_doubles(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError(f"a key occurs twice among {[key for key, _ in pairs][:8]}")


def _refuse_newer(data: bytes, where: str, error: Exception) -> None:
    """A newer version may have other fields, so look at the version alone before calling the file damaged."""

    class Head(msgspec.Struct):
        format: str = ""
        version: int = 0

    try:
        head = msgspec.json.decode(data, type=Head)
        _check_format(head.format, head.version)
    except UnsupportedFormatError as newer:
        raise UnsupportedFormatError(f"{where}: {newer}") from error
    except (ValueError, RecursionError):
        return


def _check_format(format: str, version: int) -> None:
    if format != FORMAT:
        raise ValueError(f"`format` is {format!r}, not {FORMAT!r}")
    if version > VERSION:
        raise UnsupportedFormatError(
            f"written in format v{version}, and this shardckpt reads up to v{VERSION}. Upgrade shardckpt."
        )
    if version < 1:
        raise ValueError(f"there is no format v{version}")


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Parse and check ``manifest.json``.

    Raises CorruptCheckpointError where it is damaged or says something impossible, UnsupportedFormatError where it is
    of a newer version. ``where`` names the file in messages.
    """
    manifest = _decode(data, Manifest, where)
    _refuse(where, _problems(manifest))
    return manifest


def decode_rank_manifest(data: bytes, where: str) -> RankManifest:
    """Parse and check one rank's manifest; raises as `decode_manifest` does."""
    manifest = _decode(data, RankManifest, where)
    _refuse(where, _rank_problems(manifest))
    return manifest


def _refuse(where: str, problems: Iterable[str]) -> None:
    """Raise CorruptCheckpointError that names the first problems, if there are any."""
    found = list(islice(problems, 4))
    if found:
        more = " (and more)" if len(found) > 3 else ""
        raise CorruptCheckpointError(
            f"{where} contradicts itself: {'; '.join(found[:3])}{more}. Load another checkpoint."
        )


def _rank_problems(manifest: RankManifest) -> Iterable[str]:
    if SHARD.fullmatch(manifest.file) is None or _SAVE_ID.fullmatch(manifest.save_id) is None or manifest.rank < 0:
        yield f"`file` {manifest.file!r}, `save_id` {manifest.save_id!r} or `rank` {manifest.rank} is impossible"
    if not 0 < manifest.header_nbytes <= manifest.size or _DIGEST.fullmatch(manifest.header_digest) is None:
        yield f"the header of {manifest.header_nbytes} bytes, or its digest, is impossible"
    for key, entry in manifest.entries.items():
        if not manifest.header_nbytes <= entry.offset <= entry.offset + entry.nbytes <= manifest.size:
            yield f"entry {key!r} lies outside its file of {manifest.size} bytes"
        if len(entry.starts) != len(entry.lengths) or min((*entry.starts, *entry.lengths), default=0) < 0:
            yield f"entry {key!r} has an impossible box"
        if _DIGESTS.fullmatch(entry.digests) is None:
            yield f"`digests` of entry {key!r} are no digests"
        if (entry.codec is None) != (entry.frames is None):
            yield f"entry {key!r} has frames without a codec, or a codec without frames"
        if entry.frames is not None and (min(entry.frames, default=0) < 0 or sum(entry.frames) != entry.nbytes):
            yield f"the frames of entry {key!r} do not add up to its {entry.nbytes} bytes"
    yield from _object_problems(manifest.objects)


def _problems(manifest: Manifest) -> Iterable[str]:
    if _SAVE_ID.fullmatch(manifest.save_id) is None or manifest.world_size < 1:
        yield f"`save_id` {manifest.save_id!r} or `world_size` {manifest.world_size} is impossible"
    for file in manifest.files:
        for name, pattern in ((file.name, SHARD), (file.manifest, RANK_MANIFEST)):
            if pattern.fullmatch(name) is None:
                yield f"{name!r} is not a name of a checkpoint's file"
        if file.size < 0 or not 0 <= file.manifest_size <= MAX_MANIFEST_BYTES:
            yield f"{file.name!r} or its manifest has an impossible size"
        if _DIGEST.fullmatch(file.manifest_digest) is None:
            yield f"`manifest_digest` of {file.name!r} is no digest"
    if len({file.name for file in manifest.files}) != len(manifest.files):
        yield "`files` has a file twice"
    for fqn, tensor in manifest.tensors.items():
        yield from _tensor_problems(fqn, tensor, manifest.files)
    for alias, target in manifest.aliases.items():
        if target not in manifest.tensors or alias in manifest.tensors:
            yield f"alias {alias!r} of {target!r} stands for no tensor, or hides one"
    yield from _object_problems(manifest.objects)


def _object_problems(objects: dict[str, ObjectEntry]) -> Iterable[str]:
    for path, entry in objects.items():
        if OBJECTS.fullmatch(entry.file) is None or entry.offset < 0 or entry.nbytes < 0:
            yield f"object {path!r} has an impossible place, {entry.nbytes} bytes at {entry.offset} of {entry.file!r}"
        if _DIGEST.fullmatch(entry.digest) is None:
            yield f"`digest` of object {path!r} is no digest"


def _tensor_problems(fqn: str, tensor: TensorEntry, files: list[FileEntry]) -> Iterable[str]:
    columns = (tensor.file, tensor.offset, tensor.nbytes, tensor.starts, tensor.lengths)
    if len({len(column) for column in columns}) != 1:
        yield f"the columns of tensor {fqn!r} differ in length"
        return
    ndim = len(tensor.shape)
    if ndim > _MAX_NDIM or min(tensor.shape, default=0) < 0 or prod(filter(None, tensor.shape)) >> 60:
        yield f"tensor {fqn!r} has the impossible shape {_short(tensor.shape)}"
        return
    volume = 0
    for index, offset, nbytes, starts, lengths in zip(*columns, strict=True):
        if not 0 <= index < len(files):
            yield f"tensor {fqn!r} points to file {index} of {len(files)}"
        elif offset < 0 or nbytes < 0 or offset + nbytes > files[index].size:
            yield f"a shard of tensor {fqn!r} lies outside {files[index].name!r}"
        if len(starts) != ndim or len(lengths) != ndim:
            yield f"a shard of tensor {fqn!r} has {len(starts)} dimensions, the tensor {ndim}"
        elif any(s < 0 or n <= 0 or s + n > size for s, n, size in zip(starts, lengths, tensor.shape, strict=True)):
            yield f"a shard of tensor {fqn!r} lies outside its shape {_short(tensor.shape)}"
        else:
            volume += prod(lengths)
            # No element takes less than a byte, and a compressed mebibyte has a digest in the rank's manifest.
            if 0 <= index < len(files) and (
                nbytes < prod(lengths)
                if tensor.codec is None
                else (prod(lengths) >> 20) * 16 > files[index].manifest_size
            ):
                yield f"a shard of tensor {fqn!r} has {nbytes} bytes for {prod(lengths)} elements"
    # Where volumes agree and no two boxes overlap, which the reader's plan finds, there are no holes.
    if volume != prod(tensor.shape):
        yield f"the shards of tensor {fqn!r} hold {volume} of its {prod(tensor.shape)} elements"


def _short(shape: tuple[int, ...]) -> str:
    return str(shape) if len(str(shape)) < 80 else f"{str(shape)[:80]}..."
