"""Commit: what a checkpoint is called, how it becomes one, how it is found, and how it goes away.

A place holds a checkpoint from the moment ``manifest.json`` is there, and no longer once it is gone. Every other file
is named after the save that wrote it, so a save never touches what it replaces, and what a crash leaves behind names
itself.
"""

from shardckpt.commit.assembly import KnownTables, Tables, assemble, now, tables, with_values
from shardckpt.commit.clearing import abandon, clean, end_lease, prune, remove, running
from shardckpt.commit.finding import Found, checkpoint_path, find, find_bytes, is_checkpoint, latest, read, read_bytes
from shardckpt.commit.publishing import (
    Written,
    check_unchanged,
    encoded,
    new_save_id,
    open_place,
    publish,
    publish_record,
    put_rank_manifest,
    read_back,
)
from shardckpt.commit.reading import read_for_all
from shardckpt.commit.visibility import not_shared, sees
from shardckpt.commit.words import check_words, contradictions, has_words, suffice

__all__ = [
    "Found",
    "KnownTables",
    "Tables",
    "Written",
    "abandon",
    "assemble",
    "check_unchanged",
    "check_words",
    "checkpoint_path",
    "clean",
    "contradictions",
    "encoded",
    "end_lease",
    "find",
    "find_bytes",
    "has_words",
    "is_checkpoint",
    "latest",
    "new_save_id",
    "not_shared",
    "now",
    "open_place",
    "prune",
    "publish",
    "publish_record",
    "put_rank_manifest",
    "read",
    "read_back",
    "read_bytes",
    "read_for_all",
    "remove",
    "running",
    "sees",
    "suffice",
    "tables",
    "with_values",
]
