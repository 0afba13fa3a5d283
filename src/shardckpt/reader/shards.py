"""The files that a read needs: checked before anything is placed, then verified block by block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from typing import Final, NamedTuple

import torch

from shardckpt.box import Box, contiguous_span, relative_to
from shardckpt.codecs import (
    DIGEST_BLOCK,
    ZSTD,
    decompress_frame,
    digest,
    digests_text,
    itemsize_of,
    parse_digests,
    torch_dtype,
)
from shardckpt.errors import CorruptCheckpointError, ObjectNotFoundError, UnsupportedFormatError
from shardckpt.garbage import held_off
from shardckpt.manifest import FileEntry, RankManifest, ShardEntry, TensorEntry, decode_rank_manifest
from shardckpt.reader.common import points
from shardckpt.reader.fetch import PAGE, Extent, Run, cells_of, union
from shardckpt.reader.place import Placement, Target
from shardckpt.staging import Block
from shardckpt.storage import BLOCK, Read, Storage

MAX_CELL: Final = BLOCK - PAGE
"""Stored bytes of a cell that fit into a block wherever they start. Frames of incompressible data are far from it."""


class Damage(NamedTuple):
    """Bytes [start, stop) of a file that are not what was written: digests in 16 hex digits."""

    start: int
    stop: int
    expected: str
    found: str


class Piece:
    """An entry of a shard, and what it is wanted for."""

    __slots__ = (
        "_digests",
        "_itemsize",
        "_name",
        "_torch_dtype",
        "box",
        "compressed",
        "dtype",
        "entry",
        "fqn",
        "nbytes",
        "offset",
        "placements",
        "wanted",
    )

    def __init__(self, fqn: str, tensor: TensorEntry, shard: int, box: Box) -> None:
        self.fqn = fqn
        self.entry = fqn, shard
        """The tensor's name and the number of its stored box."""
        self.box = box
        self.dtype = tensor.dtype
        self.offset = tensor.offset[shard]
        self.nbytes = tensor.nbytes[shard]
        self.wanted: list[tuple[int, Box]] = []
        """What of it is wanted: for which target, by its number, and which box of the whole tensor."""
        self.placements: list[Placement] = []
        """The copies that bring it there, after `bind`."""
        self._itemsize = itemsize_of(tensor.dtype)
        self.compressed = False
        self._digests = ""
        self._name = ""

    def stretch(self) -> tuple[int, int]:
        """Between which bytes of the file what is wanted lies, roughly: as if nothing were compressed."""
        spans = [(0, box.volume) if box == self.box else contiguous_span(self.box, box) for _, box in self.wanted]
        start, stop = min(start for start, _ in spans), max(stop for _, stop in spans)
        return self.offset + start * self._itemsize, self.offset + stop * self._itemsize

    def bind(self, targets: Sequence[Target]) -> None:
        """Say where what is wanted goes. Raises UnsupportedFormatError where this torch lacks the dtype."""
        self._torch_dtype = torch_dtype(self.dtype)
        self.placements = [Placement(self.box, box, targets[number], self._torch_dtype) for number, box in self.wanted]

    def also(self, placements: Sequence[Placement]) -> "Piece":
        """The same entry, to be copied elsewhere too."""
        other = copy(self)
        other.placements = [*self.placements, *placements]
        return other

    def extent(self, entry: ShardEntry, name: str) -> "Extent[Piece]":
        """Which of its bytes to read, now that `entry` of the rank's manifest is known; `name` is the file's.

        Raises CorruptCheckpointError where the two manifests differ or the entry is impossible.
        """
        stated = (entry.dtype, entry.starts, entry.lengths, entry.nbytes)
        raw = self.box.volume * self._itemsize
        cells = -(-raw // DIGEST_BLOCK)
        if stated != (self.dtype, self.box.offsets, self.box.lengths, self.nbytes):
            raise self._error("is described differently by the two manifests that list it", name, self.offset)
        if len(entry.digests) != 16 * cells:
            raise self._error(f"should have {cells} digests, not {len(entry.digests) / 16:g}", name, self.offset)
        if entry.codec is None:
            if self.nbytes != raw:
                raise self._error(f"should have {raw} bytes, not {self.nbytes}", name, self.offset)
        elif entry.codec != ZSTD:
            raise UnsupportedFormatError(f"tensor {self.fqn!r} is compressed with {entry.codec!r}; upgrade shardckpt")
        elif entry.frames is None or len(entry.frames) != cells or not all(0 < n <= MAX_CELL for n in entry.frames):
            raise self._error(f"should have {cells} frames of ordinary size", name, self.offset)
        self.compressed = entry.codec is not None
        self._digests = entry.digests
        self._name = name
        wanted = [(0, 1)]
        if cells > 1:
            inner = [relative_to(self.box, box) for _, box in self.wanted]
            wanted = union(run for box in inner for run in cells_of(self.box.lengths, box, self._itemsize))
        return Extent(self.offset, self.nbytes, entry.frames, wanted, self)

    def window(self, run: "Run[Piece]") -> memoryview | None:
        """The memory of the one target that wants these cells, where their bytes belong there as they are; else None.

        Of less than a cell too: the state that a damaged file leaves is a broken one, which small states needn't be.
        """
        if self.compressed or len(self.placements) != 1 or run.stop_byte - run.start_byte < DIGEST_BLOCK:
            return None
        start = run.first * DIGEST_BLOCK // self._itemsize
        return self.placements[0].window(start, start + (run.stop_byte - run.start_byte) // self._itemsize)

    def damage(self, run: "Run[Piece]", memory: memoryview, start: int) -> "Iterator[Damage]":
        """The cells that do not have their digests. `memory` holds the file's bytes from `start` on."""
        at = run.start_byte
        for cell, expected in enumerate(parse_digests(self._digests[16 * run.first : 16 * run.stop]), run.first + 1):
            stop = run.stop_byte if cell == run.stop else run.extent.start_of(cell)
            found = digest(memory[at - start : stop - start])
            if found != expected:
                yield Damage(at, stop, digests_text([expected]), digests_text([found]))
            at = stop

    def verify(self, run: "Run[Piece]", memory: memoryview, start: int) -> None:
        """Compare cells with their digests; raises CorruptCheckpointError that names the first that is damaged."""
        for at, stop, expected, found in self.damage(run, memory, start):
            raise self._error(f"is damaged: {stop - at} bytes have the digest {found}, not {expected}", self._name, at)

    def frames(self, run: "Run[Piece]", memory: memoryview, start: int) -> Iterator[tuple[int, bytes]]:
        """Compressed cells by number as raw bytes; raises CorruptCheckpointError for one that is no frame."""
        raw = self.box.volume * self._itemsize
        for cell in range(run.first, run.stop):
            at, stop = run.extent.start_of(cell), run.extent.start_of(cell + 1)
            try:
                data = decompress_frame(memory[at - start : stop - start], min(DIGEST_BLOCK, raw - cell * DIGEST_BLOCK))
            except CorruptCheckpointError as error:
                raise self._error(f"can't be decompressed: {error}", self._name, at) from error
            yield cell, data

    def place(self, run: "Run[Piece]", block: Block, start: int) -> None:
        """Copy verified cells to where they are wanted. `block` holds the file's bytes from `start` on."""
        if not self.compressed:
            first = run.first * DIGEST_BLOCK // self._itemsize
            at, stop = run.start_byte - start, run.stop_byte - start
            raw: torch.Tensor | None = None
            for placement in self.placements:
                # Making a tensor of a part of the block takes longer than copying a few kilobytes.
                if not placement.copy_bytes(block.address + at, first, (stop - at) // self._itemsize):
                    raw = block.tensor[at:stop] if raw is None else raw
                    placement.copy(raw, self._torch_dtype, first)
            return
        for cell, data in self.frames(run, block.memory, start):
            # Torch warns of memory that mustn't be written, so bytes won't do.
            self._copy(torch.frombuffer(bytearray(data), dtype=torch.uint8), cell)

    def _copy(self, raw: torch.Tensor, first_cell: int) -> None:
        for placement in self.placements:
            placement.copy(raw, self._torch_dtype, first_cell * DIGEST_BLOCK // self._itemsize)

    def _error(self, what: str, name: str, at: int) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"tensor {self.fqn!r} in {name} at byte {at} {what}. Load another checkpoint.")


class ShardFile:
    """One file of a checkpoint that holds wanted elements."""

    def __init__(self, storage: Storage, file: FileEntry) -> None:
        self._storage = storage
        self._file = file
        self.size = file.size
        self.pieces: list[Piece] = []
        self.extents: dict[tuple[str, int], Extent[Piece]] = {}
        """The same pieces as ranges of bytes, by `Piece.entry`, after `open`."""

    def check(self) -> None:
        """Check that the file and its rank's manifest are there, of the right size.

        Raises CorruptCheckpointError; where one is missing, its cause is an ObjectNotFoundError.
        """
        for name, expected in ((self._file.name, self.size), (self._file.manifest, self._file.manifest_size)):
            try:
                size = self._storage.size(name)
            except ObjectNotFoundError as error:
                raise CorruptCheckpointError(f"a file of the checkpoint is missing: {error}") from error
            if size != expected:
                raise CorruptCheckpointError(
                    f"{self._where(name)} should have {expected} bytes, and has {size}. Load another checkpoint."
                )

    def open(self) -> int:
        """Read the manifest and find the pieces in it; returns the bytes read. Raises as `check` does."""
        with held_off():
            entries = listed(self.word())
            self.extents = {piece.entry: self.extent(piece, entries) for piece in self.pieces}
        return self._file.manifest_size

    def word(self) -> RankManifest:
        """The manifest of its rank, held against the digest that the commit record has. Raises as `check` does."""
        where = self._where(self._file.manifest)
        manifest = decode_rank_manifest(self.word_bytes(), where)
        if (manifest.file, manifest.size) != (self._file.name, self.size):
            raise CorruptCheckpointError(f"{where} describes another file than {self._file.name!r} of this checkpoint")
        return manifest

    def word_bytes(self) -> bytes:
        """`word` as its rank wrote it."""
        try:
            data = self._storage.get(self._file.manifest, limit=self._file.manifest_size)
        except ObjectNotFoundError as error:
            raise CorruptCheckpointError(f"a file of the checkpoint is missing: {error}") from error
        if len(data) != self._file.manifest_size or digests_text([digest(data)]) != self._file.manifest_digest:
            where = self._where(self._file.manifest)
            raise CorruptCheckpointError(f"{where} is not the file that was written. Load another checkpoint.")
        return data

    def extent(self, piece: Piece, entries: Mapping[tuple[str, int], ShardEntry]) -> Extent[Piece]:
        """Where a piece lies, by what `listed` found in `word`. Raises CorruptCheckpointError where it does not."""
        entry = entries.get((piece.fqn, piece.offset))
        if entry is None:
            raise CorruptCheckpointError(
                f"{self._where(self._file.manifest)} doesn't list tensor {piece.fqn!r} at byte {piece.offset}"
            )
        return piece.extent(entry, self._where(self._file.name))

    def points(self, apart: int) -> Iterator[int]:
        """What stands for the wanted bytes, so that ranks can compare; see `reader.common`."""
        return points(self._file.name, map(Piece.stretch, self.pieces), apart)

    def read_into(self, offset: int, into: memoryview, *, cached: bool) -> None:
        """Fill `into` with the file's bytes from `offset` on; `cached` as for `Storage.read_into`."""
        self._storage.read_into(self._file.name, offset, into, cached=cached)

    def stream(self, start: int, stop: int) -> AbstractContextManager[Read]:
        """Read the file's bytes [start, stop) from front to back; see `Storage.stream`."""
        return self._storage.stream(self._file.name, start, stop)

    def in_cache(self, start: int, stop: int) -> bool:
        """Whether these bytes of the file are in a cache, as far as the storage knows."""
        return self._storage.in_cache(self._file.name, start, stop - start)

    def _where(self, name: str) -> str:
        return f"{self._storage.url}/{name}"


def listed(manifest: RankManifest) -> dict[tuple[str, int], ShardEntry]:
    """The entries of a shard, by the tensor's name and where they start."""
    return {(entry.fqn, entry.offset): entry for entry in manifest.entries.values()}
