"""Manifests as bytes, and back. Parsing treats its input as hostile."""

import json
from typing import Any, Final, TypeVar

import msgspec
import zstandard

from shardckpt.errors import CorruptCheckpointError, UnsupportedFormatError
from shardckpt.garbage import held_off
from shardckpt.manifest.checks import MAX_MANIFEST_BYTES, problems, rank_problems, refuse
from shardckpt.manifest.records import VERSION, Manifest, RankManifest, RankWord, check_format

COMPRESS_ABOVE: Final = 1 << 20
"""Bytes of JSON past which a manifest is stored zstd-compressed."""

_MOST_RATIO: Final = 256
"""Times as long as its frame that a manifest may be past `_ANY_RATIO`: names and offsets don't compress better."""
_ANY_RATIO: Final = 64 << 20
"""Bytes."""
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@held_off()
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


AnyManifest = TypeVar("AnyManifest", Manifest, RankManifest, RankWord)


class _Head(msgspec.Struct):
    format: str = ""
    version: int = 0


# Made while the module is imported, as all decoders of ours are: msgspec prepares a type when it first decodes it, and
# of two threads that do so at a time one sees it half prepared, which kills the process (seen with msgspec 0.22).
_DECODERS: Final[dict[type, msgspec.json.Decoder[Any]]] = {
    kind: msgspec.json.Decoder(kind) for kind in (Manifest, RankManifest, RankWord)
}
_HEAD: Final = msgspec.json.Decoder(_Head)


def _decode(data: bytes, kind: type[AnyManifest], where: str, *, doubted: bool = True) -> AnyManifest:
    try:
        if data[:4] == _ZSTD_MAGIC:
            data = _decompress(data)
        manifest: AnyManifest = _DECODERS[kind].decode(data)
        if doubted:
            _check_doubles(data, manifest)
        return manifest
    except UnsupportedFormatError as error:
        raise UnsupportedFormatError(f"{where}: {error}") from error
    except (msgspec.MsgspecError, ValueError, zstandard.ZstdError, RecursionError, MemoryError) as error:
        _refuse_newer(data, where, error)
        raise CorruptCheckpointError(
            f"{where} is not a manifest of format v{VERSION}: {error}. It is damaged or truncated; load another "
            f"checkpoint."
        ) from error


def _decompress(data: bytes) -> bytes:
    # First of all, since `decompress` allocates what the frame claims to hold, whatever limit it is given.
    size = zstandard.get_frame_parameters(data).content_size
    most = min(MAX_MANIFEST_BYTES, max(_ANY_RATIO, _MOST_RATIO * len(data)))
    if not 0 < size <= most:
        raise ValueError(f"it would be {size} bytes long, where {most} are allowed")
    return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)


def _check_doubles(data: bytes, parsed: Manifest | RankManifest | RankWord) -> None:
    """Raise ValueError where an object has a key twice: readers would disagree which of the two counts."""
    # Our own writing comes back as it was, at the speed of msgspec; anybody else's is looked at more closely.
    plain = msgspec.json.format(data, indent=-1)
    if plain != msgspec.json.encode(parsed) and plain != msgspec.json.encode(msgspec.json.decode(data)):
        json.loads(data, object_pairs_hook=_without_doubles)


def _without_doubles(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError(f"a key occurs twice among {[key for key, _ in pairs][:8]}")


def _refuse_newer(data: bytes, where: str, error: Exception) -> None:
    """A newer version may have other fields, so look at the version alone before calling the file damaged."""
    try:
        head = _HEAD.decode(data)
        check_format(head.format, head.version)
    except UnsupportedFormatError as newer:
        raise UnsupportedFormatError(f"{where}: {newer}") from error
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return


@held_off()
def decode_manifest(data: bytes, where: str) -> Manifest:
    """Parse and check ``manifest.json``.

    Raises CorruptCheckpointError where it is damaged or says something impossible, UnsupportedFormatError where it is
    of a newer version. ``where`` names the file in messages.
    """
    manifest = _decode(data, Manifest, where)
    refuse(where, problems(manifest))
    return manifest


@held_off()
def decode_rank_manifest(data: bytes, where: str, *, doubted: bool = True) -> RankManifest:
    """Parse and check one rank's manifest; raises as `decode_manifest` does.

    ``doubted=False`` is for what a rank of this job has just encoded: looking for contradictions takes four times as
    long as parsing.
    """
    manifest = _decode(data, RankManifest, where, doubted=doubted)
    if doubted:
        refuse(where, rank_problems(manifest))
    return manifest


@held_off()
def decode_rank_word(data: bytes, where: str) -> RankWord:
    """Parse of a rank's manifest only what is not about tensors; for bytes that have their digest. Raises as above."""
    return _decode(data, RankWord, where, doubted=False)
