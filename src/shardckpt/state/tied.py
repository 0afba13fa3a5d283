"""Tied tensors: which name a memory goes by that a state shows more than once."""

from torch import Tensor

from shardckpt.state.leaves import address, memory_key


class Tied:
    """The tensors of one walk, by the memory that they are views of."""

    def __init__(self) -> None:
        self._at: dict[int, list[tuple[Tensor, str]]] = {}

    def name_of(self, tensor: Tensor) -> str | None:
        """The name under which the same view of the same memory was added; None where it was not."""
        return self._among(self._at.get(address(tensor), ()), tensor)

    def add(self, tensor: Tensor, name: str, place: int) -> str | None:
        """As `name_of`; what has no name yet has ``name`` from now on. ``place`` is the tensor's `address`."""
        others = self._at.setdefault(place, [])
        # Hardly ever are there two at one address, and all that makes up a key takes microseconds to ask.
        found = self._among(others, tensor) if others else None
        if found is None and place:
            others.append((tensor, name))
        return found

    @staticmethod
    def _among(others: "list[tuple[Tensor, str]] | tuple[()]", tensor: Tensor) -> str | None:
        key = memory_key(tensor) if others else None
        if key is None:
            return None
        return next((name for other, name in others if memory_key(other) == key), None)
