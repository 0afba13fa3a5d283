"""Whether the ranks of a mesh agree on what each of them holds of a DTensor.

To read its own part a rank asks nobody, so ranks that mean different layouts would each get a right part of a wrong
whole, and find out in the next collective, or never. One digest a mesh tells them beforehand.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import xxhash
from torch import Tensor

from shardckpt.errors import ConflictingStateError
from shardckpt.state.distributed import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_MESHES: Final = msgspec.msgpack.Decoder(list[tuple[str, str, str]])


class Meshes:
    """The layouts of one rank's DTensors."""

    def __init__(self) -> None:
        self._layouts: dict[str, tuple[str, str]] = {}
        self._ranks: dict[str, list[int]] = {}
        self._known: dict[DeviceMesh, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        if is_dtensor(tensor):
            self._layouts[name] = (self._mesh(tensor.device_mesh), str(tuple(tensor.placements)))

    def _mesh(self, mesh: "DeviceMesh") -> str:
        if mesh not in self._known:
            text = self._known[mesh] = str(mesh.mesh.tolist())
            self._ranks[text] = mesh.mesh.flatten().tolist()
        return self._known[mesh]

    def digests(self) -> list[tuple[list[int], str]]:
        """For each mesh its ranks, and a digest of the layouts on it."""
        found = {mesh: xxhash.xxh3_64() for mesh in self._ranks}
        for name in sorted(self._layouts):
            mesh, placements = self._layouts[name]
            found[mesh].update(f"{name}\0{placements}\0".encode())
        return [(self._ranks[mesh], f"{mesh} {hasher.hexdigest()}") for mesh, hasher in found.items()]

    def encode(self) -> bytes:
        """All that `check` wants to know."""
        return msgspec.msgpack.encode([(name, mesh, how) for name, (mesh, how) in self._layouts.items()])


def may_differ(digests: Sequence[Sequence[tuple[list[int], str]]]) -> bool:
    """Whether any two ranks of one mesh have said different things of it, so that all must tell more."""
    said = [{digest for _, digest in own} for own in digests]
    return any(
        digest not in said[other] for own in digests for ranks, digest in own for other in ranks if other < len(said)
    )


def check(words: Sequence[bytes]) -> None:
    """Raise ConflictingStateError naming a tensor that two ranks of its mesh lay out differently.

    A rank may lack a tensor that others of its mesh have. ``words`` are what `Meshes.encode` has said on each rank.
    """
    ranks: list[dict[str, Any]] = [{name: (mesh, how) for name, mesh, how in _MESHES.decode(word)} for word in words]
    for rank, layouts in enumerate(ranks):
        for name, (mesh, how) in layouts.items():
            for other in _ranks_of(mesh):
                theirs = ranks[other].get(name) if other < len(ranks) else None
                if theirs is not None and theirs != (mesh, how):
                    raise ConflictingStateError(
                        f"tensor {name!r} is laid out as {how} over the ranks {mesh} on rank {rank}, and as {theirs[1]}"
                        f" over {theirs[0]} on rank {other}. All ranks of a mesh must agree. Nothing was changed."
                    )


def _ranks_of(mesh: str) -> list[int]:
    def flat(item: Any) -> list[int]:
        return [item] if isinstance(item, int) else [rank for inner in item for rank in flat(inner)]

    return flat(msgspec.json.decode(mesh))
