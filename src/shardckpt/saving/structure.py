"""What the ranks tell each other of their tensors before a save, and the plan that follows from it."""

import logging
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from math import prod
from typing import Final, NamedTuple

import msgspec
import zstandard

from shardckpt.box import Box
from shardckpt.codecs import ITEMSIZE, digest, digests_text
from shardckpt.commit import KnownTables
from shardckpt.coordinator import Operation, turn
from shardckpt.garbage import held_off
from shardckpt.manifest import TensorHead
from shardckpt.planner import Held, ShardPlan, plan_save
from shardckpt.saving.entries import Entries
from shardckpt.saving.own import location_of, own_sources
from shardckpt.state import Flattened

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
    places: str
    """Digest of the names of what differs by rank; empty where this rank has nothing of that kind."""
    own_nbytes: int
    """Of what differs by rank, on this rank."""


class _WireLayout(msgspec.Struct, array_like=True, frozen=True):
    """What tensors have in common that are alike but for their names."""

    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    split: bool
    location: str


class _WireStructure(msgspec.Struct, array_like=True):
    layouts: list[_WireLayout]
    tensors: dict[str, int]
    """Which of the layouts each has, by name."""
    aliases: dict[str, str]


@dataclass(frozen=True)
class Structure:
    """All that a plan depends on, agreed by all ranks; good for every save of the same structure."""

    key: str
    entries: Entries
    """This rank's."""
    nbytes: int
    """Of raw data, all ranks together."""
    heads: dict[str, TensorHead]
    aliases: dict[str, str]
    known: KnownTables = field(default_factory=KnownTables)
    """What rank 0 has made of the last save."""


_STRUCTURE: Final = msgspec.msgpack.Decoder(_WireStructure)


def structure_key(openings: Sequence[Opening]) -> str:
    return digests_text([digest("\0".join(opening.structure for opening in openings).encode())])


def may_share(openings: Sequence[Opening], structure: "Structure | None") -> bool:
    """Whether this save may share the shards of the last one: every rank allows it, and nothing else has changed."""
    return (
        all(opening.may_alias for opening in openings)
        and structure is not None
        and structure_key(openings) == structure.key
        and len({opening.outline for opening in openings if opening.outline}) == 1
        and len({opening.places for opening in openings}) == 1
    )


def speaks(openings: Sequence[Opening], rank: int) -> bool:
    """Whether a rank's skeleton has places that rank 0's lacks, or is rank 0's, so that it must be stored."""
    first, own = openings[0], openings[rank]
    return rank == 0 or own.outline not in ("", first.outline) or own.places not in ("", first.places)


class Descriptions(NamedTuple):
    """What every rank holds."""

    digests: list[bytes]
    """By rank; equal for ranks that hold the same."""
    bodies: list[bytes]
    """By rank; empty for all but the first of those with one digest."""


def exchange(operation: Operation, flat: Flattened) -> Descriptions:
    """Tell all ranks what this one holds, and hear the same of them. Identical descriptions cross the wire once."""
    with turn(operation, "describe") as digested:
        # Names repeat their beginnings thousands of times, and every rank hears every distinct description.
        body = zstandard.ZstdCompressor(level=1).compress(msgspec.msgpack.encode(_describe(flat, operation.world_size)))
        digested.word = digests_text([digest(body)]).encode()
    is_first = digested.heard.index(digested.word) == operation.rank
    return Descriptions(digested.heard, operation.agree("structure", body if is_first else b""))


@held_off()
def plan(descriptions: Descriptions, openings: Sequence[Opening], rank: int) -> Structure:
    """What follows from what all ranks hold, the same on each; raises ConflictingStateError where they disagree."""
    digests = descriptions.digests
    unpack = zstandard.ZstdDecompressor().decompress
    decoded = {
        mark: _STRUCTURE.decode(unpack(descriptions.bodies[digests.index(mark)])) for mark in dict.fromkeys(digests)
    }
    tied = {alias for structure in decoded.values() for alias in structure.aliases}
    held = {mark: _held(structure, tied) for mark, structure in decoded.items()}
    plan = plan_save([held[mark] for mark in digests], ITEMSIZE, rank=rank)[rank]
    heads: dict[str, TensorHead] = {}
    aliases: dict[str, str] = {}
    for structure in decoded.values():
        made = [TensorHead(layout.dtype, layout.shape, layout.location) for layout in structure.layouts]
        for fqn, layout in structure.tensors.items():
            if fqn not in heads and not _only_tied(fqn, structure.layouts[layout], tied):
                heads[fqn] = made[layout]
        aliases.update(structure.aliases)
    if rank == 0:
        _hint(plan, digests, decoded)
    return Structure(
        key=structure_key(openings),
        entries=Entries(plan),
        nbytes=sum(prod(head.shape) * ITEMSIZE[head.dtype] for head in heads.values()),
        heads=heads,
        aliases={alias: target for alias, target in aliases.items() if alias not in heads and target in heads},
    )


@held_off()
def _describe(flat: Flattened, world_size: int) -> _WireStructure:
    layouts: dict[_WireLayout, int] = {}
    tensors: dict[str, int] = {}
    for leaf in flat.tensors.values():
        layout = _WireLayout(leaf.shape, leaf.dtype, leaf.boxes, leaf.split, location_of(leaf, world_size))
        tensors[leaf.fqn] = layouts.setdefault(layout, len(layouts))
    return _WireStructure(list(layouts), tensors, flat.aliases)


def _held(structure: _WireStructure, tied: AbstractSet[str]) -> tuple[Held, ...]:
    boxes = [tuple(Box(*box) for box in layout.boxes) for layout in structure.layouts]
    found = []
    for fqn, number in structure.tensors.items():
        layout = structure.layouts[number]
        if not _only_tied(fqn, layout, tied):
            found.append(Held(fqn, layout.shape, layout.dtype, boxes[number], layout.split))
    return tuple(found)


def _only_tied(fqn: str, layout: _WireLayout, tied: AbstractSet[str]) -> bool:
    """Whether a rank that holds nothing of a tensor could not see that it is tied to another, as other ranks did."""
    return fqn in tied and not layout.boxes


def _hint(plan: ShardPlan, digests: Sequence[bytes], decoded: dict[bytes, _WireStructure]) -> None:
    """Say once that ``replicated=`` would share the writing of what the lowest rank, whose plan it is, alone writes."""
    if len(digests) < 2 or len(decoded) > 1:
        return
    first = decoded[digests[0]]
    whole = {fqn for fqn, number in first.tensors.items() if not first.layouts[number].split}
    nbytes = sum(item.nbytes for item in plan.items if item.fqn in whole)
    if nbytes >= _HINT_BYTES:
        log.info(
            "rank 0 writes %d MiB of tensors that the other ranks hold too, because they may differ by rank. If they"
            " are equal everywhere, `replicated=True`, or patterns of their names, shares the work.",
            nbytes >> 20,
        )


def bytes_to_stage(flat: Flattened, world_size: int) -> int:
    """About the bytes that one rank of ``world_size`` will write of a state; its header is not known yet."""
    nbytes = 0
    for leaf in flat.tensors.values():
        held = sum(view.numel() * view.element_size() for view in leaf.views)
        is_whole = held == prod(leaf.shape) * ITEMSIZE[leaf.dtype]
        nbytes += held // world_size if leaf.split and is_whole else held
    return nbytes + sum(source.nbytes for source in own_sources(flat))
