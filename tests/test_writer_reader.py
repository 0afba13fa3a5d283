"""From tensors to a shard and back: what is written, what is read, and what happens when either goes wrong."""

import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardckpt.box import Box, full_box, relative_to, slices
from shardckpt.codecs import DIGEST_BLOCK, DTYPES, SAFETENSORS_TAGS, digest, digests_text
from shardckpt.errors import (
    CorruptCheckpointError,
    ObjectNotFoundError,
    StateMismatchError,
    StorageError,
    StorageFullError,
    UnsupportedFormatError,
)
from shardckpt.filenames import rank_manifest_name, shard_name
from shardckpt.manifest import Manifest, decode_rank_manifest, encode
from shardckpt.planner import Wanted
from shardckpt.reader import Reading, ReadPlan, ReadStats, Target, read_bytes
from shardckpt.reader import targets as reader_targets
from shardckpt.reader.fetch import cells_of, union
from shardckpt.staging import Source, StagingPool, copyable, stage
from shardckpt.storage import BLOCK, LocalStorage, Storage
from shardckpt.writer import ShardWriter
from shards import SAVE_ID, in_order, noise, publish, raw, save, small_grid, source, whole, write_shard
from storage.wrappers import CountingStorage, FaultyStorage, SlowStorage

SHARD = shard_name(0, SAVE_ID)
CODECS = [None, ("zstd", 1)]
# Torch warns of every use of ComplexHalf.
NAMES = sorted(name for name in DTYPES if name != "complex32")


@pytest.fixture
def pool() -> Iterator[StagingPool]:
    pool = StagingPool()
    yield pool
    pool.close()


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "checkpoint")


def plan_of(manifest: Manifest, storage: Storage, targets: Sequence[Target]) -> ReadPlan:
    return ReadPlan(manifest, storage, [Wanted(target.fqn, target.box) for target in targets])


def read_targets(
    manifest: Manifest,
    storage: Storage,
    found: Sequence[Target],
    *,
    threads: int | None = None,
    read_memory: int = reader_targets.READ_MEMORY,
    **options: Any,
) -> ReadStats:
    """Plan and read at once, by so many threads, through so many bytes of memory."""
    width = storage.width if threads is None else threads
    with mock.patch.object(storage, "width", width), mock.patch.object(reader_targets, "READ_MEMORY", read_memory):
        reading = Reading(plan_of(manifest, storage, found), found, **options)
        reading.alone()
    return reading.stats


def flip(storage: LocalStorage, name: str, offset: int) -> None:
    """Damage one byte of a file."""
    path = Path(storage.directory) / name
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


LAYOUTS = st.sampled_from(["contiguous", "transposed", "stepped", "offset"])


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The elements of `tensor` in other memory, in another order or with gaps."""
    return _laid_out(copyable(tensor), layout).view(tensor.dtype)


def _laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    backwards = tuple(reversed(range(tensor.ndim)))
    if layout == "transposed":
        return tensor.permute(backwards).contiguous().permute(backwards)
    if layout == "stepped" and tensor.ndim:
        wide = noise(*tensor.shape[:-1], tensor.shape[-1] * 2, dtype=tensor.dtype)
        wide[..., ::2].copy_(tensor)
        return wide[..., ::2]
    if layout == "offset":
        longer = noise(tensor.numel() + 3, dtype=tensor.dtype)
        longer[1 : 1 + tensor.numel()].copy_(tensor.reshape(-1))
        return longer[1 : 1 + tensor.numel()].view(tensor.shape)
    return tensor.clone(memory_format=torch.contiguous_format)


@st.composite
def cuts(draw: st.DrawFn, box: Box) -> list[Box]:
    """Boxes that tile `box`."""
    wide = [dim for dim, length in enumerate(box.lengths) if length > 1]
    if not wide or draw(st.integers(0, 2)) == 0:
        return [box]
    dim = draw(st.sampled_from(wide))
    at = draw(st.integers(1, box.lengths[dim] - 1))
    parts = []
    for start, length in ((0, at), (at, box.lengths[dim] - at)):
        offsets = (*box.offsets[:dim], box.offsets[dim] + start, *box.offsets[dim + 1 :])
        lengths = (*box.lengths[:dim], length, *box.lengths[dim + 1 :])
        parts.extend(draw(cuts(Box(offsets, lengths))))
    return parts


@st.composite
def regions(draw: st.DrawFn, box: Box) -> Box:
    """Some box within `box`, which isn't empty."""
    starts = [draw(st.integers(0, length - 1)) for length in box.lengths]
    lengths = [draw(st.integers(1, length - start)) for start, length in zip(starts, box.lengths, strict=True)]
    return Box(tuple(map(sum, zip(box.offsets, starts, strict=True))), tuple(lengths))


SHAPES = st.one_of(
    st.lists(st.integers(0, 6), max_size=4),
    st.lists(st.integers(1, 90), min_size=2, max_size=2),
    st.lists(st.integers(5_000, 40_000), min_size=1, max_size=1),
).map(tuple)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any tensors, cut and laid out in any way, come back in any other cut and layout, byte for byte."""
    tensors = {
        f"t{number}": noise(*shape, dtype=DTYPES[name], seed=number)
        for number, (shape, name) in enumerate(
            data.draw(st.lists(st.tuples(SHAPES, st.sampled_from(NAMES)), min_size=1, max_size=6), label="tensors")
        )
    }
    world = data.draw(st.integers(1, 3), label="ranks")
    codec = data.draw(st.sampled_from(CODECS), label="codec")
    limit = data.draw(st.sampled_from([None, 1, 2 * 16 << 10]), label="limit")
    storage = LocalStorage(tmp_path_factory.mktemp("checkpoint"))
    by_rank: list[list[Source]] = [[] for _ in range(world)]
    for fqn, tensor in tensors.items():
        for box in data.draw(cuts(full_box(tensor.shape))):
            part = laid_out(tensor[slices(box)], data.draw(LAYOUTS))
            by_rank[data.draw(st.integers(0, world - 1))].append(source(fqn, part, box, tensor.shape))
    with small_grid():
        pool = StagingPool()
        ranks = [
            write_shard(storage, in_order(sources), pool=pool, rank=rank, codec=codec, limit=limit)
            for rank, sources in enumerate(by_rank)
        ]
        manifest = publish(storage, ranks, {fqn: tensor.shape for fqn, tensor in tensors.items()})
        targets = []
        for fqn, tensor in tensors.items():
            if tensor.numel():
                for box in data.draw(st.lists(regions(full_box(tensor.shape)), max_size=2)):
                    empty = laid_out(noise(*box.lengths, dtype=tensor.dtype, seed=99), data.draw(LAYOUTS))
                    targets.append(Target(fqn, box, empty))
            targets.append(whole(fqn, noise(*tensor.shape, dtype=tensor.dtype, seed=98)))
        stats = read_targets(manifest, storage, targets, pool=pool, threads=2, read_memory=1)
        pool.close()
    for target in targets:
        assert torch.equal(raw(target.tensor), raw(tensors[target.fqn][slices(target.box)])), target.box
    assert stats.placing == any(tensor.numel() for tensor in tensors.values())
    for rank in ranks:
        check_with_safetensors(storage, rank.file, codec is not None, by_rank[rank.rank])


def check_with_safetensors(storage: LocalStorage, name: str, compressed: bool, sources: list[Source]) -> None:
    """The stock reader opens the file and, uncompressed, finds the same bytes."""
    with safetensors.safe_open(Path(storage.directory) / name, framework="pt") as opened:
        assert set(opened.keys()) == {item.key for item in sources}
        if compressed:
            return
        for item in sources:
            found = opened.get_tensor(item.key)
            assert torch.equal(raw(found), raw(item.tensor)), item.key
            if SAFETENSORS_TAGS[item.dtype] is not None:
                assert (found.dtype, found.shape) == (item.tensor.dtype, item.tensor.shape)


@pytest.mark.parametrize("codec", CODECS)
def test_many_blocks(storage: LocalStorage, pool: StagingPool, codec: tuple[str, int] | None) -> None:
    """At true sizes too: blocks and digest blocks that straddle, an odd end, and cuts across both."""
    tensors = {
        "a": noise(3_000, 1_501),
        "b": torch.arange(5_000_003),
        "c": noise(8_000_001, dtype=torch.bfloat16),
        "d": torch.zeros(5_000_000, dtype=torch.uint8),
    }
    manifest = save(storage, tensors, pool, codec=codec, limit=3 * BLOCK)
    found = {fqn: torch.empty_like(tensor) for fqn, tensor in tensors.items()}
    columns = Box((5, 700), (2_900, 333))
    part = torch.empty(columns.lengths)
    targets = [*(whole(fqn, tensor) for fqn, tensor in found.items()), Target("a", columns, part)]
    read_targets(manifest, storage, targets, pool=pool, read_memory=2 * BLOCK)
    for fqn, tensor in tensors.items():
        assert torch.equal(raw(found[fqn]), raw(tensor)), fqn
    assert torch.equal(raw(part), raw(tensors["a"][slices(columns)]))
    assert manifest.files[0].size == storage.size(SHARD)
    if codec is not None:
        assert manifest.files[0].size < sum(tensor.nbytes for tensor in tensors.values()) - 20_000_000
    with safetensors.safe_open(Path(storage.directory) / SHARD, framework="pt") as opened:
        assert set(opened.keys()) == set(tensors)


@pytest.mark.parametrize("codec", CODECS)
def test_header_larger_than_a_block(storage: LocalStorage, pool: StagingPool, codec: tuple[str, int] | None) -> None:
    """Models with very many tensors have headers that fill several pieces of the file."""
    tensors = {f"{number:04}." + "x" * 9_000: torch.full((3,), float(number)) for number in range(2_000)}
    manifest = save(storage, tensors, pool, codec=codec)
    found = {fqn: torch.empty(3) for fqn in tensors}
    read_targets(manifest, storage, [whole(*item) for item in found.items()], pool=pool)
    assert all(torch.equal(found[fqn], tensors[fqn]) for fqn in tensors)
    with safetensors.safe_open(Path(storage.directory) / SHARD, framework="pt") as opened:
        assert len(list(opened.keys())) == 2_000


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("tensors", [{}, {"a": torch.empty(0, 3)}])
def test_rank_without_data(
    storage: LocalStorage, pool: StagingPool, codec: tuple[str, int] | None, tensors: dict[str, torch.Tensor]
) -> None:
    """A rank that has nothing to write writes a shard all the same, and reading needs no memory for it."""
    manifest = save(storage, tensors, pool, codec=codec)
    stats = read_targets(manifest, storage, [whole(*item) for item in tensors.items()], pool=pool)
    assert (stats.bytes_read, stats.placing, pool.nbytes) == (0, False, 0)
    with safetensors.safe_open(Path(storage.directory) / SHARD, framework="pt") as opened:
        assert list(opened.keys()) == list(tensors)


def test_rank_manifest_says_what_landed(storage: LocalStorage, pool: StagingPool) -> None:
    """The digests are of the bytes in the file, from the grid that restarts at each entry, header included."""
    save(storage, {"a": noise(600_000), "b": noise(5, dtype=torch.uint8)}, pool)
    data = (Path(storage.directory) / SHARD).read_bytes()
    rank = decode_rank_manifest(storage.get(rank_manifest_name(0, SAVE_ID)), "it")
    assert rank.size == len(data)
    assert rank.header_digest == digests_text([digest(data[: rank.header_nbytes])])
    assert rank.header_nbytes % 4096 == 0
    for entry in rank.entries.values():
        stored = data[entry.offset : entry.offset + entry.nbytes]
        blocks = [stored[at : at + DIGEST_BLOCK] for at in range(0, len(stored), DIGEST_BLOCK)]
        assert entry.digests == digests_text(map(digest, blocks))


@pytest.mark.parametrize("codec", CODECS)
def test_damage_is_found_and_named(storage: LocalStorage, pool: StagingPool, codec: tuple[str, int] | None) -> None:
    """A flipped bit never reaches a model: the error names tensor, file and byte."""
    tensors = {"first": noise(100), "second": noise(700_000)}
    manifest = save(storage, tensors, pool, codec=codec)
    entry = manifest.tensors["second"]
    flip(storage, SHARD, entry.offset[0] + entry.nbytes[0] - 1)
    read_targets(manifest, storage, [whole("first", torch.empty(100))], pool=pool)
    stats = ReadStats()
    found = torch.zeros(700_000)
    with pytest.raises(CorruptCheckpointError, match=rf"'second' in .*{SHARD} at byte \d+ is damaged"):
        read_targets(manifest, storage, [whole("second", found)], pool=pool, stats=stats)
    assert not torch.equal(found, tensors["second"])
    assert stats.placing == bool(found.count_nonzero())


@pytest.mark.parametrize("codec", CODECS)
def test_every_damaged_byte_is_found(tmp_path: Path, pool: StagingPool, codec: tuple[str, int] | None) -> None:
    """Whichever byte of the data or of a rank's manifest is damaged, the read says so and changes nothing."""
    storage = LocalStorage(tmp_path)
    manifest = save(storage, {"a": noise(10)}, pool, codec=codec)
    entry = manifest.tensors["a"]
    places = [(SHARD, entry.offset[0] + at) for at in range(entry.nbytes[0])]
    places += [(manifest.files[0].manifest, at) for at in range(0, manifest.files[0].manifest_size, 7)]
    for name, offset in places:
        flip(storage, name, offset)
        found, stats = torch.zeros(10), ReadStats()
        with pytest.raises(CorruptCheckpointError):
            read_targets(manifest, storage, [whole("a", found)], pool=pool, stats=stats)
        assert (stats.placing, int(found.count_nonzero())) == (False, 0)
        flip(storage, name, offset)
    read_targets(manifest, storage, [whole("a", torch.zeros(10))], pool=pool)


class Heated(LocalStorage):
    """A directory of which all is in the cache, or nothing."""

    def __init__(self, directory: str, *, hot: bool) -> None:
        super().__init__(directory)
        self.hot = hot
        self.reads: list[tuple[int, bool]] = []

    def read_into(self, name: str, offset: int, into: memoryview, *, cached: bool = True) -> None:
        self.reads.append((len(into), cached))
        super().read_into(name, offset, into, cached=cached)

    def in_cache(self, name: str, offset: int, nbytes: int) -> bool:
        return self.hot


@pytest.fixture
def cell_by_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache has is read in steps of one digest block, so that a few make several steps."""
    monkeypatch.setattr("shardckpt.reader.parts.CACHED_STEP", DIGEST_BLOCK)


@pytest.mark.usefixtures("cell_by_cell")
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("hot", [True, False])
def test_hot_or_not_nothing_is_taken_unverified(
    storage: LocalStorage, pool: StagingPool, codec: tuple[str, int] | None, hot: bool
) -> None:
    """However bytes come, a damaged block is found, nothing after it is placed, and all that is read is counted."""
    tensor = noise(5 * DIGEST_BLOCK + 4099, dtype=torch.uint8)
    tensors = {"odd": noise(1001, dtype=torch.uint8), "a": tensor, **{f"{n:03}": noise(9) for n in range(100)}}
    manifest = save(storage, tensors, pool, codec=codec)
    heated = Heated(storage.directory, hot=hot)
    found = {fqn: torch.zeros_like(tensor) for fqn, tensor in tensors.items()}
    stats = read_targets(manifest, heated, [whole(*item) for item in found.items()], pool=pool, threads=1)
    assert all(torch.equal(raw(found[fqn]), raw(tensors[fqn])) for fqn in tensors)
    assert stats.bytes_read == sum(nbytes for nbytes, _ in heated.reads) + manifest.files[0].manifest_size
    assert {cached for _, cached in heated.reads} == {hot}

    heated.reads.clear()
    only = [whole("a", torch.zeros_like(tensor))]
    read_targets(manifest, heated, only, pool=pool, threads=1)
    assert len(heated.reads) == (6 if hot else 1)
    entry = manifest.tensors["a"]
    at = entry.offset[0] + (3 * DIGEST_BLOCK + 5 if codec is None else entry.nbytes[0] // 2)
    flip(storage, SHARD, at)
    only[0].tensor.zero_()
    with pytest.raises(CorruptCheckpointError, match="'a' in .* is damaged"):
        read_targets(manifest, heated, only, pool=pool, threads=1)
    blocks = only[0].tensor[: 5 * DIGEST_BLOCK].view(5, DIGEST_BLOCK).any(dim=1).tolist()
    reached = blocks.index(False)
    assert blocks == [index < reached for index in range(5)]
    # What the cache has is verified where it belongs, so the damaged block is the last that was placed.
    straight = hot and codec is None
    assert reached == (4 if straight else reached if hot else 0)
    intact = reached - straight
    assert torch.equal(only[0].tensor[: intact * DIGEST_BLOCK], tensor[: intact * DIGEST_BLOCK])


class Placing(LocalStorage):
    """A directory that notes to which of the `targets` reads went straight; the page cache has all of it or none."""

    def __init__(self, directory: str, targets: Sequence[Target], *, hot: bool) -> None:
        super().__init__(directory)
        self.hot = hot
        self.straight: set[str] = set()
        self._targets = targets

    def read_into(self, name: str, offset: int, into: memoryview, *, cached: bool = True) -> None:
        address = torch.frombuffer(into, dtype=torch.uint8).data_ptr()
        for fqn, _, tensor in self._targets:
            start = tensor.untyped_storage().data_ptr()
            if start <= address < start + tensor.untyped_storage().nbytes():
                assert address + len(into) <= start + tensor.untyped_storage().nbytes()
                self.straight.add(fqn)
        super().read_into(name, offset, into, cached=cached)

    def in_cache(self, name: str, offset: int, nbytes: int) -> bool:
        return self.hot


@pytest.mark.usefixtures("cell_by_cell")
@pytest.mark.parametrize(("hot", "has_cache"), [(True, True), (False, True), (False, False)])
def test_bytes_go_straight_to_where_they_belong_as_they_are(
    storage: LocalStorage, pool: StagingPool, hot: bool, has_cache: bool
) -> None:
    """Copies are spared exactly where a whole target run takes whole blocks, and the result is the same."""
    rows = 3 * DIGEST_BLOCK // 1024
    tensors = {name: noise(rows, 256) for name in ("whole", "rows", "columns", "turned", "twice", "double")}
    tensors["small"] = noise(100)
    manifest = save(storage, tensors, pool)

    def part(name: str, box: Box, tensor: torch.Tensor) -> Target:
        return Target(name, box, tensor)

    below = rows - 100
    targets = [
        whole("whole", torch.zeros(rows, 256)),
        part("rows", Box((100, 0), (below, 256)), torch.zeros(below, 256)),
        part("columns", Box((0, 3), (rows, 200)), torch.zeros(rows, 200)),
        whole("turned", torch.zeros(256, rows).t()),
        whole("twice", torch.zeros(rows, 256)),
        whole("twice", torch.zeros(rows, 256)),
        whole("double", torch.zeros(rows, 256, dtype=torch.float64)),
        whole("small", torch.zeros(100)),
    ]
    placing = Placing(storage.directory, targets, hot=hot)
    if not has_cache:
        placing.read_cache = ""
    read_targets(manifest, placing, targets, pool=pool, convert_dtype=True)
    for fqn, box, tensor in targets:
        wanted = tensors[fqn][slices(box)].to(tensor.dtype)
        assert torch.equal(raw(tensor.contiguous()), raw(wanted.contiguous())), fqn
    if hot:
        assert placing.straight == {"whole", "rows"}
    elif has_cache:
        assert not placing.straight
    else:
        assert placing.straight <= {"whole", "rows"}
        alone = [whole("whole", torch.zeros(rows, 256))]
        placing = Placing(storage.directory, alone, hot=hot)
        placing.read_cache = ""
        read_targets(manifest, placing, alone, pool=pool)
        assert placing.straight == {"whole"}


@pytest.mark.parametrize("has_cache", [True, False])
def test_a_crowd_is_one_only_where_there_is_a_cache(
    storage: LocalStorage, pool: StagingPool, monkeypatch: pytest.MonkeyPatch, has_cache: bool
) -> None:
    """A process of several that loads alone goes through the cache they share, if there is one."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    tensor = noise(1001)
    manifest = save(storage, {"a": tensor}, pool)
    heated = Heated(storage.directory, hot=False)
    if not has_cache:
        heated.read_cache = ""
    read_targets(manifest, heated, [whole("a", torch.zeros_like(tensor))], pool=pool, threads=1)
    assert {cached for _, cached in heated.reads} == {has_cache}


def two_ranks(storage: Storage, pool: StagingPool) -> tuple[Manifest, torch.Tensor]:
    """A tensor whose halves lie in two files."""
    storage.prepare()
    tensor = noise(64, 100)
    ranks = []
    for rank in range(2):
        box = Box((32 * rank, 0), (32, 100))
        part = source("a", tensor[slices(box)], box, tensor.shape)
        ranks.append(write_shard(storage, [part], pool=pool, rank=rank))
    return publish(storage, ranks, {"a": tensor.shape}), tensor


@pytest.mark.parametrize("which", ["shard", "manifest"])
@pytest.mark.parametrize("harm", ["missing", "short", "long"])
def test_missing_or_short_file_changes_nothing(storage: LocalStorage, pool: StagingPool, which: str, harm: str) -> None:
    """Before the first byte is placed, every file that will be needed is known to be there in full."""
    manifest, _ = two_ranks(storage, pool)
    name = shard_name(1, SAVE_ID) if which == "shard" else rank_manifest_name(1, SAVE_ID)
    path = Path(storage.directory) / name
    content = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes(content[:-1] if harm == "short" else content + b"\0")
    found, stats = torch.zeros(64, 100), ReadStats()
    for call in (
        lambda: plan_of(manifest, storage, [whole("a", found)]).check(),
        lambda: read_targets(manifest, storage, [whole("a", found)], pool=pool, stats=stats),
    ):
        with pytest.raises(CorruptCheckpointError, match=name) as raised:
            call()
        assert isinstance(raised.value.__cause__, ObjectNotFoundError) == (harm == "missing")
    assert (stats.placing, int(found.count_nonzero())) == (False, 0)


def test_only_what_is_needed_is_read(storage: LocalStorage, pool: StagingPool) -> None:
    """A rank of many reads its own part: no other file, and of its file only the blocks that hold what it wants."""
    manifest, tensor = two_ranks(storage, pool)
    counting = CountingStorage(storage)
    found = torch.empty(10, 100)
    plan_of(manifest, counting, [Target("a", Box((40, 0), (10, 100)), found)]).check()
    assert not counting.bytes_read
    read_targets(manifest, counting, [Target("a", Box((40, 0), (10, 100)), found)], pool=pool)
    assert torch.equal(raw(found), raw(tensor[40:50]))
    assert set(counting.bytes_read) == {shard_name(1, SAVE_ID), rank_manifest_name(1, SAVE_ID)}

    other = LocalStorage(Path(storage.directory) / "large")
    large = noise(20, 1 << 20)
    manifest = save(other, {"a": large}, pool)
    counting = CountingStorage(other)
    columns = torch.empty(20, 1000)
    stats = read_targets(manifest, counting, [Target("a", Box((0, 500), (20, 1000)), columns)], pool=pool)
    assert torch.equal(raw(columns), raw(large[:, 500:1500]))
    assert counting.bytes_read[SHARD] < 21 << 20
    assert stats.bytes_read == sum(counting.bytes_read.values())


def test_neighbours_are_read_together(storage: LocalStorage, pool: StagingPool) -> None:
    """Thousands of small tensors don't become thousands of requests."""
    tensors = {f"{number:04}": noise(64, seed=number) for number in range(3_000)}
    manifest = save(storage, tensors, pool)
    counting = CountingStorage(storage)
    found = {fqn: torch.empty(64) for fqn in tensors}
    read_targets(manifest, counting, [whole(*item) for item in found.items()], pool=pool)
    assert counting.calls["read_into"] == 1
    assert all(torch.equal(raw(found[fqn]), raw(tensors[fqn])) for fqn in tensors)


def test_reads_are_aligned(storage: LocalStorage, pool: StagingPool) -> None:
    """Reads past the page cache: offsets are multiples of a page, and lengths up to the end of the file."""
    manifest = save(storage, {"a": noise(3_000_000), "b": noise(7), "c": noise(3_000_001)}, pool)
    seen: list[tuple[int, int]] = []

    class Watching(Heated):
        def read_into(self, name: str, offset: int, into: memoryview, *, cached: bool = True) -> None:
            assert not cached
            seen.append((offset, len(into)))
            super().read_into(name, offset, into, cached=cached)

    targets = [whole("a", torch.empty(3_000_000)), whole("c", torch.empty(3_000_001))]
    read_targets(manifest, Watching(storage.directory, hot=False), targets, pool=pool)
    end = manifest.files[0].size
    assert len(seen) > 2
    for offset, nbytes in seen:
        assert offset % 4096 == 0
        assert nbytes % 4096 == 0 or offset + nbytes == end
        assert nbytes <= BLOCK


def test_memory_is_bounded(storage: LocalStorage, pool: StagingPool) -> None:
    """A save and a load of any size use the memory they were given, and the load uses what the save left."""
    tensor = noise(6 * BLOCK, dtype=torch.uint8)
    manifest = save(storage, {"a": tensor}, pool, limit=2 * BLOCK)
    assert pool.nbytes <= 2 * BLOCK
    found = torch.empty_like(tensor)
    read_targets(manifest, storage, [whole("a", found)], pool=pool, threads=8, read_memory=2 * BLOCK)
    assert torch.equal(found, tensor)
    assert pool.nbytes <= 2 * BLOCK


def test_slow_storage_holds_staging_back(storage: LocalStorage, pool: StagingPool) -> None:
    """Where the disk is slower than memory, a limited save waits for it rather than allocate."""
    slow = SlowStorage(storage, delay=0.02, methods=["writer.write"])
    save(slow, {"a": noise(8 * BLOCK, dtype=torch.uint8)}, pool, limit=BLOCK)
    assert pool.nbytes == BLOCK


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("limit", [BLOCK, None])
@pytest.mark.parametrize("method", ["create", "writer.write", "writer.commit"])
def test_failing_storage_ends_the_save(
    storage: LocalStorage, pool: StagingPool, method: str, limit: int | None, codec: tuple[str, int] | None
) -> None:
    """The error comes out, the file is gone, staging doesn't hang, and the pool is whole."""
    tensors = {"a": noise(5 * BLOCK, dtype=torch.uint8)}
    for _ in range(3):
        broken = FaultyStorage(storage, method, StorageFullError("no room"), first=1, last=100)
        with pytest.raises(StorageFullError, match="no room"):
            save(broken, tensors, pool, codec=codec, limit=limit)
        assert storage.list() == []
    highest = pool.nbytes
    manifest = save(storage, tensors, pool, codec=codec, limit=limit)
    assert pool.nbytes <= max(highest, 12 * BLOCK)
    found = torch.empty_like(tensors["a"])
    read_targets(manifest, storage, [whole("a", found)], pool=pool)
    assert torch.equal(found, tensors["a"])


def test_staging_learns_of_a_failed_writer(storage: LocalStorage, pool: StagingPool) -> None:
    """Staging stops at the next block instead of copying a terabyte for nothing."""
    storage.prepare()
    sources = [source("a", noise(9 * BLOCK, dtype=torch.uint8))]
    broken = FaultyStorage(storage, "create", StorageFullError("no room"))
    writer = ShardWriter(broken, SHARD, SAVE_ID, 0, sources, pool=pool, codec=None)
    with pytest.raises(StorageFullError):
        writer.run()
    with pytest.raises(StorageFullError):
        stage(sources, pool, limit=BLOCK, first_block_offset=writer.first_block_offset, emit=writer.emit)
    assert pool.nbytes == BLOCK


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_cancelled_save_leaves_nothing(
    storage: LocalStorage, pool: StagingPool, codec: tuple[str, int] | None, blocks: int
) -> None:
    """When staging fails, what was written is removed and the writing thread raises the reason."""
    storage.prepare()
    sources = [source("a", noise(5 * BLOCK, dtype=torch.uint8))]
    writer = ShardWriter(storage, SHARD, SAVE_ID, 0, sources, pool=pool, codec=codec)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            writer.run()
        except MemoryError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(blocks):
        block = pool.take()
        pool.give(block)
    seen = 0

    def emit(block: object) -> None:
        nonlocal seen
        seen += 1
        writer.emit(block)  # type: ignore[arg-type]
        if seen == blocks:
            raise MemoryError("device is gone")

    if blocks:
        with pytest.raises(MemoryError):
            stage(sources, pool, limit=None, first_block_offset=writer.first_block_offset, emit=emit)
    writer.cancel(MemoryError("device is gone"))
    thread.join(60)
    assert [str(error) for error in raised] == ["device is gone"]
    assert storage.list() == []


def test_failing_reads_stop_the_others(storage: LocalStorage, pool: StagingPool) -> None:
    """The first error ends a load: no further range is read, and the memory is given back."""
    manifest = save(storage, {"a": noise(20 * BLOCK, dtype=torch.uint8)}, pool, limit=BLOCK)
    broken = FaultyStorage(CountingStorage(storage), "read_into", StorageError("gone"), first=3, last=1000)
    found = torch.zeros(20 * BLOCK, dtype=torch.uint8)
    stats = ReadStats()
    with pytest.raises(StorageError, match="gone"):
        read_targets(manifest, broken, [whole("a", found)], pool=pool, threads=2, read_memory=BLOCK, stats=stats)
    assert broken.seen < 6
    assert stats.placing
    assert pool.nbytes == BLOCK
    read_targets(manifest, storage, [whole("a", found)], pool=pool, read_memory=BLOCK)
    assert pool.nbytes == BLOCK


def test_targets_of_every_kind(storage: LocalStorage, pool: StagingPool) -> None:
    """Parameters, inference tensors and views are written in place, without a trace in autograd."""
    tensor = noise(30, 40)
    manifest = save(storage, {"a": tensor}, pool)
    parameter = torch.nn.Parameter(torch.zeros(30, 40))
    with torch.inference_mode():
        inference = torch.zeros(30, 40)
    base = torch.zeros(30, 40, requires_grad=True)
    targets = [
        whole("a", parameter),
        whole("a", inference),
        whole("a", base.detach()),
        whole("a", torch.zeros(40, 30).t()),
    ]
    versions = [target.tensor._version for target in (targets[0], targets[3])]
    pointers = [target.tensor.data_ptr() for target in targets]
    read_targets(manifest, storage, targets, pool=pool)
    read_targets(manifest, storage, targets[:1], pool=pool)
    for target in targets:
        assert torch.equal(raw(target.tensor), raw(tensor))
    assert [target.tensor.data_ptr() for target in targets] == pointers
    assert all(a < b._version for a, b in zip(versions, (parameter, targets[3].tensor), strict=True))
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_dtypes_are_converted_only_on_request(storage: LocalStorage, pool: StagingPool) -> None:
    """A model never changes precision without anyone having said so, nor loses imaginary parts at all."""
    tensors = {"a": torch.randn(50, 60), "z": torch.randn(4, dtype=torch.complex64)}
    manifest = save(storage, tensors, pool)
    stats = ReadStats()
    half, strided = torch.zeros(50, 60, dtype=torch.bfloat16), torch.zeros(60, 50, dtype=torch.float64).t()
    with pytest.raises(StateMismatchError, match="'a' is float32 in the checkpoint and bfloat16 here"):
        read_targets(manifest, storage, [whole("a", half)], pool=pool, stats=stats)
    read_targets(manifest, storage, [whole("a", half), whole("a", strided)], pool=pool, convert_dtype=True)
    assert torch.equal(half, tensors["a"].to(torch.bfloat16))
    assert torch.equal(strided, tensors["a"].double())
    with pytest.raises(StateMismatchError, match="lose half"):
        read_targets(manifest, storage, [whole("z", torch.zeros(4))], pool=pool, convert_dtype=True, stats=stats)
    with pytest.raises(StateMismatchError, match="no tensor 'b'"):
        read_targets(manifest, storage, [whole("b", torch.zeros(4))], pool=pool, stats=stats)
    assert not stats.placing


@pytest.mark.skipif("float4_e2m1fn_x2" not in DTYPES, reason="a dtype of torch 2.8")
def test_impossible_conversions_are_refused_before_anything_changes(storage: LocalStorage, pool: StagingPool) -> None:
    """A conversion that torch doesn't have is found before the first byte is placed, not in the middle."""
    manifest = save(storage, {"a": noise(50), "b": noise(60)}, pool)
    targets = [whole("a", torch.zeros(50)), whole("b", noise(60, dtype=DTYPES["float4_e2m1fn_x2"]))]
    stats = ReadStats()
    with pytest.raises(StateMismatchError, match="'b' .* torch can't convert"):
        read_targets(manifest, storage, targets, pool=pool, convert_dtype=True, stats=stats)
    assert not stats.placing


def test_aliases_are_read_once(storage: LocalStorage, pool: StagingPool) -> None:
    """A tied tensor that is wanted under both names costs one read."""
    tensor = noise(1_000_000)
    manifest = save(storage, {"a": tensor}, pool)
    manifest.aliases["b"] = "a"
    counting = CountingStorage(storage)
    targets = [whole("a", torch.empty(1_000_000)), whole("b", torch.empty(1_000_000))]
    read_targets(manifest, counting, targets, pool=pool)
    assert all(torch.equal(raw(target.tensor), raw(tensor)) for target in targets)
    assert counting.bytes_read[SHARD] < 1.1 * tensor.nbytes


def rewritten(storage: LocalStorage, manifest: Manifest, **changes: object) -> None:
    """Change the only entry of the rank's manifest, as whoever wants to mislead us would: digests and all."""
    name = manifest.files[0].manifest
    rank = decode_rank_manifest(storage.get(name), name)
    for entry in rank.entries.values():
        for field, value in changes.items():
            setattr(entry, field, value)
    data = encode(rank)
    storage.put(name, data, replace=True)
    manifest.files[0].manifest_size = len(data)
    manifest.files[0].manifest_digest = digests_text([digest(data)])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "int32"}, "described differently"),
        ({"lengths": (99,)}, "described differently"),
        ({"fqn": "other"}, "doesn't list"),
        ({"digests": ""}, "should have 1 digests"),
        ({"digests": "00" * 16}, "should have 1 digests"),
        ({"codec": "zstd", "frames": [400]}, "decompressed"),
        ({"codec": "zstd", "frames": [200, 200], "digests": "00" * 16}, "digests"),
        ({"codec": "zstd", "frames": [0, 400]}, "frames"),
        ({"codec": "brotli", "frames": [400]}, "brotli"),
    ],
)
def test_misleading_manifests_are_refused(
    storage: LocalStorage, pool: StagingPool, changes: dict[str, object], says: str
) -> None:
    """The two manifests and the data must agree; nothing is read into a tensor on one's word alone."""
    manifest = save(storage, {"a": noise(100)}, pool)
    rewritten(storage, manifest, **changes)
    found = torch.zeros(100)
    with pytest.raises(CorruptCheckpointError, match=says) as raised:
        read_targets(manifest, storage, [whole("a", found)], pool=pool)
    assert isinstance(raised.value, UnsupportedFormatError) == ("brotli" in says)
    assert not found.count_nonzero()


def test_holes_and_overlaps_are_refused(storage: LocalStorage, pool: StagingPool) -> None:
    """A manifest that lacks a part of a tensor, or has it twice, is no checkpoint of it."""
    manifest, _ = two_ranks(storage, pool)
    tensor = manifest.tensors["a"]
    tensor.starts[1] = (31, 0)
    found = torch.zeros(64, 100)
    with pytest.raises(CorruptCheckpointError, match="'a'"):
        read_targets(manifest, storage, [whole("a", found)], pool=pool)
    tensor.starts[1], tensor.lengths[1] = (33, 0), (31, 100)
    with pytest.raises(CorruptCheckpointError, match="'a'"):
        read_targets(manifest, storage, [whole("a", found)], pool=pool)
    assert not found.count_nonzero()


def test_read_bytes(storage: LocalStorage) -> None:
    """Pickled objects are verified before anyone looks at them, and a huge claim allocates nothing."""
    storage.prepare()
    storage.put("objects.pkl", b"0123456789", replace=True)
    assert read_bytes(storage, "objects.pkl", 2, 5, digests_text([digest(b"23456")])) == b"23456"
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        read_bytes(storage, "objects.pkl", 2, 5, digests_text([digest(b"xxxxx")]))
    with pytest.raises(CorruptCheckpointError, match="ends at byte 10"):
        read_bytes(storage, "objects.pkl", 2, 1 << 60, "0" * 16)
    with pytest.raises(CorruptCheckpointError, match="missing") as raised:
        read_bytes(storage, "nothing.pkl", 0, 1, "0" * 16)
    assert isinstance(raised.value.__cause__, ObjectNotFoundError)


@given(data=st.data())
def test_cells_hold_what_is_wanted(data: st.DataObject) -> None:
    """The blocks chosen for a region hold all of it, lie within the entry, and leave out wide gaps."""
    lengths = data.draw(st.lists(st.integers(1, 2_000), min_size=1, max_size=3).map(tuple))
    itemsize = data.draw(st.sampled_from([1, 8]))
    inner = data.draw(regions(full_box(lengths)))
    chosen = union(cells_of(lengths, inner, itemsize))
    count = full_box(lengths).volume
    total = -(-count * itemsize // DIGEST_BLOCK)
    assert all(0 <= first < stop <= total for first, stop in chosen)
    assert all(a[1] < b[0] for a, b in pairwise(chosen))
    corners = [
        relative_to(full_box(lengths), Box(offsets, (1,) * len(lengths))).offsets
        for offsets in (inner.offsets, tuple(end - 1 for end in inner.ends))
    ]
    for corner in corners:
        index = 0
        for length, at in zip(lengths, corner, strict=True):
            index = index * length + at
        cell = index * itemsize // DIGEST_BLOCK
        assert any(first <= cell < stop for first, stop in chosen)


def test_many_small_tensors_travel_in_blocks(storage: LocalStorage, pool: StagingPool) -> None:
    """Twenty thousand small tensors are written and read in a few long pieces, not one by one."""
    tensors = {f"layers.{number}.weight": torch.zeros(1024) for number in range(20_000)}
    counting = CountingStorage(storage)
    pool.reserve(4 * BLOCK)
    manifest = save(counting, tensors, pool, limit=4 * BLOCK)
    blocks = 20_000 * 4096 // BLOCK + 1
    assert counting.calls["writer.write"] <= blocks + 1
    read_targets(manifest, counting, [whole(*item) for item in tensors.items()], pool=pool)
    assert counting.calls["read_into"] <= 8 * blocks
