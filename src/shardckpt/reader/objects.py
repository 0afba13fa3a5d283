"""The pickled objects of a checkpoint, which nothing unpickles without the user's leave."""

import io
import pickle
from functools import partial
from typing import Any

import torch

from shardckpt.codecs import digest, digests_text
from shardckpt.errors import CorruptCheckpointError, LoadFailedError, ObjectNotFoundError, UnsafeLoadError, first_line
from shardckpt.manifest import Manifest
from shardckpt.relocation import MapLocation
from shardckpt.storage import Storage
from shardckpt.workers import read_aside


def read_object(
    checkpoint: str,
    manifest: Manifest,
    storage: Storage,
    place: str,
    *,
    map_location: MapLocation,
    weights_only: bool | None,
) -> Any:
    """The object at a place of the state, read, verified and unpickled; ``checkpoint`` is its path, for errors.

    Raises CorruptCheckpointError where there is none or it is damaged, UnsafeLoadError where ``weights_only`` forbids
    to unpickle it, and LoadFailedError where that fails.
    """
    entry = manifest.objects.get(place)
    if entry is None:
        raise CorruptCheckpointError(
            f"{checkpoint}: the state has an object at {place!r} that the manifest does not list."
        )
    data = read_aside(partial(read_bytes, storage, entry.file, entry.offset, entry.nbytes, entry.digest))
    try:
        return torch.load(io.BytesIO(data), map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if weights_only is False:
            raise LoadFailedError(f"{checkpoint}: the object at {place!r} cannot be unpickled: {error}") from error
        raise UnsafeLoadError(
            f"{checkpoint} holds a pickled object at {place!r}, and weights_only forbids to load it: unpickling"
            " runs code. If you trust whoever wrote it, pass weights_only=False. Nothing was changed."
        ) from error
    except (AttributeError, ImportError) as error:
        raise LoadFailedError(
            f"{checkpoint}: the object at {place!r} needs code that is not here: {error}. Nothing was changed."
        ) from error
    except Exception as error:  # what a pickle holds may raise anything
        raise LoadFailedError(
            f"{checkpoint}: the object at {place!r} cannot be read: {type(error).__name__}: {first_line(error)}."
            " Nothing was changed."
        ) from error


def read_bytes(storage: Storage, name: str, offset: int, nbytes: int, digest_text: str) -> bytes:
    """Read and verify bytes of an object: ``digest_text`` is their xxh3-64 in 16 hex digits.

    Raises CorruptCheckpointError where the object is missing (the cause is an ObjectNotFoundError), too short, or other
    bytes are in it. Nothing is allocated for bytes that aren't there.
    """
    where = f"{storage.url}/{name}"
    try:
        size = storage.size(name)
        if offset + nbytes > size:
            raise CorruptCheckpointError(
                f"{where} ends at byte {size}, but {nbytes} bytes at {offset} are wanted. Load another checkpoint."
            )
        data = bytearray(nbytes)
        storage.read_into(name, offset, memoryview(data))
    except ObjectNotFoundError as error:
        raise CorruptCheckpointError(f"a file of the checkpoint is missing: {error}") from error
    found = digests_text([digest(data)])
    if found != digest_text:
        raise CorruptCheckpointError(
            f"{where}: {nbytes} bytes at {offset} are damaged: their digest is {found}, not {digest_text}. "
            "Load another checkpoint."
        )
    return bytes(data)
