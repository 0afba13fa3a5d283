"""Everything that some files of a checkpoint hold, read and held against its digests; all that is wrong is noted."""

import errno
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

import xxhash

from shardckpt.errors import CorruptCheckpointError, ObjectNotFoundError, StorageError
from shardckpt.filenames import MANIFEST
from shardckpt.garbage import held_off
from shardckpt.manifest import RankManifest, ShardEntry
from shardckpt.reader import ReadPlan
from shardckpt.reader.fetch import Extent, Range, Run, ranges
from shardckpt.reader.parts import in_parts, most
from shardckpt.reader.shards import Piece, ShardFile, listed
from shardckpt.reader.targets import READ_MEMORY
from shardckpt.reports import Fault
from shardckpt.staging import Budget, StagingPool
from shardckpt.storage import BLOCK, Read
from shardckpt.tools.opened import Progress
from shardckpt.workers import for_each

_FILES: Final = 32
"""Files that are looked into at the same time: what is known of their entries is in memory meanwhile."""

Extents = list[Extent[Piece]]


class Checking:
    """One look at a checkpoint. What it notes, from any thread, is in `faults`."""

    def __init__(self, plan: ReadPlan, pool: StagingPool, progress: Progress, total: int) -> None:
        """``progress`` hears of bytes read, of ``total``. The plan is to have all pieces that are to be checked."""
        self._plan = plan
        self._storage = plan.storage
        self._budget = Budget(pool, READ_MEMORY)
        self._progress = progress
        self._total = total
        self._lock = threading.Lock()
        self.faults: list[Fault] = []
        self.bytes_read = 0

    def note(self, fault: Fault) -> None:
        with self._lock:
            self.faults.append(fault)

    def count(self, nbytes: int) -> None:
        """Add bytes that were read."""
        with self._lock:
            self.bytes_read += nbytes
            self._progress(min(self.bytes_read, self._total), self._total)

    def stretch(self, fault: Fault, expected: str) -> None:
        """Read what ``fault`` names, however long it is, and note it unless its digest is ``expected``."""
        digest = xxhash.xxh3_64()
        assert fault.offset is not None
        assert fault.nbytes is not None
        block = self._budget.acquire()
        try:
            for done in range(0, fault.nbytes, BLOCK):
                memory = block.memory[: min(BLOCK, fault.nbytes - done)]
                self._storage.read_into(fault.file, fault.offset + done, memory, cached=False)
                self.count(len(memory))
                digest.update(memory)
        except (CorruptCheckpointError, StorageError) as error:
            self._unreadable(error, fault)
            return
        finally:
            block.release()
        if digest.hexdigest() != expected:
            self.note(replace(fault, expected=expected, found=digest.hexdigest()))

    def groups(self, files: Sequence[int], *, whole: bool) -> Iterator[Mapping[int, RankManifest]]:
        """Check files by their numbers, a few at a time; after each few, what the ranks say that wrote them.

        ``whole``: check that every byte of a file is under a digest, and its header.
        """
        for first in range(0, len(files), _FILES):
            words: dict[int, RankManifest] = {}
            found: dict[int, Extents] = {}

            def look(index: int, words: dict[int, RankManifest] = words, found: dict[int, Extents] = found) -> None:
                word, extents = self._open(index, whole=whole)
                found[index] = extents
                if word is not None:
                    words[index] = word

            group = files[first : first + _FILES]
            for_each(group, look, threads=self._storage.width, name="open")
            nbytes = sum(extent.nbytes for extents in found.values() for extent in extents)
            size = most(self._storage, nbytes, least=BLOCK)
            work = [(index, part) for index, extents in sorted(found.items()) for part in ranges(extents, most=size)]
            for_each(work, self._read, threads=self._storage.width, name="verify")
            yield words

    def _open(self, index: int, *, whole: bool) -> tuple[RankManifest | None, Extents]:
        """What there is to read of a file: all that can be, whatever else is wrong."""
        entry, file = self._plan.manifest.files[index], self._plan.file(index)
        end = self._size(entry.name, entry.size)
        manifest_size = self._size(entry.manifest, entry.manifest_size)
        if manifest_size is None:
            return None, []
        try:
            word = file.word()
        except CorruptCheckpointError as error:
            if manifest_size == entry.manifest_size:  # else that has been noted
                self.note(Fault(f"cannot be used: {error}", entry.manifest))
            return None, []
        self.count(entry.manifest_size)
        entries = listed(word)
        extents = self._extents(file, entries, entry.manifest)
        if end is None:
            return word, []
        if whole:
            if word.header_nbytes <= end:
                self.stretch(
                    Fault("has a damaged header", entry.name, None, None, 0, word.header_nbytes), word.header_digest
                )
            self._check_ends(entry.name, word)
            for fqn, offset in entries.keys() - {(piece.fqn, piece.offset) for piece in file.pieces}:
                self.note(Fault(f"is in no {MANIFEST}", entry.name, fqn, None, offset))
        return word, [cut for extent in extents if (cut := self._cut(extent, entry.name, end)) is not None]

    def _size(self, name: str, expected: int) -> int | None:
        """The size of a file; None where it can't be read."""
        try:
            size = self._storage.size(name)
        except ObjectNotFoundError:
            self.note(Fault("is missing", name, expected=f"{expected} bytes", found="nothing"))
            return None
        except CorruptCheckpointError as error:
            self.note(Fault(f"cannot be used: {error}", name))
            return None
        if size != expected:
            at = min(size, expected)
            self.note(Fault("has the wrong size", name, offset=at, expected=f"{expected} bytes", found=f"{size} bytes"))
        return size

    @held_off()
    def _extents(self, file: ShardFile, entries: Mapping[tuple[str, int], ShardEntry], name: str) -> Extents:
        found = []
        for piece in file.pieces:
            try:
                found.append(file.extent(piece, entries))
            except CorruptCheckpointError as error:
                self.note(Fault(f"cannot be used: {error}", name, piece.fqn))
        return found

    def _check_ends(self, name: str, word: RankManifest) -> None:
        """Entries follow the header and each other up to the end of the file, so that all of it is under a digest."""
        at = word.header_nbytes
        ends = sorted((entry.offset, entry.offset + entry.nbytes) for entry in word.entries.values())
        for start, stop in [*ends, (word.size, word.size)]:
            if start > at:
                self.note(Fault("is under no digest", name, offset=at, nbytes=start - at))
            at = stop

    def _cut(self, extent: Extent[Piece], name: str, end: int) -> Extent[Piece] | None:
        """An entry as far as the file goes."""
        if extent.start_of(extent.cells[-1][1]) <= end:
            return extent
        whole = extent.cells_before(end)
        at = extent.start_of(whole)
        self.note(Fault("is cut off", name, extent.subject.fqn, None, at, extent.offset + extent.nbytes - at))
        return extent.narrowed([(0, whole)], extent.subject) if whole else None

    def _read(self, work: tuple[int, Range[Piece]]) -> None:
        index, wanted = work
        file, entry = self._plan.file(index), self._plan.manifest.files[index]

        def take(read: Read, part: Range[Piece], start: int, stop: int, _anywhere: bool) -> None:
            block = self._budget.acquire()
            try:
                self._fill(read, part, start, block.memory[: stop - start], entry.name)
            finally:
                block.release()

        try:
            in_parts(self._storage, file, wanted, take, cached=False)
        except (CorruptCheckpointError, StorageError) as error:
            self._note_runs(error, wanted, entry.name)

    def _fill(self, read: Read, part: Range[Piece], start: int, memory: memoryview, name: str) -> None:
        try:
            read(start, memory)
        except CorruptCheckpointError:  # it ends within the last page
            memory = memory[: part.stop - start]
            read(start, memory)
        except StorageError as error:
            self._note_runs(error, part, name)
            return
        self.count(len(memory))
        for run in part.runs:
            self._check(run, memory, start, name)

    def _check(self, run: Run[Piece], memory: memoryview, start: int, name: str) -> None:
        piece, bad = run.extent.subject, set()
        for at, stop, expected, found in piece.damage(run, memory, start):
            bad.add(at)
            self.note(Fault("is damaged", name, piece.fqn, None, at, stop - at, expected, found))
        if not piece.compressed:
            return
        for cell in range(run.first, run.stop):
            at, stop = run.extent.start_of(cell), run.extent.start_of(cell + 1)
            if at in bad:
                continue
            try:
                next(piece.frames(Run(run.extent, cell, cell + 1, at, stop), memory, start))
            except CorruptCheckpointError as error:
                self.note(Fault(f"cannot be used: {error}", name, piece.fqn, None, at, stop - at))

    def _note_runs(self, error: CorruptCheckpointError | StorageError, part: Range[Piece], name: str) -> None:
        for run in part.runs:
            nbytes = run.stop_byte - run.start_byte
            self._unreadable(error, Fault("", name, run.extent.subject.fqn, None, run.start_byte, nbytes))

    def _unreadable(self, error: CorruptCheckpointError | StorageError, fault: Fault) -> None:
        """Note what cannot be read where the disk is to blame; of a storage that refuses, nobody learns anything."""
        gone = isinstance(error, (CorruptCheckpointError, ObjectNotFoundError))
        if not gone and getattr(error.__cause__, "errno", None) != errno.EIO:
            raise error
        self.note(replace(fault, what=f"cannot be read: {error}"))


def in_order(faults: Sequence[Fault]) -> list[Fault]:
    """By file and byte, the commit record first; blocks of one tensor that are damaged side by side are one fault."""
    found: list[Fault] = []
    for fault in sorted(faults, key=lambda fault: (fault.file != MANIFEST, fault.file, fault.offset or 0)):
        last = found[-1] if found else None
        if (
            last is not None
            and (last.what, last.file, last.tensor) == (fault.what, fault.file, fault.tensor)
            and last.tensor is not None
            and None not in (last.offset, last.nbytes, fault.offset, fault.nbytes)
            and (last.offset or 0) + (last.nbytes or 0) == fault.offset
        ):
            found[-1] = replace(last, nbytes=(last.nbytes or 0) + (fault.nbytes or 0))
        else:
            found.append(fault)
    return found
