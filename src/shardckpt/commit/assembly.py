"""The commit record, put together of what the ranks say they wrote."""

import datetime
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch

from shardckpt import manifest as mf
from shardckpt.codecs import digest, digests_text
from shardckpt.errors import ConflictingStateError
from shardckpt.garbage import held_off
from shardckpt.manifest import FileEntry, Manifest, RankManifest, RankValues, TensorEntry, TensorHead
from shardckpt.state import merge
from shardckpt.state.skeleton import per_rank_places


class Tables(NamedTuple):
    """Every tensor of a checkpoint and where its shards lie. Shared by all records that say the same: never changed."""

    tensors: dict[str, TensorEntry]
    aliases: dict[str, str]


class KnownTables:
    """The tables of the last save, for the next one of the same plan.

    With 10,000 ranks parsing what each wrote, to find what is known, would take the interpreter away from training for
    most of a minute.
    """

    def __init__(self) -> None:
        self._layouts: list[str] = []
        self._tables: Tables | None = None

    def get(self, layouts: Sequence[str]) -> Tables | None:
        """Those of these `layout_of`, by rank, if they are known."""
        return self._tables if self._layouts == layouts else None

    def keep(self, layouts: Sequence[str], tables: Tables) -> None:
        if all(layouts):
            self._layouts, self._tables = list(layouts), tables


@held_off()
def layout_of(manifest: RankManifest) -> str:
    """A digest of all that the tables take from a rank's manifest; empty where that is another in every save."""
    if any(entry.codec is not None for entry in manifest.entries.values()):
        return ""
    entries = [
        (entry.fqn, entry.starts, entry.lengths, entry.offset, entry.nbytes) for entry in manifest.entries.values()
    ]
    own = manifest.per_rank
    return digests_text([digest(msgspec.msgpack.encode((entries, own and own.tensors, own and own.aliases)))])


@held_off()
def tables(ranks: Mapping[int, RankManifest], heads: Mapping[str, TensorHead], aliases: Mapping[str, str]) -> Tables:
    """What the manifests of all ranks come to; ``heads`` lists every tensor, also those without elements.

    Raises ConflictingStateError where a value by rank has the name of another value.
    """
    tensors = {fqn: _without_shards(head) for fqn, head in heads.items()}
    aliases = dict(aliases)
    for index in range(len(ranks)):
        own = ranks[index].per_rank
        if own is not None:
            _add_own(index, own, tensors, aliases)
    for index in range(len(ranks)):
        for entry in ranks[index].entries.values():
            tensor = tensors[entry.fqn]
            tensor.file.append(index)
            tensor.offset.append(entry.offset)
            tensor.nbytes.append(entry.nbytes)
            tensor.starts.append(entry.starts)
            tensor.lengths.append(entry.lengths)
            tensor.codec = entry.codec
    return Tables(tensors, aliases)


def assemble(save_id: str, files: Sequence[FileEntry], found: Tables, ranks: Mapping[int, RankManifest]) -> Manifest:
    """The commit record; ``ranks`` are at least those that say more than where their tensors lie."""
    skeleton = None
    objects = {}
    for index in sorted(ranks):
        rank = ranks[index]
        if rank.state is not None:
            skeleton = rank.state if skeleton is None else merge(skeleton, rank.state)
        objects.update({path: entry for path, entry in rank.objects.items() if path not in objects})
    manifest = Manifest(
        save_id=save_id,
        created=now(),
        world_size=len(files),
        writer=writer_versions(),
        files=list(files),
        state=skeleton,
        tensors=found.tensors,
        aliases=found.aliases,
        objects=objects,
    )
    return with_values(manifest, {index: rank.per_rank for index, rank in ranks.items()})


def with_values(manifest: Manifest, ranks: Mapping[int, RankValues | None]) -> Manifest:
    """``manifest`` with what each rank saved at the places that differ by rank.

    Raises ConflictingStateError where a place is none on the rank whose word counts for it.
    """
    per_rank: dict[str, dict[int, Any]] = {}
    objects = dict(manifest.objects)
    for rank, values in sorted(ranks.items()):
        if values is not None:
            _check_free(rank, values.objects, manifest.objects)
            objects.update(values.objects)
            for place, node in values.nodes.items():
                per_rank.setdefault(place, {})[rank] = node
    if per_rank:
        found = set(per_rank_places(manifest.state))
        for place, nodes in per_rank.items():
            if place not in found:
                raise ConflictingStateError(
                    f"{place!r} is a PerRank on rank {min(nodes)}, but another value on a rank below it. Make it a"
                    " PerRank on all ranks, or leave it out where there is nothing to save."
                )
    requires = [name for name in manifest.requires if name != mf.PER_RANK] + ([mf.PER_RANK] if per_rank else [])
    return msgspec.structs.replace(manifest, per_rank=per_rank, objects=objects, requires=requires)


def _without_shards(head: TensorHead) -> TensorEntry:
    # Interned, since msgspec leaves out a default that is the very object, not one that is equal.
    return TensorEntry(head.dtype, head.shape, [], [], [], [], [], location=sys.intern(head.location))


def _add_own(rank: int, own: RankValues, tensors: dict[str, TensorEntry], aliases: dict[str, str]) -> None:
    for added in (own.tensors, own.aliases):
        _check_free(rank, added, tensors)
        _check_free(rank, added, aliases)
    tensors.update({fqn: _without_shards(head) for fqn, head in own.tensors.items()})
    aliases.update(own.aliases)


def _check_free(rank: int, added: Iterable[str], taken: Mapping[str, Any]) -> None:
    """Raise ConflictingStateError where a value of one rank has a name that another rank gave to something else."""
    for name in added:
        if name in taken:
            raise ConflictingStateError(
                f"{name!r} is the name of a value by rank of rank {rank}, and of another value on another rank; rename"
                " that one's key."
            )


def now() -> str:
    """The time of a commit, as the manifest says it: UTC, ISO 8601, milliseconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def writer_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("shardckpt")
    except PackageNotFoundError:  # used from a source tree that was never installed
        ours = "unknown"
    return {"shardckpt": ours, "torch": str(torch.__version__), "python": platform.python_version()}
