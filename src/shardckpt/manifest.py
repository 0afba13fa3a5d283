"""The typed manifests of format v1: what they say, how they are written, and what is refused on reading.

Two kinds of JSON file lie in a checkpoint. ``rank-NNNNN-<save_id>.json`` is one rank's word on its shard: what landed
where, with the digests to prove it. ``manifest.json`` is the commit record: the skeleton of the state and, for each
tensor, the shards that hold it. A directory without the second is not a checkpoint.

Nothing here does I/O. Parsing treats its input as hostile: every name, size and box is checked before anyone uses it.
"""

import re
from collections.abc import Iterable
from typing import Any, Final, TypeVar

import msgspec
import zstandard

from shardckpt.box import Box
from shardckpt.errors import CorruptCheckpointError, UnsupportedFormatError

FORMAT: Final = "shardckpt"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
COMPRESS_ABOVE: Final = 1 << 20
"""Bytes of JSON past which a manifest is stored zstd-compressed."""
MAX_MANIFEST_BYTES: Final = 1 << 31
"""Bytes of JSON past which a manifest is refused: the bound on what a hostile file can make us allocate."""

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_FILE_NAME = re.compile(r"^(?:rank-\d{5,}|objects|saving)-([0-9a-z]{8,40})(?:-rank-\d{5,})?\.(?:safetensors|json|pkl)$")

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

    def resolve(self, fqn: str) -> TensorEntry | None:
        """The entry of a tensor, through its alias; None where the checkpoint lacks it."""
        return self.tensors.get(self.aliases.get(fqn, fqn))

    def file_names(self) -> list[str]:
        """Every file the manifest names, itself not among them."""
        names = [name for file in self.files for name in (file.name, file.manifest)]
        return names + sorted({entry.file for entry in self.objects.values()})


def shard_name(rank: int, save_id: str) -> str:
    return f"rank-{rank:05d}-{save_id}.safetensors"


def rank_manifest_name(rank: int, save_id: str) -> str:
    return f"rank-{rank:05d}-{save_id}.json"


def objects_name(rank: int, save_id: str) -> str:
    return f"objects-{save_id}.pkl" if rank == 0 else f"objects-{save_id}-rank-{rank:05d}.pkl"


def is_checkpoint_file(name: str) -> bool:
    """Whether a file name is one that only shardckpt gives: what a removal may delete."""
    return name == MANIFEST or _FILE_NAME.match(name) is not None


def save_id_of(name: str) -> str | None:
    """The id of the save that wrote a checkpoint's file; None for the manifest and for files that are not ours."""
    match = _FILE_NAME.match(name)
    return None if match is None else match[1]


def encode(manifest: Manifest | RankManifest) -> bytes:
    """The bytes of a manifest: JSON with one line per tensor, zstd-compressed past ``COMPRESS_ABOVE``."""
    fields: dict[str, Any] = {
        field.name: getattr(manifest, field.name) for field in msgspec.structs.fields(type(manifest))
    }
    defaults = {field.name: field.default for field in msgspec.structs.fields(type(manifest))}
    lines = []
    for name, value in fields.items():
        if name not in ("format", "version") and (
            value is None or (value == {} and defaults[name] != msgspec.NODEFAULT)
        ):
            continue
        lines.append(f" {msgspec.json.encode(name).decode()}: {_rows(value)}")
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
            data = zstandard.ZstdDecompressor().decompress(
                data, max_output_size=MAX_MANIFEST_BYTES, read_across_frames=False
            )
        return msgspec.json.decode(data, type=kind)
    except UnsupportedFormatError as error:
        raise UnsupportedFormatError(f"{where}: {error}") from error
    except (msgspec.DecodeError, zstandard.ZstdError, RecursionError, UnicodeDecodeError, MemoryError) as error:
        _refuse_newer(data, where, error)
        raise CorruptCheckpointError(
            f"{where} is not a manifest of format v{VERSION}: {error}. It is damaged or truncated; load another "
            f"checkpoint."
        ) from error


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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return


def _check_format(format: str, version: int) -> None:
    if format != FORMAT:
        raise ValueError(f"`format` is {format!r}, not {FORMAT!r}")
    if version > VERSION:
        raise UnsupportedFormatError(
            f"written in format v{version}, and this shardckpt reads up to v{VERSION}. Upgrade shardckpt."
        )


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Parse and check ``manifest.json``.

    Raises CorruptCheckpointError where it is damaged or says something impossible, UnsupportedFormatError where it is
    of a newer version. ``where`` names the file in messages.
    """
    manifest = _decode(data, Manifest, where)
    problems = list(_problems(manifest))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CorruptCheckpointError(
            f"{where} contradicts itself: {'; '.join(problems[:3])}{more}. Load another checkpoint."
        )
    return manifest


def decode_rank_manifest(data: bytes, where: str) -> RankManifest:
    """Parse and check one rank's manifest; raises as `decode_manifest` does."""
    manifest = _decode(data, RankManifest, where)
    for key, entry in manifest.entries.items():
        if entry.offset < manifest.header_nbytes or entry.nbytes < 0 or entry.offset + entry.nbytes > manifest.size:
            raise CorruptCheckpointError(f"{where}: entry {key!r} lies outside its file of {manifest.size} bytes.")
        if (entry.codec is None) != (entry.frames is None):
            raise CorruptCheckpointError(
                f"{where}: entry {key!r} has frames without a codec, or a codec without frames."
            )
        if entry.frames is not None and (min(entry.frames, default=0) < 0 or sum(entry.frames) != entry.nbytes):
            raise CorruptCheckpointError(
                f"{where}: the frames of entry {key!r} do not add up to its {entry.nbytes} bytes."
            )
    return manifest


def _problems(manifest: Manifest) -> Iterable[str]:
    for file in manifest.files:
        for name in (file.name, file.manifest):
            if not is_checkpoint_file(name) or name == MANIFEST:
                yield f"{name!r} is not a name of a checkpoint's file"
        if file.size < 0 or file.manifest_size < 0:
            yield f"{file.name!r} has a negative size"
    for fqn, tensor in manifest.tensors.items():
        yield from _tensor_problems(fqn, tensor, manifest.files)
    for alias, target in manifest.aliases.items():
        if target not in manifest.tensors or alias in manifest.tensors:
            yield f"alias {alias!r} of {target!r} stands for no tensor, or hides one"
    for path, entry in manifest.objects.items():
        if not is_checkpoint_file(entry.file) or entry.offset < 0 or entry.nbytes < 0:
            yield f"object {path!r} has an impossible place"


def _tensor_problems(fqn: str, tensor: TensorEntry, files: list[FileEntry]) -> Iterable[str]:
    columns = (tensor.file, tensor.offset, tensor.nbytes, tensor.starts, tensor.lengths)
    if len({len(column) for column in columns}) != 1:
        yield f"the columns of tensor {fqn!r} differ in length"
        return
    if any(size < 0 for size in tensor.shape):
        yield f"tensor {fqn!r} has a negative size"
        return
    ndim = len(tensor.shape)
    for index, offset, nbytes, starts, lengths in zip(*columns, strict=True):
        if not 0 <= index < len(files):
            yield f"tensor {fqn!r} points to file {index} of {len(files)}"
        elif offset < 0 or nbytes < 0 or offset + nbytes > files[index].size:
            yield f"a shard of tensor {fqn!r} lies outside {files[index].name!r}"
        if len(starts) != ndim or len(lengths) != ndim:
            yield f"a shard of tensor {fqn!r} has {len(starts)} dimensions, the tensor {ndim}"
        elif any(s < 0 or n <= 0 or s + n > size for s, n, size in zip(starts, lengths, tensor.shape, strict=True)):
            yield f"a shard of tensor {fqn!r} lies outside its shape {tensor.shape}"
