"""The header of a safetensors file: built so that stock readers open our shards, parsed without trust.

A file is 8 bytes of little-endian length, that many bytes of JSON, then the data. The JSON maps each key to a dtype
tag, a shape, and a byte range that counts from the start of the data; the ranges follow one another without gaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from shardckpt.box import Box, full_box, slice_notation
from shardckpt.errors import CorruptCheckpointError, UsageError

DATA_ALIGNMENT = 4096
"""Bytes. Data starts on a multiple of it: a disk sector, a memory page, and aligned for every dtype."""

MAX_HEADER = 100_000_000
"""Bytes of JSON. Stock readers refuse more (safetensors 0.8: "header too large")."""

_METADATA = "__metadata__"
_PREFIX = 8

# Bits per element. F4 and F6 are only ever read: we write none.
_TAG_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class HeaderEntry(NamedTuple):
    """One tensor to be listed; its data follows that of the entry before."""

    key: str
    tag: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        return prod(self.shape) * _TAG_BITS[self.tag] // 8


class ParsedEntry(NamedTuple):
    """One tensor that a file lists."""

    tag: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


class ParsedHeader(NamedTuple):
    """What a file says of itself."""

    entries: dict[str, ParsedEntry]
    metadata: dict[str, str]
    data_start: int
    """Bytes from the start of the file."""
    file_size: int
    """The file's bytes, header included, if it is complete."""


def entry_key(fqn: str, shape: Sequence[int], box: Box) -> str:
    """The key under which a shard lists `box` of a tensor: its name, and the box where that isn't all of it.

    A tensor that bears the one name that safetensors reserves, or one that ends like a box, is always listed with its
    box: "w[0:2]" is a part of "w", and never a tensor of that name.
    """
    is_plain = box == full_box(shape) and fqn != _METADATA and not fqn.endswith("]")
    return fqn if is_plain else f"{fqn}[{slice_notation(box)}]"


class Listed(NamedTuple):
    """Entries as a header lists them, in the order of their data."""

    text: bytes
    """JSON, less the braces around it."""


def list_entries(entries: Iterable[HeaderEntry]) -> Listed:
    """The part of a header that stays the same while its entries do.

    :raises UsageError: two entries have the same key or one has a reserved one, or a key isn't valid Unicode.
    """
    listed: dict[str, Any] = {}
    start = 0
    for entry in entries:
        if entry.key in listed or entry.key == _METADATA:
            raise UsageError(f"two entries of one file can't both be called {entry.key!r}")
        stop = start + entry.nbytes
        listed[entry.key] = {"dtype": entry.tag, "shape": entry.shape, "data_offsets": (start, stop)}
        start = stop
    return Listed(_encode(listed)[1:-1])


def build_header(listed: Listed, metadata: Mapping[str, str] | None = None, *, reserve: int = 0) -> bytes:
    """The bytes of a file before its data, padded with blanks to a multiple of `DATA_ALIGNMENT`.

    :param metadata: what the file says of itself.
    :param reserve: the length to give the header, a multiple of `DATA_ALIGNMENT`, such as `header_bound` foretold; 0
        for as short as possible.
    :raises UsageError: there are more entries than stock readers allow.
    """
    said = _encode({_METADATA: dict(metadata)})[1:-1] if metadata else b""
    body = b"{" + b",".join(part for part in (said, listed.text) if part) + b"}"
    size = _aligned(_PREFIX + len(body))
    if reserve:
        assert reserve % DATA_ALIGNMENT == 0, f"a header of {reserve} bytes would leave the data unaligned"
        assert size <= reserve, f"a header of {size} bytes doesn't fit into the {reserve} reserved for it"
        size = reserve
    _check_size(size - _PREFIX)
    return struct.pack("<Q", size - _PREFIX) + body.ljust(size - _PREFIX)


def header_bound(entries: Iterable[tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> int:
    """The most bytes that `build_header` may need for these keys and shapes; a multiple of `DATA_ALIGNMENT`.

    For compressed entries, whose sizes are known only after the header's place is. Each may be listed with the shape
    given, or as U8 with a single dimension, of any size.

    :raises UsageError: as `build_header`.
    """
    most = (1 << 63) - 1
    tag = max(_TAG_BITS, key=len)
    listed: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for key, shape in entries:
        either = (*shape, most)
        listed[key] = {"dtype": tag, "shape": either, "data_offsets": (most, most)}
    size = _aligned(_PREFIX + len(_encode(listed)))
    _check_size(size - _PREFIX)
    return size


def _encode(listed: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as exc:
        bad = exc.object[max(0, exc.start - 40) : exc.end]
        raise UsageError(f"a tensor's name has characters that aren't Unicode: {bad!r}") from exc


def _aligned(size: int) -> int:
    return -(-size // DATA_ALIGNMENT) * DATA_ALIGNMENT


def _check_size(size: int) -> None:
    if size > MAX_HEADER:
        raise UsageError(f"too many tensors for one file: a header of {size} bytes, where readers stop at {MAX_HEADER}")


def header_nbytes(prefix: bytes) -> int:
    """The bytes before a file's data, from its first 8.

    :raises CorruptCheckpointError: these aren't the first bytes of a safetensors file.
    """
    if len(prefix) < _PREFIX:
        raise CorruptCheckpointError(f"not a safetensors file: it has only {len(prefix)} bytes")
    (length,) = struct.unpack_from("<Q", prefix)
    if not 2 <= length <= MAX_HEADER:
        raise CorruptCheckpointError(f"not a safetensors file: its header would have {length} bytes")
    return _PREFIX + int(length)


def parse_safetensors_header(data: bytes) -> ParsedHeader:
    """What the first bytes of a file say, of which there are at least `header_nbytes`.

    Checked as stock readers do, so that a file which passes can be trusted to have its entries where they are said
    to be, side by side from the start of the data to the end of the file.

    :raises CorruptCheckpointError: anything else; the message names the key.
    """
    data_start = header_nbytes(data)
    if len(data) < data_start:
        raise CorruptCheckpointError(f"a safetensors header should have {data_start} bytes, but ends after {len(data)}")
    try:
        listed = json.loads(
            data[_PREFIX:data_start].decode(), object_pairs_hook=_without_doubles, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as exc:
        raise CorruptCheckpointError(f"a safetensors header isn't valid JSON: {exc}") from exc
    if not isinstance(listed, dict):
        raise CorruptCheckpointError("a safetensors header isn't a JSON object")
    metadata = listed.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptCheckpointError(f"a safetensors header's {_METADATA} doesn't map strings to strings")
    entries = {key: _parse_entry(key, value, data_start) for key, value in listed.items()}
    at = data_start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != at:
            raise CorruptCheckpointError(f"safetensors entry {key!r} starts at byte {entry.offset}, not at {at}")
        at += entry.nbytes
    return ParsedHeader(entries, metadata, data_start, at)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key occurs twice, or is half of a surrogate pair and so can't be printed."""
    found = dict(pairs)
    "".join(found).encode()
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} isn't JSON")


def _parse_entry(key: str, value: object, data_start: int) -> ParsedEntry:
    def wrong(what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"safetensors entry {key!r}: {what}")

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("it doesn't have dtype, shape and data_offsets, and only these")
    tag, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(tag, str) or tag not in _TAG_BITS:
        raise wrong(f"unknown dtype {tag!r}")
    if not _are_sizes(shape):
        raise wrong("shape isn't a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("data_offsets isn't a byte range")
    bits = _TAG_BITS[tag]
    for length in shape:
        bits *= length
        # Many large factors would otherwise multiply into a number that takes minutes to compute.
        if bits >> 70:
            raise wrong("shape has more elements than any file has bytes")
    start, stop = offsets
    if bits != (stop - start) * 8:
        raise wrong(f"{tag} of shape {shape} has {bits / 8:g} bytes, not {stop - start}")
    return ParsedEntry(tag, tuple(shape), data_start + start, stop - start)


def _are_sizes(value: object) -> bool:
    """Whether a JSON value is a list of unsigned 64-bit integers; true and false aren't."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 64 for n in value)
