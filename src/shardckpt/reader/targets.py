"""Filling tensors from a checkpoint: plan, check, then read, verify and place, range by range."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Final

import torch
from torch.autograd.graph import increment_version

from shardckpt import launch
from shardckpt.codecs import DTYPE_NAMES, torch_dtype
from shardckpt.errors import StateMismatchError, UsageError
from shardckpt.garbage import held_off
from shardckpt.manifest import Manifest
from shardckpt.reader.common import Crowd
from shardckpt.reader.fetch import Extent, Range, ranges, union
from shardckpt.reader.parts import in_parts, most
from shardckpt.reader.place import Placement, Target
from shardckpt.reader.plan import ReadPlan
from shardckpt.reader.shards import Piece, ShardFile
from shardckpt.staging import Budget, StagingPool
from shardckpt.storage import BLOCK, Read
from shardckpt.workers import for_each

READ_MEMORY: Final = 256 << 20
"""Bytes of bounce buffers that one read may hold."""
MIN_RANGE: Final = 1 << 20
"""Bytes below which a range is not cut further, so that more threads could read at the same time."""
_CROWD_DEPTH: Final = 2
"""Times as many threads read what comes through the page cache: their requests become smaller ones on the way."""


@dataclass
class ReadStats:
    """How far a `Reading` has come, also when it has raised."""

    bytes_read: int = 0
    """Bytes that came from the storage, including the manifests of ranks and what alignment adds."""
    bytes_received: int = 0
    """Bytes that came from other ranks, which read them."""
    placing: bool = False
    """Whether targets may have been changed. Set just before the first byte of one is."""
    heard: Callable[[int], None] | None = field(default=None, repr=False, compare=False)
    """Told of each number of bytes that was read, one thread at a time."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def count(self, nbytes: int) -> None:
        """Add bytes that were read, from any thread."""
        with self._lock:
            self.bytes_read += nbytes
            if self.heard is not None:
                self.heard(nbytes)


class Reading:
    """What one rank reads for its targets, at once or in parts. Nothing is read before it is asked for.

    Only files and digest blocks that hold wanted elements are read, and all of them are verified: in a block of memory
    before they are placed, or, whole blocks that need not be read past a cache, in the target that they were read to.
    Before that all needed files are known to exist with the right size. An error up to then has changed nothing, and
    ``stats.placing`` is False; after one that comes later, targets may hold anything.

    All that reads raises CorruptCheckpointError where a file is missing (then the cause is an ObjectNotFoundError), has
    the wrong size, or does not match its digests, which names the tensor, the file and the byte; and StorageError where
    the storage failed.
    """

    @held_off()
    def __init__(
        self,
        plan: ReadPlan,
        targets: Sequence[Target],
        *,
        pool: StagingPool,
        convert_dtype: bool = False,
        stats: ReadStats | None = None,
    ) -> None:
        """Targets are as many as the plan has for, in its order; they are filled through memory of `pool`.

        Raises StateMismatchError where the checkpoint has a target's tensor in another dtype and `convert_dtype` is
        False; changing a complex dtype to a real one is always refused.
        """
        same = [(target.fqn, target.box) for target in targets] == [(fqn, box) for fqn, box in plan.wanted]
        assert same, "the plan is for these targets"
        # Inference tensors may be changed in inference mode only, and everything else may be there too.
        inference = any(target.tensor.is_inference() for target in targets)
        self.mode: Callable[[], AbstractContextManager[object]] = torch.inference_mode if inference else torch.no_grad
        """Encloses what changes a target, in any thread."""
        self.plan = plan
        self.manifest = plan.manifest
        self.pool = pool
        self.stats = ReadStats() if stats is None else stats
        self.threads = plan.storage.width
        self._budget = Budget(pool, READ_MEMORY)
        with self.mode():
            for target in targets:
                _check_target(self.manifest, target, convert_dtype)
        self.targets: defaultdict[str, list[Target]] = defaultdict(list)
        """By the name under which they are stored: a tensor wanted under two names is one tensor, read once."""
        for target in targets:
            self.targets[plan.stored_name(target.fqn)].append(target)
        for _, piece in plan.pieces.values():
            piece.bind(targets)
        self._is_ready = False

    def ready(self) -> None:
        """Do what has to be done before anything is placed and may fail; `placing` does it unless it is done."""
        if self._is_ready:
            return
        devices = {target.tensor.device for target in self._all_targets() if target.tensor.is_cuda}
        if devices:
            self.pool.pin()
        for device in devices:
            # Threads copy on streams of their own: what training has queued on these tensors comes first.
            torch.cuda.synchronize(device)
        self._is_ready = True

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Enclose all that changes targets."""
        self.ready()
        try:
            with self.mode():
                yield
        finally:
            if self.stats.placing:
                # Autograd doesn't see copies of memory, and must know that what it saved has changed.
                for target in self._all_targets():
                    increment_version(target.tensor)

    def alone(self) -> None:
        """Fill all targets, when there are no other ranks to agree with."""
        with self.placing():
            # Nobody asks them, but processes of one job mostly load the same. It helps them only if there is a cache.
            siblings = launch.siblings() if self.plan.storage.read_cache else None
            self.everything(siblings and Crowd(*siblings))

    def everything(self, crowd: Crowd | None = None) -> None:
        """Fill all targets. All needed files are checked before anything is placed.

        `crowd`: other processes on this host are about to read the same bytes.
        """
        self._open(self.plan.files)
        files = [(file, list(file.extents.values())) for file in self.plan.files]
        nbytes = sum(extent.nbytes_of(cells) for _, extents in files for extent in extents for cells in extent.cells)
        size = most(self.plan.storage, nbytes, least=BLOCK)
        with held_off():
            work = [(file, piece) for file, extents in files for piece in ranges(extents, most=size)]
        self._run(work, crowd)

    def cells(
        self,
        wanted: Mapping[tuple[str, int], Sequence[tuple[int, int]]],
        others: Mapping[tuple[str, int], Sequence[Placement]],
        crowd: Crowd | None = None,
    ) -> None:
        """Read and verify some cells of some entries, and place what targets want of them, and `others` likewise.

        `wanted`: runs of cells by stored name and shard, of entries of which some target wants something. `crowd` is
        that of `everything`. Safe in another thread than the one that encloses it in `placing`.
        """
        files = self.open(wanted)
        extents: defaultdict[int, list[Extent[Piece]]] = defaultdict(list)
        nbytes = 0
        for entry, runs in wanted.items():
            file, piece = self.plan.pieces[entry]
            extent = file.extents[entry]
            cells = union(runs)
            nbytes += sum(map(extent.nbytes_of, cells))
            extents[id(file)].append(extent.narrowed(cells, piece.also(others.get(entry, ()))))
        # Even little is read in parallel.
        size = most(self.plan.storage, nbytes, least=MIN_RANGE)
        with held_off():
            work = [(files[key], piece) for key, found in extents.items() for piece in ranges(found, most=size)]
        self._run(work, crowd)

    def open(self, wanted: Iterable[tuple[str, int]]) -> dict[int, ShardFile]:
        """Open the files of entries, by stored name and shard, unless they are open; returns them by their ``id``."""
        files = {id(file): file for file, _ in (self.plan.pieces[entry] for entry in wanted)}
        self._open(list(files.values()))
        return files

    def _open(self, files: Sequence[ShardFile]) -> None:
        self.plan.check()
        for_each([file for file in files if not file.extents], self._open_one, threads=self.threads, name="open")

    def _open_one(self, file: ShardFile) -> None:
        self.stats.count(file.open())

    def _run(self, work: Sequence[tuple[ShardFile, Range[Piece]]], crowd: Crowd | None) -> None:
        threads = self.threads
        if crowd is not None:
            work, threads = crowd.order(work), threads * _CROWD_DEPTH
        for_each(work, partial(self._read, cached=crowd is not None), threads=threads, name="read")

    def _read(self, work: tuple[ShardFile, Range[Piece]], *, cached: bool) -> None:
        """Read one range, and verify and place what it holds; `cached` is for what is not in a cache yet."""
        file, wanted = work
        in_parts(self.plan.storage, file, wanted, self._read_part, cached=cached)

    def _read_part(self, read: Read, part: Range[Piece], start: int, stop: int, anywhere: bool) -> None:
        """Read a range; through a block as bytes [start, stop) of the file, if it can't be read to where it belongs."""
        window = _window(part) if anywhere else None
        if window is not None:
            (run,) = part.runs
            self.stats.placing = True
            read(run.start_byte, window)
            self.stats.count(len(window))
            run.extent.subject.verify(run, window, run.start_byte)
            return
        block = self._budget.acquire()
        try:
            memory = block.memory[: stop - start]
            read(start, memory)
            self.stats.count(len(memory))
            with self.mode():
                for run in part.runs:
                    run.extent.subject.verify(run, memory, start)
                    self.stats.placing = True
                    run.extent.subject.place(run, block, start)
        finally:
            block.release()

    def _all_targets(self) -> Iterator[Target]:
        return chain.from_iterable(self.targets.values())


def _window(wanted: Range[Piece]) -> memoryview | None:
    """The target's own memory for what a range holds, where that is one run which belongs there as it is stored."""
    if len(wanted.runs) != 1:
        return None
    (run,) = wanted.runs
    return run.extent.subject.window(run)


def _check_target(manifest: Manifest, target: Target, convert_dtype: bool) -> None:
    """Raise where the target can't take what the checkpoint has for it; the plan says where it has nothing."""
    if tuple(target.tensor.shape) != target.box.lengths:
        raise UsageError(f"target of shape {tuple(target.tensor.shape)} for {target.box} of tensor {target.fqn!r}")
    dtype = DTYPE_NAMES.get(target.tensor.dtype, str(target.tensor.dtype))
    tensor = manifest.resolve(target.fqn)
    if tensor is None or dtype == tensor.dtype:
        return
    if not convert_dtype:
        raise StateMismatchError(
            f"tensor {target.fqn!r} is {tensor.dtype} in the checkpoint and {dtype} here; convert_dtype=True converts"
        )
    if tensor.dtype.startswith("complex") and not dtype.startswith("complex"):
        raise StateMismatchError(
            f"tensor {target.fqn!r} is {tensor.dtype} in the checkpoint and {dtype} here, which would lose half of it"
        )
    try:
        torch.empty(1, dtype=torch_dtype(tensor.dtype)).to(target.tensor.dtype)
    except NotImplementedError as error:
        raise StateMismatchError(
            f"tensor {target.fqn!r} is {tensor.dtype} in the checkpoint and {dtype} here: torch can't convert that"
        ) from error
