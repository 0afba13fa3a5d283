"""What is impossible in a manifest. Nobody after has to doubt what passed here."""

import re
from collections.abc import Iterable
from itertools import islice
from math import prod
from typing import Final

from shardckpt.errors import CorruptCheckpointError
from shardckpt.filenames import OBJECTS, RANK_MANIFEST, SHARD
from shardckpt.manifest.records import FileEntry, Manifest, ObjectEntry, RankManifest, TensorEntry

MAX_MANIFEST_BYTES: Final = 1 << 30
"""Bytes of JSON past which a manifest is refused: the bound on what a hostile file can make us allocate."""

_SAVE_ID = re.compile(r"[0-9a-z]{8,40}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{16}", re.ASCII)
_DIGESTS = re.compile(r"(?:[0-9a-f]{16})*", re.ASCII)
_MAX_NDIM = 64
"""Dimensions of a tensor; torch has no more."""


def refuse(where: str, problems: Iterable[str]) -> None:
    """Raise CorruptCheckpointError that names the first problems, if there are any."""
    found = list(islice(problems, 4))
    if found:
        more = " (and more)" if len(found) > 3 else ""
        raise CorruptCheckpointError(
            f"{where} contradicts itself: {'; '.join(found[:3])}{more}. Load another checkpoint."
        )


def rank_problems(manifest: RankManifest) -> Iterable[str]:
    if SHARD.fullmatch(manifest.file) is None or _SAVE_ID.fullmatch(manifest.save_id) is None or manifest.rank < 0:
        yield f"`file` {manifest.file!r}, `save_id` {manifest.save_id!r} or `rank` {manifest.rank} is impossible"
    if not 0 < manifest.header_nbytes <= manifest.size or _DIGEST.fullmatch(manifest.header_digest) is None:
        yield f"the header of {manifest.header_nbytes} bytes, or its digest, is impossible"
    for key, entry in manifest.entries.items():
        if not manifest.header_nbytes <= entry.offset <= entry.offset + entry.nbytes <= manifest.size:
            yield f"entry {key!r} lies outside its file of {manifest.size} bytes"
        if len(entry.starts) != len(entry.lengths) or min((*entry.starts, *entry.lengths), default=0) < 0:
            yield f"entry {key!r} has an impossible box"
        if _DIGESTS.fullmatch(entry.digests) is None:
            yield f"`digests` of entry {key!r} are no digests"
        if (entry.codec is None) != (entry.frames is None):
            yield f"entry {key!r} has frames without a codec, or a codec without frames"
        if entry.frames is not None and (min(entry.frames, default=0) < 0 or sum(entry.frames) != entry.nbytes):
            yield f"the frames of entry {key!r} do not add up to its {entry.nbytes} bytes"
    end, last = 0, ""
    for key, entry in sorted(manifest.entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset < end:
            yield f"entries {last!r} and {key!r} have bytes in common"
        end, last = entry.offset + entry.nbytes, key
    yield from _object_problems(manifest.objects)
    if manifest.per_rank is not None:
        yield from _object_problems(manifest.per_rank.objects)


def problems(manifest: Manifest) -> Iterable[str]:
    if _SAVE_ID.fullmatch(manifest.save_id) is None or manifest.world_size < 1:
        yield f"`save_id` {manifest.save_id!r} or `world_size` {manifest.world_size} is impossible"
    for file in manifest.files:
        for name, pattern in ((file.name, SHARD), (file.manifest, RANK_MANIFEST)):
            if pattern.fullmatch(name) is None:
                yield f"{name!r} is not a name of a checkpoint's file"
        if file.size < 0 or not 0 <= file.manifest_size <= MAX_MANIFEST_BYTES:
            yield f"{file.name!r} or its manifest has an impossible size"
        if _DIGEST.fullmatch(file.manifest_digest) is None:
            yield f"`manifest_digest` of {file.name!r} is no digest"
    if len({file.name for file in manifest.files}) != len(manifest.files):
        yield "`files` has a file twice"
    held = [0] * len(manifest.files)
    for fqn, tensor in manifest.tensors.items():
        yield from _tensor_problems(fqn, tensor, manifest.files)
        for index, nbytes in zip(tensor.file, tensor.nbytes, strict=False):
            if 0 <= index < len(held):
                held[index] += nbytes
    for nbytes, file in zip(held, manifest.files, strict=True):
        # The ranks' manifests say which; here it is a bound on what a small file can make a reader allocate.
        if nbytes > file.size:
            yield f"the tensors of {file.name!r} have {nbytes} bytes, of its {file.size}: some have bytes in common"
    for alias, target in manifest.aliases.items():
        if target not in manifest.tensors or alias in manifest.tensors:
            yield f"alias {alias!r} of {target!r} stands for no tensor, or hides one"
    yield from _object_problems(manifest.objects)
    if manifest.per_rank and manifest.world_size != len(manifest.files):
        yield f"`world_size` is {manifest.world_size}, but there are {len(manifest.files)} `files`"
    for place, nodes in manifest.per_rank.items():
        if not all(0 <= rank < manifest.world_size for rank in nodes):
            yield f"`per_rank` of {place!r} has ranks {sorted(nodes)[:8]} of {manifest.world_size}"


def _object_problems(objects: dict[str, ObjectEntry]) -> Iterable[str]:
    for path, entry in objects.items():
        if OBJECTS.fullmatch(entry.file) is None or entry.offset < 0 or entry.nbytes < 0:
            yield f"object {path!r} has an impossible place, {entry.nbytes} bytes at {entry.offset} of {entry.file!r}"
        if _DIGEST.fullmatch(entry.digest) is None:
            yield f"`digest` of object {path!r} is no digest"


def _tensor_problems(fqn: str, tensor: TensorEntry, files: list[FileEntry]) -> Iterable[str]:
    columns = (tensor.file, tensor.offset, tensor.nbytes, tensor.starts, tensor.lengths)
    if len({len(column) for column in columns}) != 1:
        yield f"the columns of tensor {fqn!r} differ in length"
        return
    ndim = len(tensor.shape)
    if ndim > _MAX_NDIM or min(tensor.shape, default=0) < 0 or prod(filter(None, tensor.shape)) >> 60:
        yield f"tensor {fqn!r} has the impossible shape {_short(tensor.shape)}"
        return
    volume = 0
    for index, offset, nbytes, starts, lengths in zip(*columns, strict=True):
        if not 0 <= index < len(files):
            yield f"tensor {fqn!r} points to file {index} of {len(files)}"
        elif offset < 0 or nbytes < 0 or offset + nbytes > files[index].size:
            yield f"a shard of tensor {fqn!r} lies outside {files[index].name!r}"
        if len(starts) != ndim or len(lengths) != ndim:
            yield f"a shard of tensor {fqn!r} has {len(starts)} dimensions, the tensor {ndim}"
        elif any(s < 0 or n <= 0 or s + n > size for s, n, size in zip(starts, lengths, tensor.shape, strict=True)):
            yield f"a shard of tensor {fqn!r} lies outside its shape {_short(tensor.shape)}"
        else:
            volume += prod(lengths)
            # No element takes less than a byte, and a compressed mebibyte has a digest in the rank's manifest.
            if 0 <= index < len(files) and (
                nbytes < prod(lengths)
                if tensor.codec is None
                else (prod(lengths) >> 20) * 16 > files[index].manifest_size
            ):
                yield f"a shard of tensor {fqn!r} has {nbytes} bytes for {prod(lengths)} elements"
    # Where volumes agree and no two boxes overlap, which the reader's plan finds, there are no holes.
    if volume != prod(tensor.shape):
        yield f"the shards of tensor {fqn!r} hold {volume} of its {prod(tensor.shape)} elements"


def _short(shape: tuple[int, ...]) -> str:
    return str(shape) if len(str(shape)) < 80 else f"{str(shape)[:80]}..."
