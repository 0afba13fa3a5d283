"""What a flattened state is."""

from dataclasses import dataclass, field
from typing import Any

from shardckpt.errors import UsageError
from shardckpt.state.leaves import LocalTensor

Json = Any


@dataclass(slots=True)
class Flattened:
    """A state as the engine sees it on one rank."""

    tensors: dict[str, LocalTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    skeleton: Json = None
    objects: dict[str, bytes] = field(default_factory=dict)
    """Pickled with ``torch.save``, by path; taken at the call, so that they belong to the same instant."""
    structure: str = ""
    """Digest of the tensors' names, shapes, dtypes and boxes: equal while a plan stays good."""
    outline: str = ""
    """Digest of names and kinds alone: equal on ranks whose skeletons have the same places. Empty for a `Share`."""
    places: str = ""
    """Digest of the names of what differs by rank; empty where nothing does."""
    own: "Flattened | None" = None
    """What differs by rank, as this rank has it; its skeleton is a dict of nodes by place. None where nothing does.

    It is no part of the digests, tensors and aliases around it: no other rank need know of it to plan a save.
    """


def check_names(found: Flattened, own: Flattened) -> None:
    """Raise UsageError where a name is this rank's own and everybody's: on other ranks only one of the two has it."""
    for name in [*own.tensors, *own.aliases, *own.objects]:
        if name in found.tensors or name in found.aliases or name in found.objects:
            raise UsageError(
                f"{name!r} is the name of a value by rank and of another value of the state; rename that one's key."
            )
