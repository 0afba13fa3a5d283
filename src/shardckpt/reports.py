"""What a save or a load tells its caller."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SaveReport:
    """A committed save, or, where there is an ``error``, one that failed. Sizes are bytes, times seconds."""

    path: str
    save_id: str
    world_size: int
    nbytes: int
    """Of all ranks' shards together."""
    rank_nbytes: int
    """Of this rank's shard."""
    stall_seconds: float
    """How long this rank's caller was kept from going on."""
    total_seconds: float
    """From the call to the commit, as this rank saw it."""
    staged_seconds: float = 0.0
    """From the call until this rank's part of the snapshot was complete."""
    written_seconds: float = 0.0
    """From the call until this rank's part was durable."""
    slowest_rank: int = 0
    """Whose part took longest to be durable; 0 where the shards were shared, and nothing was written."""
    slowest_seconds: float = 0.0
    """How long that took, from that rank's call on."""
    retries: int = 0
    """Requests to the storage that this rank made again; clients make some again by themselves, which nobody counts."""
    alias: bool = False
    """Whether the shards were shared with the save before, since nothing had changed."""
    error: str | None = None
    """Why there is no checkpoint: only under ``on_save_error="warn"``, and the sizes are 0 then."""
    uncertain: bool = False
    """Whether the save may have been committed in spite of the ``error``, an UncertainCommitError: load it to see."""

    def __repr__(self) -> str:
        if self.error is not None:
            how = "uncertain" if self.uncertain else "failed"
            return f"SaveReport({self.path!r}, {how}: {self.error})"
        shared = ", shared with the save before" if self.alias else ""
        slowest = ""
        if self.world_size > 1 and not self.alias:
            slowest = f", rank {self.slowest_rank} slowest with {self.slowest_seconds:.3f} s"
        retries = f", {self.retries} retries" if self.retries else ""
        return (
            f"SaveReport({self.path!r}, {size_text(self.nbytes)} by {self.world_size} rank(s){shared}, stalled"
            f" {self.stall_seconds:.3f} s, staged after {self.staged_seconds:.3f} s, written after"
            f" {self.written_seconds:.3f} s{slowest}, committed after {self.total_seconds:.3f} s{retries})"
        )


@dataclass(frozen=True)
class LoadReport:
    """A finished load. Names are those of the checkpoint; the lists of differences are empty after a strict load."""

    path: str
    save_id: str
    world_size: int
    """Of the job that saved."""
    restored: list[str] = field(repr=False)
    """Tensors that were read."""
    missing: list[str]
    """In the live state, but not in the checkpoint."""
    unexpected: list[str]
    """In the checkpoint, but not in the module or optimizer that was restored."""
    mismatched: list[str]
    """Left as they were because shape, dtype or kind differ; each says how."""
    skipped: list[str]
    """Top-level keys of the checkpoint that the live state does not have."""
    left_on_meta: list[str]
    """Live tensors that still have no data, because the checkpoint has none for them."""
    bytes_read: int
    """By this rank, from the storage."""
    seconds: float
    retries: int = 0
    """Requests to the storage that this rank made again; clients make some again by themselves, which nobody counts."""
    bytes_received: int = 0
    """By this rank, from others that read them for it; see ``share_reads`` of `shardckpt.Checkpointer`."""
    per_rank: dict[str, list[Any]] = field(default_factory=dict, repr=False)
    """By place: all ranks' values, by rank, where another number of ranks saved them and no `PerRank.resize` said what
    to make of them, so that the live value is as it was. None for a rank that had none."""

    def __repr__(self) -> str:
        differences = "".join(
            f", {name}={getattr(self, name)}"
            for name in ("missing", "unexpected", "mismatched", "skipped", "left_on_meta")
            if getattr(self, name)
        )
        received = f" and {size_text(self.bytes_received)} received" if self.bytes_received else ""
        differences += f", per_rank={[*self.per_rank]}" if self.per_rank else ""
        retries = f", {self.retries} retries" if self.retries else ""
        return (
            f"LoadReport({self.path!r}, {len(self.restored)} tensor(s), {size_text(self.bytes_read)} read{received} in"
            f" {self.seconds:.3f} s{retries}{differences})"
        )


@dataclass(frozen=True)
class Fault:
    """Something of a checkpoint that is not what was written. Offsets and sizes are bytes."""

    what: str
    """A clause for people: "is damaged", "is missing"."""
    file: str
    """Its name in the checkpoint."""
    tensor: str | None = None
    """The tensor that has these bytes; None where no tensor has, or where all of the file's may be meant."""
    object: str | None = None
    """The place of the pickled object that has them."""
    offset: int | None = None
    """In the file."""
    nbytes: int | None = None
    expected: str | None = None
    """A digest (xxh3-64 in hexadecimal; of the first of several blocks that are damaged) or a size."""
    found: str | None = None

    def __str__(self) -> str:
        who = f"tensor {self.tensor!r} in " if self.tensor is not None else ""
        who += f"object {self.object!r} in " if self.object is not None else ""
        at = f" at byte {self.offset}" if self.offset is not None else ""
        held = f": expected {self.expected}, found {self.found}" if self.expected is not None else ""
        size = f" ({self.nbytes} bytes)" if self.nbytes is not None else ""
        return f"{who}{self.file}{at}{size} {self.what}{held}"


@dataclass(frozen=True)
class VerifyReport:
    """What `shardckpt.verify` found. Sizes are bytes, times seconds."""

    path: str
    save_id: str
    world_size: int
    """Of the job that saved."""
    faults: list[Fault]
    """All that is wrong, by file and byte."""
    tensors: int
    """That were checked: all, or those that have something in the one rank's file, or the one."""
    objects: int
    """Pickled objects that were checked; nothing was unpickled."""
    values_checked: bool
    """Whether plain values were held against what the ranks wrote. Those of a save that shares the shards of another
    stand in its manifest alone, and those of one tensor are none."""
    bytes_read: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def __repr__(self) -> str:
        verdict = "ok" if self.ok else f"{len(self.faults)} FAULT(S), the first: {self.faults[0]}"
        return (
            f"VerifyReport({self.path!r}, {self.tensors} tensor(s), {size_text(self.bytes_read)} read in"
            f" {self.seconds:.3f} s: {verdict})"
        )


def size_text(nbytes: int) -> str:
    """Bytes for people."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"
