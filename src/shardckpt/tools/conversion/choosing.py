"""What is wanted of a checkpoint of ours, and nothing else of it read."""

from typing import Any, Final

from shardckpt.manifest import Manifest
from shardckpt.relocation import relocation
from shardckpt.state import Maker, values
from shardckpt.state.fresh import Empty, Room, Thunk
from shardckpt.tools.conversion.selecting import LEFT_OUT, Wanted

_READ: Final = frozenset({"$tensor", "$ndarray", "$sparse", "$object"})
"""Nodes for which something has to be read."""


class ChoosingMaker(Maker):
    """Makes the wanted values of a state in the room that ``empty`` gives them, and `LEFT_OUT` in place of others."""

    def __init__(self, manifest: Manifest, wanted: Wanted, empty: Empty) -> None:
        super().__init__(manifest, relocation("cpu"), empty)
        self._wanted = wanted

    def new(self, node: Any, path: str, room: Room | None = None) -> Thunk:
        below = path[len(self._wanted.prefix) :].removeprefix(".")
        if values.tag_of(node) in _READ and not self._wanted.selection(below):
            return lambda: LEFT_OUT
        return super().new(node, path, room)
