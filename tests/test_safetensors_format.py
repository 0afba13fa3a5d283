"""Our safetensors headers against the stock reader, and against files made to harm."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from shardckpt.box import Box
from shardckpt.codecs import DTYPE_NAMES, DTYPES, ITEMSIZE, SAFETENSORS_TAGS
from shardckpt.errors import CorruptCheckpointError, UsageError
from shardckpt.safetensors_format import (
    DATA_ALIGNMENT,
    HeaderEntry,
    build_header,
    entry_key,
    header_bound,
    header_nbytes,
    list_entries,
    parse_safetensors_header,
)

TAGS = sorted(tag for tag in SAFETENSORS_TAGS.values() if tag)
entries = st.lists(
    st.builds(
        HeaderEntry,
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda key: key != "__metadata__"),
        st.sampled_from(TAGS),
        st.lists(st.integers(0, 1 << 15), max_size=4).map(tuple),
    ),
    max_size=12,
    unique_by=lambda entry: entry.key,
)


def raw(header: object) -> bytes:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body


def test_the_stock_reader_opens_every_dtype(tmp_path: Path) -> None:
    """A shard is a safetensors file that others read without us: each tag that we write is one it knows, and means."""
    names = [name for name in DTYPES if SAFETENSORS_TAGS[name]]
    assert len(names) >= 17
    listed = [HeaderEntry(f"{name}[0:2,0:3]", SAFETENSORS_TAGS[name] or "", (2, 3)) for name in names]
    assert [entry.nbytes for entry in listed] == [6 * ITEMSIZE[name] for name in names]
    data = b"".join(bytes(range(entry.nbytes)) for entry in listed)
    (tmp_path / "x").write_bytes(build_header(list_entries(listed), {"format": "pt"}) + data)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, entry in zip(names, listed, strict=True):
            tensor = file.get_tensor(entry.key)
            assert DTYPE_NAMES[tensor.dtype] == name
            assert tensor.shape == (2, 3)
            assert bytes(tensor.view(torch.uint8).flatten().tolist()) == bytes(range(entry.nbytes))


def test_the_stock_reader_opens_odd_shapes_and_names(tmp_path: Path) -> None:
    """Scalars, empty tensors and any Unicode name are as readable as the rest, also after reserved space."""
    listed = [
        HeaderEntry("step", "F32", ()),
        HeaderEntry("none", "I64", (3, 0)),
        HeaderEntry('schrödinger "🐈" \\ \n\x00', "U8", (5,)),
        HeaderEntry("", "U8", (1,)),
    ]
    header = build_header(list_entries(listed), reserve=3 * DATA_ALIGNMENT)
    assert len(header) == 3 * DATA_ALIGNMENT
    (tmp_path / "x").write_bytes(header + bytes(4 + 0 + 5 + 1))
    with safe_open(tmp_path / "x", "pt") as file:
        assert sorted(file.keys()) == sorted(entry.key for entry in listed)
        assert {key: tuple(file.get_tensor(key).shape) for key in file.keys()} == {  # noqa: SIM118 - it's no dict
            entry.key: entry.shape for entry in listed
        }


@given(entries, st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text("ab"), max_size=2))
def test_what_is_built_is_parsed(listed: list[HeaderEntry], metadata: dict[str, str]) -> None:
    """A header says of each entry what was meant, in the given order, with the data aligned and without gaps."""
    header = build_header(list_entries(listed), metadata)
    parsed = parse_safetensors_header(header)
    assert header_nbytes(header[:8]) == parsed.data_start == len(header)
    assert len(header) % DATA_ALIGNMENT == 0
    assert parsed.metadata == metadata
    at = len(header)
    assert list(parsed.entries) == [entry.key for entry in listed]
    for entry in listed:
        assert parsed.entries[entry.key] == (entry.tag, entry.shape, at, entry.nbytes)
        at += entry.nbytes
    assert parsed.file_size == at


@given(entries, st.lists(st.none() | st.integers(0, 1 << 62), min_size=12, max_size=12))
def test_the_bound_always_suffices(listed: list[HeaderEntry], compressed: list[int | None]) -> None:
    """Space reserved before sizes are known is enough for whatever they turn out to be."""
    bound = header_bound([(entry.key, entry.shape) for entry in listed], {"a": "b"})
    final = [
        entry if size is None else HeaderEntry(entry.key, "U8", (size // 16,))
        for entry, size in zip(listed, compressed[: len(listed)], strict=True)
    ]
    header = build_header(list_entries(final), {"a": "b"}, reserve=bound)
    assert len(header) == bound
    assert list(parse_safetensors_header(header).entries) == [entry.key for entry in listed]


def test_keys_say_which_part_is_held() -> None:
    """A whole tensor has its own name; a part has its box; the name that safetensors reserves is never used bare."""
    assert entry_key("w", (4, 6), Box((0, 0), (4, 6))) == "w"
    assert entry_key("w", (4, 6), Box((2, 0), (2, 6))) == "w[2:4,0:6]"
    assert entry_key("step", (), Box((), ())) == "step"
    assert entry_key("__metadata__", (2,), Box((0,), (2,))) == "__metadata__[0:2]"


@pytest.mark.parametrize(
    "listed",
    [
        [HeaderEntry("w[0:2]", "U8", (1,)), HeaderEntry("w[0:2]", "U8", (1,))],
        [HeaderEntry("__metadata__", "U8", (1,))],
        [HeaderEntry("\ud800", "U8", (1,))],
    ],
)
def test_unlistable_names_are_refused(listed: list[HeaderEntry]) -> None:
    """A tensor whose name can't be told from another's isn't written over it."""
    with pytest.raises(UsageError):
        build_header(list_entries(listed), {"format": "pt"})


def test_more_entries_than_readers_accept() -> None:
    """A file that stock readers would refuse isn't written; the save says why before it writes anything."""
    many = [(f"{n}{'x' * 1_000_000}", ()) for n in range(100)]
    with pytest.raises(UsageError, match="too many tensors"):
        header_bound(many)
    with pytest.raises(UsageError, match="too many tensors"):
        build_header(list_entries(HeaderEntry(key, "U8", (1,)) for key, _ in many))


GOOD = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": bytes(7),
    "no header": struct.pack("<Q", 0),
    "header of 2**64 bytes": b"\xff" * 8 + b"{}",
    "header over the limit": struct.pack("<Q", 100_000_001) + b"{}",
    "cut short": raw({"a": GOOD})[:-1],
    "not UTF-8": raw(b'{"\xff": 1}'),
    "not JSON": raw(b"{"),
    "two values": raw(b"{}{}"),
    "a list": raw([]),
    "deep": raw(b"[" * 100_000),
    "a number of many digits": raw(b'{"a": ' + b"9" * 100_000 + b"}"),
    "NaN": raw(b'{"a": NaN}'),
    "half a surrogate pair": raw(b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
    "a key twice": raw(b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": 1}'),
    "a field twice": raw(b'{"a": {"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
    "metadata isn't an object": raw({"__metadata__": []}),
    "metadata isn't text": raw({"__metadata__": {"a": 1}}),
    "entry isn't an object": raw({"a": 1}),
    "field missing": raw({"a": {"dtype": "U8", "shape": [2]}}),
    "field too many": raw({"a": GOOD | {"offset": 1}}),
    "dtype unknown": raw({"a": GOOD | {"dtype": "U7"}}),
    "dtype isn't text": raw({"a": GOOD | {"dtype": []}}),
    "shape isn't a list": raw({"a": GOOD | {"shape": 2}}),
    "shape of true": raw({"a": GOOD | {"shape": [True, 2]}}),
    "shape of floats": raw({"a": GOOD | {"shape": [2.0]}}),
    "shape negative": raw({"a": GOOD | {"shape": [-1, -2]}}),
    "shape overflows to what fits": raw({"a": GOOD | {"shape": [1 << 63, 4, 2]}}),
    "shape of a million large sizes": raw({"a": GOOD | {"shape": [(1 << 64) - 1] * 1_000_000}}),
    "shape and bytes differ": raw({"a": GOOD | {"shape": [3]}}),
    "F32 in two bytes": raw({"a": GOOD | {"dtype": "F32"}}),
    "odd number of F4": raw({"a": GOOD | {"dtype": "F4", "shape": [3]}}),
    "one offset": raw({"a": GOOD | {"data_offsets": [0]}}),
    "offsets reversed": raw({"a": GOOD | {"data_offsets": [2, 0]}}),
    "offsets negative": raw({"a": GOOD | {"data_offsets": [-2, 0]}}),
    "gap at the start": raw({"a": GOOD | {"data_offsets": [1, 3]}}),
    "gap": raw({"a": GOOD, "b": GOOD | {"data_offsets": [3, 5]}}),
    "overlap": raw({"a": GOOD, "b": GOOD | {"data_offsets": [1, 3]}}),
    "the same bytes twice": raw({"a": GOOD, "b": GOOD}),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused(kind: str) -> None:
    """A forged header points at nothing outside its file, and costs neither time nor memory to refuse."""
    with pytest.raises(CorruptCheckpointError):
        parse_safetensors_header(HOSTILE[kind])


@given(st.data())
def test_damaged_headers_never_escape_the_error_tree(data: st.DataObject) -> None:
    """Whatever a disk does to a header, the caller sees our error and no other."""
    header = bytearray(
        build_header(list_entries([HeaderEntry("a", "F32", (2, 3)), HeaderEntry("b", "U8", ())]), {"c": "d"})
    )
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, 200))] = data.draw(st.integers(0, 255))
    try:
        parse_safetensors_header(bytes(header))
    except CorruptCheckpointError:
        return
