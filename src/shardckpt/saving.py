"""One save, from a flattened state to the commit: what is said between ranks, and what the background does."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from shardckpt import commit
from shardckpt import manifest as mf
from shardckpt.background import PendingSave
from shardckpt.box import Box, relative_to, slices
from shardckpt.codecs import ITEMSIZE, digest, digests_text
from shardckpt.commit import Found, TensorHead
from shardckpt.coordinator import Operation, turn
from shardckpt.errors import RankTimeoutError, SaveFailedError, ShardckptError
from shardckpt.manifest import FileEntry, Manifest, ObjectEntry, RankManifest
from shardckpt.planner import Held, ShardPlan, plan_save
from shardckpt.reports import SaveReport
from shardckpt.safetensors_format import entry_key
from shardckpt.staging import Source
from shardckpt.state import Flattened
from shardckpt.storage import Storage
from shardckpt.workers import THREADS, for_each
from shardckpt.writer import ShardWriter

log = logging.getLogger(__name__)

_HINT_BYTES: Final = 64 << 20
"""Bytes that one rank writes while others hold them too, past which a hint about ``replicated=`` is logged once."""


class Opening(msgspec.Struct, array_like=True):
    """What each rank says at the start of a save."""

    structure: str
    outline: str
    known: str
    """Key of the plan that this rank has in store."""
    may_alias: bool


class _WireTensor(msgspec.Struct, array_like=True):
    fqn: str
    shape: tuple[int, ...]
    dtype: str
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]
    split: bool
    location: str


class _WireStructure(msgspec.Struct, array_like=True):
    tensors: list[_WireTensor]
    aliases: dict[str, str]


@dataclass(frozen=True)
class Structure:
    """All that a plan depends on, agreed by all ranks; good for every save of the same structure."""

    key: str
    plan: ShardPlan
    """This rank's."""
    nbytes: int
    """Of raw data, all ranks together."""
    heads: dict[str, TensorHead]
    aliases: dict[str, str]
    speaks: bool
    """Whether this rank's skeleton has places that rank 0's lacks, so that it goes into its rank manifest."""


def structure_key(openings: Sequence[Opening]) -> str:
    return digests_text([digest("\0".join(opening.structure for opening in openings).encode())])


def agree_on_structure(operation: Operation, flat: Flattened, openings: Sequence[Opening]) -> Structure:
    """Exchange what every rank holds, and plan. Identical descriptions cross the wire once."""
    with turn(operation, "describe") as digested:
        body = msgspec.msgpack.encode(_describe(flat, operation.world_size))
        digested.word = digests_text([digest(body)]).encode()
    digests = digested.heard
    is_first = digests.index(digested.word) == operation.rank
    bodies = operation.agree("structure", body if is_first else b"")
    decoded = {
        mark: msgspec.msgpack.decode(bodies[digests.index(mark)], type=_WireStructure)
        for mark in dict.fromkeys(digests)
    }
    held = {mark: _held(structure) for mark, structure in decoded.items()}
    plans = plan_save([held[mark] for mark in digests], ITEMSIZE)
    heads: dict[str, TensorHead] = {}
    aliases: dict[str, str] = {}
    for structure in decoded.values():
        for tensor in structure.tensors:
            heads.setdefault(tensor.fqn, TensorHead(tensor.dtype, tensor.shape, tensor.location))
        aliases.update(structure.aliases)
    if operation.rank == 0:
        _hint(plans, digests, decoded)
    return Structure(
        key=structure_key(openings),
        plan=plans[operation.rank],
        nbytes=sum(item.nbytes for plan in plans for item in plan.items),
        heads=heads,
        aliases={alias: target for alias, target in aliases.items() if alias not in heads and target in heads},
        speaks=operation.rank == 0 or openings[operation.rank].outline != openings[0].outline,
    )


def _describe(flat: Flattened, world_size: int) -> _WireStructure:
    tensors = [
        _WireTensor(
            leaf.fqn,
            leaf.shape,
            leaf.dtype,
            [(box.offsets, box.lengths) for box in leaf.boxes],
            leaf.split,
            # On several ranks a tensor is on several devices, so its tag names only their type.
            leaf.location if world_size == 1 else leaf.location.partition(":")[0],
        )
        for leaf in flat.tensors.values()
    ]
    return _WireStructure(tensors, flat.aliases)


def _held(structure: _WireStructure) -> tuple[Held, ...]:
    return tuple(
        Held(tensor.fqn, tensor.shape, tensor.dtype, tuple(Box(*box) for box in tensor.boxes), tensor.split)
        for tensor in structure.tensors
    )


def _hint(plans: Sequence[ShardPlan], digests: Sequence[bytes], decoded: dict[bytes, _WireStructure]) -> None:
    """Say once that ``replicated=`` would share the writing of what the lowest rank alone now writes."""
    if len(digests) < 2 or len(decoded) > 1:
        return
    whole = {tensor.fqn for tensor in decoded[digests[0]].tensors if not tensor.split}
    nbytes = sum(item.nbytes for item in plans[0].items if item.fqn in whole)
    if nbytes >= _HINT_BYTES:
        log.info(
            "rank 0 writes %d MiB of tensors that the other ranks hold too, because they may differ by rank. If they"
            " are equal everywhere, `replicated=True`, or patterns of their names, shares the work.",
            nbytes >> 20,
        )


def sources(plan: ShardPlan, flat: Flattened) -> list[Source]:
    """A rank's part of the plan, with the memory each entry is in."""
    found = []
    for item in plan.items:
        leaf = flat.tensors[item.fqn]
        view = leaf.views[item.held]
        if leaf.boxes[item.held] != item.box:
            view = view[slices(relative_to(leaf.boxes[item.held], item.box))]
        key = entry_key(item.fqn, leaf.shape, item.box)
        found.append(Source(key, item.fqn, leaf.dtype, item.box, view, item.nbytes))
    return found


@dataclass(frozen=True)
class Times:
    """When a save was called, and how long its caller was kept once that is known; seconds of the monotonic clock."""

    called: float
    stall: list[float]


def settle(
    operation: Operation, word: bytes | Exception, timeout: float, conclude: Callable[[list[bytes]], bytes]
) -> bytes:
    """The second half of a commit: every rank says how it went, rank 0 concludes, every rank hears the verdict."""
    operation.post("written", word)
    if operation.rank != 0:
        return operation.hear("written", timeout)
    try:
        verdict = conclude(operation.collect("written", timeout))
    except Exception as error:
        operation.announce("written", error)
        raise
    try:
        operation.announce("written", verdict)
    except RankTimeoutError as error:  # the commit stands, whether or not the others hear of it
        log.warning("committed, but the other ranks could not be told: %s", error)
    return verdict


def failure(path: str, error: Exception) -> SaveFailedError:
    """What a failed save raises: the cause, and what is still safe."""
    reason = str(error) if isinstance(error, ShardckptError) else f"{type(error).__name__}: {error}"
    failed = SaveFailedError(
        f"the save to {path} failed and left no checkpoint behind. Checkpoints committed before it are intact. "
        f"Cause: {reason}"
    )
    failed.__cause__ = error
    return failed


@dataclass(frozen=True)
class Order:
    """What both kinds of background job need to know of the save that ordered them."""

    pending: PendingSave
    operation: Operation
    storage: Storage
    structure: Structure
    skeleton: Any
    objects: dict[str, bytes]
    previous: Found | None
    """On rank 0: the commit record that this save may replace."""
    commit_timeout: float
    times: Times
    owner: object
    """Of the background thread that runs the job."""

    def report(self, verdict: bytes, *, rank_nbytes: int, alias: bool) -> SaveReport:
        """What the caller hears of a save that was committed; ``verdict`` is the size of all shards, as rank 0 said
        it.
        """
        return SaveReport(
            path=self.pending.path,
            save_id=self.pending.save_id,
            world_size=self.operation.world_size,
            nbytes=msgspec.msgpack.decode(verdict, type=int),
            rank_nbytes=rank_nbytes,
            stall_seconds=self.times.stall[0] if self.times.stall else 0.0,
            total_seconds=time.monotonic() - self.times.called,
            alias=alias,
        )


class SaveJob:
    """The background half of a save: shard, rank manifest, commit."""

    def __init__(self, order: Order, writer: ShardWriter) -> None:
        self.order = order
        self.committed: Manifest | None = None
        """On rank 0, once it is."""
        self._writer = writer

    def run(self) -> None:
        order = self.order
        rank = order.operation.rank
        rank_nbytes = 0
        word: bytes | Exception
        try:
            entry = self._write()
            rank_nbytes = entry.size
            word = msgspec.msgpack.encode(entry)
        except Exception as error:  # noqa: BLE001 - any failure, whatever it is, becomes every rank's
            word = error
        try:
            verdict = settle(order.operation.in_background(order.owner), word, order.commit_timeout, self._conclude)
        except Exception as error:  # noqa: BLE001 - told to whoever asks for the result
            # Whoever never heard the verdict must not remove files that rank 0 may just be committing.
            unheard = isinstance(error, RankTimeoutError) and rank != 0 and not isinstance(word, Exception)
            if self.committed is None and not unheard:
                commit.abandon(order.storage, order.pending.save_id, [rank])
            order.pending.resolve(failure(order.pending.path, word if isinstance(word, Exception) else error))
            return
        order.pending.resolve(order.report(verdict, rank_nbytes=rank_nbytes, alias=False))

    def _write(self) -> FileEntry:
        order = self.order
        rank, save_id = order.operation.rank, order.pending.save_id
        if rank != 0 and not order.storage.list():
            # Rank 0 has left a marker there, but a network file system may be slow to show it.
            order.storage.prepare()
        manifest = self._writer.run().manifest
        if order.structure.speaks:
            manifest.state = order.skeleton
            manifest.objects = put_objects(order.storage, rank, save_id, order.objects)
        return commit.put_rank_manifest(order.storage, manifest)

    def _conclude(self, words: list[bytes]) -> bytes:
        order = self.order
        files = [msgspec.msgpack.decode(word, type=FileEntry) for word in words]
        ranks: dict[int, RankManifest] = {}

        def read(index: int) -> None:
            ranks[index] = commit.get_rank_manifest(order.storage, files[index])

        for_each(range(len(files)), read, threads=THREADS, name="manifests")
        manifest = commit.assemble(
            order.pending.save_id,
            files,
            [ranks[index] for index in range(len(files))],
            order.structure.heads,
            order.structure.aliases,
        )
        commit.publish(order.storage, manifest, order.previous)
        self.committed = manifest
        commit.clean(order.storage, manifest)
        return msgspec.msgpack.encode(sum(file.size for file in files))


class AliasJob:
    """The background half of a save whose tensors are those of the one before: links, and a manifest of its own."""

    def __init__(self, order: Order, source: "SaveJob | AliasJob") -> None:
        self.order = order
        self.committed: Manifest | None = None
        self._source = source
        self._linked: list[str] = []

    def run(self) -> None:
        order, source = self.order, self._source.order.pending
        try:
            if not source.succeeded():
                raise SaveFailedError(f"the save to {source.path}, whose shards it shares, failed.")
            verdict = settle(order.operation.in_background(order.owner), b"", order.commit_timeout, self._conclude)
        except Exception as error:  # noqa: BLE001 - told to whoever asks for the result
            if order.operation.rank == 0 and self.committed is None:
                commit.abandon(order.storage, order.pending.save_id, [0], also=self._linked)
            order.pending.resolve(failure(order.pending.path, error))
            return
        order.pending.resolve(order.report(verdict, rank_nbytes=0, alias=True))

    def _conclude(self, _: list[bytes]) -> bytes:
        order = self.order
        shared = self._source.committed
        assert shared is not None, "rank 0 knows what it committed"
        names = [name for file in shared.files for name in (file.name, file.manifest)]
        present = {stat.name for stat in order.storage.list()}
        self._linked = [name for name in names if name not in present]
        order.storage.copy_from(self._source.order.storage, self._linked)
        manifest = msgspec.structs.replace(
            shared,
            save_id=order.pending.save_id,
            created=commit.now(),
            state=order.skeleton,
            objects=put_objects(order.storage, 0, order.pending.save_id, order.objects),
        )
        commit.publish(order.storage, manifest, order.previous)
        self.committed = manifest
        commit.clean(order.storage, manifest)
        return msgspec.msgpack.encode(sum(file.size for file in manifest.files))


def put_objects(storage: Storage, rank: int, save_id: str, objects: dict[str, bytes]) -> dict[str, ObjectEntry]:
    """Store pickled objects back to back in one file; returns where each lies, by path."""
    if not objects:
        return {}
    name = mf.objects_name(rank, save_id)
    entries = {}
    offset = 0
    for path, data in objects.items():
        entries[path] = ObjectEntry(name, offset, len(data), digests_text([digest(data)]))
        offset += len(data)
    storage.put(name, b"".join(objects.values()), replace=False)
    return entries
