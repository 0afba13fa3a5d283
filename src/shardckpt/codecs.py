"""Tensor bytes and stored bytes: dtype names, block digests, and compression in independent frames.

The tables are static, so a checkpoint with a dtype that this torch lacks can still be listed and verified.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import xxhash
import zstandard

from shardckpt.errors import CorruptCheckpointError, UnsupportedFormatError

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes."""

DIGEST_BLOCK = 1 << 20
"""Bytes of stored data under one digest, and of raw data in one compressed frame. The grid restarts at each entry."""

ZSTD = "zstd"
"""The codec's name in manifests."""


class _Kind(NamedTuple):
    name: str
    """What follows ``torch.`` in the dtype's ``str``; the name in manifests."""
    itemsize: int
    """Bytes per element."""
    tag: str | None
    """What safetensors calls it; None where it has no name, and the data is stored as U8."""


# The tags are those that stock safetensors 0.8.0 opens: one that it doesn't know makes a whole file unreadable, so
# C32 and C128 (tried: "unknown variant") aren't among them. Nor is F4: it counts single elements where torch counts
# pairs, so shapes would differ, and a 0-dim tensor of pairs couldn't be told at all.
_KINDS = (
    _Kind("complex128", 16, None),
    _Kind("complex64", 8, "C64"),
    _Kind("complex32", 4, None),
    _Kind("float64", 8, "F64"),
    _Kind("float32", 4, "F32"),
    _Kind("float16", 2, "F16"),
    _Kind("bfloat16", 2, "BF16"),
    _Kind("float8_e4m3fn", 1, "F8_E4M3"),
    _Kind("float8_e4m3fnuz", 1, "F8_E4M3FNUZ"),
    _Kind("float8_e5m2", 1, "F8_E5M2"),
    _Kind("float8_e5m2fnuz", 1, "F8_E5M2FNUZ"),
    _Kind("float8_e8m0fnu", 1, "F8_E8M0"),
    _Kind("float4_e2m1fn_x2", 1, None),
    _Kind("int64", 8, "I64"),
    _Kind("int32", 4, "I32"),
    _Kind("int16", 2, "I16"),
    _Kind("int8", 1, "I8"),
    _Kind("uint64", 8, "U64"),
    _Kind("uint32", 4, "U32"),
    _Kind("uint16", 2, "U16"),
    _Kind("uint8", 1, "U8"),
    _Kind("bool", 1, "BOOL"),
)

ITEMSIZE: Mapping[str, int] = {kind.name: kind.itemsize for kind in _KINDS}
"""Bytes per element by dtype name, of every dtype that the format knows, whether or not this torch has it."""

SAFETENSORS_TAGS: Mapping[str, str | None] = {kind.name: kind.tag for kind in _KINDS}
"""The safetensors tag by dtype name; None where safetensors has none, and the data is stored as U8."""

DTYPES: Mapping[str, torch.dtype] = {
    kind.name: getattr(torch, kind.name) for kind in _KINDS if isinstance(getattr(torch, kind.name, None), torch.dtype)
}
"""The dtype by name, of those that this torch has."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
"""The name by dtype. What isn't here (quantized, sub-byte) can't be stored as raw bytes."""


def itemsize_of(name: str) -> int:
    """Bytes of an element of the dtype called `name` in a manifest, whether this torch has it or not.

    :raises UnsupportedFormatError: the name is none that this version knows.
    """
    if name not in ITEMSIZE:
        torch_dtype(name)  # says what is to be done
    return ITEMSIZE[name]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called `name` in a manifest.

    :raises UnsupportedFormatError: this torch has none, or the name is none that this version knows.
    """
    dtype = DTYPES.get(name)
    if dtype is None:
        why = f"torch {torch.__version__}" if name in ITEMSIZE else "this version of shardckpt"
        raise UnsupportedFormatError(f"the checkpoint has a tensor of dtype {name!r}, which {why} doesn't know")
    return dtype


def digest(data: Buffer) -> int:
    """xxh3-64 of `data`, with seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def block_digests(data: Buffer) -> list[int]:
    """The digests of an entry that is in memory as a whole: one per `DIGEST_BLOCK`, none if it's empty."""
    view = memoryview(data).cast("B")
    return [digest(view[at : at + DIGEST_BLOCK]) for at in range(0, len(view), DIGEST_BLOCK)]


def digests_text(digests: Iterable[int]) -> str:
    """Digests as manifests have them: 16 hex digits each, most significant first, without separators."""
    values = tuple(digests)
    return struct.pack(f">{len(values)}Q", *values).hex()


def parse_digests(text: str) -> list[int]:
    """The inverse of `digests_text`.

    :raises CorruptCheckpointError: `text` isn't a whole number of digests.
    """
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    # `fromhex` lets blanks pass, which the length then betrays.
    if len(data) * 2 != len(text) or len(data) % 8:
        raise CorruptCheckpointError(f"not a list of digests: {text[:40]!r}")
    return list(struct.unpack(f">{len(data) // 8}Q", data))


# zstandard's contexts must not be used by two threads at once, and cost more to make than a small frame to encode.
_contexts = threading.local()


def _compressor(level: int) -> zstandard.ZstdCompressor:
    by_level: dict[int, zstandard.ZstdCompressor] = _contexts.__dict__.setdefault("by_level", {})
    if level not in by_level:
        # The digests of the stored bytes already say what a checksum within each frame would.
        by_level[level] = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
    return by_level[level]


def _decompressor() -> zstandard.ZstdDecompressor:
    found: zstandard.ZstdDecompressor | None = getattr(_contexts, "decompressor", None)
    if found is None:
        found = _contexts.decompressor = zstandard.ZstdDecompressor()
    return found


def compress_frames(pieces: Iterable[Buffer], level: int) -> Iterator[bytes]:
    """One entry's bytes, which come in consecutive pieces of any size, as zstd frames of `DIGEST_BLOCK` raw bytes.

    The last frame has what is left; an empty entry has no frames. Whole blocks are read where they lie, so a piece
    must not change before the frames from it have been taken.
    """
    rest = bytearray()
    for piece in pieces:
        view = memoryview(piece).cast("B")
        if rest:
            room = DIGEST_BLOCK - len(rest)
            rest += view[:room]
            view = view[room:]
            if len(rest) < DIGEST_BLOCK:
                continue
            yield _compressor(level).compress(rest)
            rest = bytearray()
        whole = len(view) - len(view) % DIGEST_BLOCK
        for at in range(0, whole, DIGEST_BLOCK):
            yield _compressor(level).compress(view[at : at + DIGEST_BLOCK])
        rest += view[whole:]
    if rest:
        yield _compressor(level).compress(rest)


def decompress_frame(frame: Buffer, raw_nbytes: int) -> bytes:
    """The raw bytes of one frame, of which there are `raw_nbytes`, at most `DIGEST_BLOCK`.

    :raises CorruptCheckpointError: the frame is damaged, holds another number of bytes, or is followed by anything.
        Nothing larger than `raw_nbytes` is allocated, whatever the frame claims to hold.
    """
    if not 0 < raw_nbytes <= DIGEST_BLOCK:
        raise CorruptCheckpointError(f"a compressed frame can't hold {raw_nbytes} bytes")
    try:
        # First of all, since `decompress` takes a frame's own word on its size over the limit it is given.
        stated = zstandard.get_frame_parameters(frame)
        if stated.content_size != raw_nbytes or stated.window_size > DIGEST_BLOCK:
            raise CorruptCheckpointError(f"a compressed frame should hold {raw_nbytes} bytes, and says otherwise")
        raw = _decompressor().decompress(frame, max_output_size=raw_nbytes, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise CorruptCheckpointError(f"a compressed frame of {len(frame)} bytes is damaged: {exc}") from exc
    if len(raw) != raw_nbytes:
        raise CorruptCheckpointError(f"a compressed frame should hold {raw_nbytes} bytes, and holds {len(raw)}")
    return raw
