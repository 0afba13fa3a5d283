"""What the files of a checkpoint are called. Each but the commit record bears the id of the save that wrote it."""

import re
from typing import Final

MANIFEST: Final = "manifest.json"
"""The commit record."""

SHARD = re.compile(r"rank-\d{5,10}-([0-9a-z]{8,40})\.safetensors", re.ASCII)
RANK_MANIFEST = re.compile(r"rank-\d{5,10}-([0-9a-z]{8,40})\.json", re.ASCII)
OBJECTS = re.compile(r"objects-([0-9a-z]{8,40})(?:-rank-\d{5,10})?\.pkl", re.ASCII)
MARKER = re.compile(r"saving-([0-9a-z]{8,40})\.json", re.ASCII)


def shard_name(rank: int, save_id: str) -> str:
    return f"rank-{rank:05d}-{save_id}.safetensors"


def rank_manifest_name(rank: int, save_id: str) -> str:
    return f"rank-{rank:05d}-{save_id}.json"


def objects_name(rank: int, save_id: str) -> str:
    return f"objects-{save_id}.pkl" if rank == 0 else f"objects-{save_id}-rank-{rank:05d}.pkl"


OF_A_RANK: Final = (shard_name, rank_manifest_name, objects_name)
"""The names of all that one rank writes."""


def marker_name(save_id: str) -> str:
    return f"saving-{save_id}.json"


def is_marker(name: str) -> bool:
    """Whether a file says that a save is running."""
    return MARKER.fullmatch(name) is not None


def is_checkpoint_file(name: str) -> bool:
    """Whether a file name is one that only shardckpt gives: what a removal may delete."""
    return name == MANIFEST or save_id_of(name) is not None


def save_id_of(name: str) -> str | None:
    """The id of the save that wrote a checkpoint's file; None for the manifest and for files that are not ours."""
    for pattern in (SHARD, RANK_MANIFEST, OBJECTS, MARKER):
        match = pattern.fullmatch(name)
        if match is not None:
            return match[1]
    return None
