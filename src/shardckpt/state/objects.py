"""Objects that are neither plain nor tensors, nor say what their state is: pickled, each on its own."""

import io
from typing import Any

import torch

from shardckpt.errors import UnserialisableError
from shardckpt.state.per_rank import PerRank


def pickled(value: Any, path: str) -> bytes:
    """``value`` as ``torch.save`` writes it.

    Raises UnserialisableError, with the path, for what cannot be pickled, or hides a `PerRank` in its pickle.
    """
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:  # pickle runs the object's own code, which may raise anything
        raise UnserialisableError(
            f"the value at {path or 'the root'!r} is a {type(value).__module__}.{type(value).__qualname__}, which"
            f" is neither plain nor picklable: {error}. Take it out of the state, or give it"
            " state_dict/load_state_dict."
        ) from error
    data = buffer.getvalue()
    if PerRank.__module__.encode() in data:  # a pickle names the classes in it
        raise UnserialisableError(
            f"the {type(value).__qualname__} at {path or 'the root'!r} is pickled as a whole, with a PerRank in it,"
            " which would be that of one rank for all. Give it state_dict/load_state_dict, or put a PerRank around"
            " it."
        )
    return data
