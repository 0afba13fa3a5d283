"""Dtype tables, block digests and compressed frames."""

import struct
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shardckpt import codecs
from shardckpt.errors import CorruptCheckpointError, UnsupportedFormatError

SMALL_BLOCK = 16
CUT = st.lists(st.binary(max_size=3 * SMALL_BLOCK), max_size=8)
NOISE = bytes(range(256)) * 64


def stored_dtypes() -> set[torch.dtype]:
    """Every dtype of this torch whose tensors are whole bytes without a scale: what ``torch.save`` takes as raw."""
    every = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    sub_byte = {f"torch.{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
    return {d for d in every if str(d) not in sub_byte and not str(d).startswith(("torch.q", "torch.bits"))}


def test_every_storable_dtype_has_a_name() -> None:
    """A dtype that a new torch brings is noticed here, not by a user whose save is refused."""
    assert set(codecs.DTYPE_NAMES) - stored_dtypes() == set()
    assert stored_dtypes() - set(codecs.DTYPE_NAMES) == set()


@pytest.mark.parametrize("name", codecs.DTYPES)
def test_names_and_sizes_agree_with_torch(name: str) -> None:
    """Byte ranges are computed from these sizes without a tensor at hand."""
    dtype = codecs.torch_dtype(name)
    assert codecs.DTYPE_NAMES[dtype] == name
    assert str(dtype) == f"torch.{name}"
    assert dtype.itemsize == codecs.ITEMSIZE[name]
    # What makes the order by size an alignment.
    assert codecs.ITEMSIZE[name].bit_count() == 1


@pytest.mark.parametrize("name", ["float3", "", "nn", "qint8", "Tensor"])
def test_an_unknown_dtype_is_refused_by_name(name: str) -> None:
    """A forged or future dtype name reaches neither ``getattr(torch, ...)`` nor a KeyError."""
    with pytest.raises(UnsupportedFormatError, match=f"{name!r}, which this version of shardckpt"):
        codecs.torch_dtype(name)


def test_a_dtype_that_this_torch_lacks_is_told_apart() -> None:
    """Whoever loads with an older torch learns that torch is what to upgrade."""
    with mock.patch.object(codecs, "DTYPES", {}), pytest.raises(UnsupportedFormatError, match="which torch "):
        codecs.torch_dtype("float32")


def test_digest_is_xxh3_64() -> None:
    """Digests of checkpoints that exist stay valid: these are xxHash's own published values."""
    assert codecs.digest(b"") == 0x2D06800538D394C2
    assert codecs.digest(b"a") == 0xE6C632B61E964E1F
    assert codecs.digests_text([0x2D06800538D394C2, 1]) == "2d06800538d394c20000000000000001"


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_digests_survive_their_text(digests: list[int]) -> None:
    """What the manifest says is what was computed."""
    assert codecs.parse_digests(codecs.digests_text(digests)) == digests


@pytest.mark.parametrize("text", ["0", "00" * 7, "00" * 9, "0g" * 8, " " + "00" * 7 + "0", "00 " * 8, "٠" * 16])
def test_text_that_is_no_digests(text: str) -> None:
    """A damaged manifest is reported as such."""
    with pytest.raises(CorruptCheckpointError, match="digests"):
        codecs.parse_digests(text)


@given(CUT, st.integers(1, 5))
def test_frames_hold_one_block_each(pieces: list[bytes], level: int) -> None:
    """A part of a compressed tensor can be read by its frames alone, however its bytes reached the encoder."""
    with mock.patch.object(codecs, "DIGEST_BLOCK", SMALL_BLOCK):
        frames = list(codecs.compress_frames(map(memoryview, pieces), level))
        whole = b"".join(pieces)
        blocks = [whole[at : at + SMALL_BLOCK] for at in range(0, len(whole), SMALL_BLOCK)]
        with mock.patch.object(codecs, "DIGEST_BLOCK", 1 << 20):
            assert [codecs.decompress_frame(f, len(b)) for f, b in zip(frames, blocks, strict=True)] == blocks


def test_full_size_frames() -> None:
    """The real block size works at the lowest and the highest level, on data that shrinks and data that doesn't."""
    noise = torch.randint(0, 256, (codecs.DIGEST_BLOCK + 5,), dtype=torch.uint8).numpy().tobytes()
    for data in (noise, bytes(len(noise))):
        for level in (1, 22):
            frames = list(codecs.compress_frames([data[:7], data[7:]], level))
            sizes = [codecs.DIGEST_BLOCK, 5]
            assert b"".join(map(codecs.decompress_frame, frames, sizes)) == data


def test_threads_do_not_share_a_compressor() -> None:
    """Several writers may compress at once; zstandard's contexts break when they are shared."""
    data = [bytes([n]) * 300_000 + NOISE for n in range(8)]

    def there_and_back(raw: bytes) -> bytes:
        return b"".join(codecs.decompress_frame(f, len(raw)) for f in codecs.compress_frames([raw], 3))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(there_and_back, data * 8)) == data * 8


def hostile_frames() -> dict[str, bytes]:
    good = zstandard.ZstdCompressor().compress(NOISE)
    skippable = struct.pack("<II", 0x184D2A50, len(NOISE)) + NOISE
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters.from_level(1, window_log=27))
    stream = wide.compressobj(size=1 << 28)
    return {
        "empty": b"",
        "no zstd": NOISE,
        "cut short": good[:-1],
        "header only": good[:8],
        "followed by a byte": good + b"\0",
        "followed by a frame": good + good,
        "skippable": skippable,
        "behind a skippable one": skippable + good,
        "shorter than stated by the manifest": zstandard.ZstdCompressor().compress(NOISE[:-1]),
        "longer than stated by the manifest": zstandard.ZstdCompressor().compress(NOISE + b"\0"),
        "bomb": zstandard.ZstdCompressor().compress(bytes(1 << 26)),
        "size not stated": zstandard.ZstdCompressor(write_content_size=False).compress(NOISE),
        "window of 128 MiB": stream.compress(NOISE) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK),
    }


@pytest.mark.parametrize("kind", hostile_frames())
def test_hostile_frames_are_refused(kind: str) -> None:
    """A forged frame neither fills memory nor passes for data."""
    with pytest.raises(CorruptCheckpointError):
        codecs.decompress_frame(hostile_frames()[kind], len(NOISE))


@pytest.mark.parametrize("nbytes", [-1, 0, codecs.DIGEST_BLOCK + 1, 1 << 62])
def test_no_frame_holds_more_than_a_block(nbytes: int) -> None:
    """A manifest that states a huge frame is refused before memory is asked for."""
    with pytest.raises(CorruptCheckpointError, match="can't hold"):
        codecs.decompress_frame(zstandard.ZstdCompressor().compress(NOISE), nbytes)


@given(st.data())
def test_damaged_frames_never_escape_the_error_tree(data: st.DataObject) -> None:
    """Whatever a disk does to a frame, the caller sees our error, or as many bytes as were promised."""
    frame = bytearray(zstandard.ZstdCompressor().compress(NOISE))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        raw = codecs.decompress_frame(bytes(frame), len(NOISE))
    except CorruptCheckpointError:
        return
    assert len(raw) == len(NOISE)
