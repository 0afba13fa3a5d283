"""New values: what stands in a checkpoint and has no live counterpart, made from the skeleton."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shardckpt.codecs import DTYPES
from shardckpt.errors import CorruptCheckpointError
from shardckpt.manifest import Manifest, TensorEntry
from shardckpt.state import names, values
from shardckpt.state.leaves import LocalTensor, local_tensor
from shardckpt.state.skeleton import as_torch_format, module_entries

Json = Any
Thunk = Callable[[], Any]
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(slots=True)
class Fresh:
    """A tensor that has no live counterpart: allocated once the match is accepted, then filled by the reader."""

    fqn: str
    entry: TensorEntry
    make: Callable[[], Tensor]
    finish: Callable[[Tensor], Tensor]
    tensor: Tensor | None = None

    def value(self) -> Tensor:
        assert self.tensor is not None, "a thunk ran before its tensor was allocated"
        return self.tensor


class Room(Protocol):
    """Where new tensors go that belong to something live: optimizer state, to its parameter."""

    def key(self, entry: TensorEntry) -> Hashable:
        """Equal for rooms that may share one tensor which was shared when it was saved."""

    def make(self, entry: TensorEntry, dtype: torch.dtype) -> Tensor: ...

    def finish(self, entry: TensorEntry, tensor: Tensor) -> Tensor:
        """What becomes of it once it has been read."""


class Maker:
    """Makes values anew: collects, from nodes of one manifest's skeleton, the tensors and objects that they need.

    ``fresh`` are the tensors to be made; ``objects`` the pickled values that somebody must load into it before the
    thunks run; ``restored`` the names of all tensors that will be read.
    """

    def __init__(
        self, manifest: Manifest, relocate: Callable[[Tensor, str], Tensor], empty: Empty | None = None
    ) -> None:
        """``empty`` makes new tensors, of a shape and a dtype; by default they are in the host's memory."""
        self.manifest = manifest
        self.fresh: list[Fresh] = []
        self.objects: dict[str, Any] = {}
        self.restored: list[str] = []
        self.relocate = relocate
        self._empty = _in_memory if empty is None else empty
        self._made: dict[Hashable, Fresh] = {}

    def all_fresh(self) -> list[Fresh]:
        """All tensors to be made, in the order in which they are."""
        return self.fresh

    def allocate(self) -> list[LocalTensor]:
        """Allocate what is new; returns everything to be filled."""
        filled = []
        for fresh in self.all_fresh():
            fresh.tensor = fresh.make()
            filled.append(local_tensor(fresh.fqn, fresh.tensor, split=False))
        return filled

    def settle(self) -> None:
        """Give new tensors their final place, once read."""
        for fresh in self.all_fresh():
            fresh.tensor = fresh.finish(fresh.value())

    def entry(self, name: str) -> TensorEntry:
        entry = self.manifest.resolve(name)
        if entry is None:
            raise CorruptCheckpointError(f"the skeleton names tensor {name!r}, which the manifest does not list.")
        return entry

    def items(self, node: Json, path: str) -> dict[Any, Json] | None:
        """A saved container as decoded key → node, whatever it was saved as; None where it is no dict."""
        entries = module_entries(node)
        if entries is not None:
            return dict(entries)
        if values.tag_of(node) == "$optimizer":
            node = as_torch_format(node)
        pairs = values.pairs_of(node)
        return None if pairs is None else {values.decode_key(key, path): value for key, value in pairs}

    def new(self, node: Json, path: str, room: Room | None = None) -> Thunk:
        """The thunk that makes the value of ``node`` anew; its tensors in ``room``, if given."""
        tag = values.tag_of(node)
        argument: Any = node[tag] if tag is not None else None
        if tag == "$tensor":
            return self._new_tensor(argument, room).value
        if tag == "$ndarray":
            return self._new_array(argument)
        if tag == "$sparse":
            parts = {part: self.new(item, path) for part, item in argument["parts"].items()}
            return lambda: _sparse(argument, {part: thunk() for part, thunk in parts.items()}, path)
        if tag == "$object":
            self.objects.setdefault(argument, None)
            return lambda: self.objects[argument]
        if tag == "$per_rank":
            return self.per_rank(argument, path)
        if tag in ("$tuple", "$set", "$frozenset") or isinstance(node, list):
            kind = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}.get(tag or "", list)
            nodes = node if tag is None else argument
            if all(type(item) in values.SIMPLE for item in nodes):
                return lambda: kind(nodes)
            items = [self.new(item, names.child_path(path, i), room) for i, item in enumerate(nodes)]
            return lambda: kind(item() for item in items)
        saved = self.items(node, path)
        if saved is not None:
            made = {key: self.new(value, names.child_path(path, key), room) for key, value in saved.items()}

            def fill() -> Any:
                empty = _state_dict(argument["versions"], made) if tag == "$module" else values.empty_dict_of(node)
                for key, thunk in made.items():  # a Counter's own update would add
                    empty[key] = thunk()
                return empty

            return fill
        value = values.decode_scalar(node, path)
        return lambda: value

    def per_rank(self, place: str, path: str) -> Thunk:  # noqa: ARG002 - `Matching` wants to know
        """The thunk of the values of all ranks that saved, by rank; None for a rank that had none."""
        made = {
            rank: self.new(node, names.child_path(place, f"rank-{rank}"))
            for rank, node in self.manifest.per_rank[place].items()
        }
        return lambda: [made[rank]() if rank in made else None for rank in range(self.manifest.world_size)]

    def _new_tensor(self, name: str, room: Room | None) -> Fresh:
        entry, dtype = self.entry(name), self._dtype(name)
        if room is None:
            return self._add(
                name,
                None,
                lambda: self._empty(tuple(entry.shape), dtype),
                lambda tensor: self.relocate(tensor, entry.location),
            )
        return self._add(
            name,
            ("room", room.key(entry)),
            lambda: room.make(entry, dtype),
            lambda tensor: room.finish(entry, tensor),
        )

    def _new_array(self, name: str) -> Thunk:
        # To torch.load an array is a value like any other, that no map_location moves.
        shape, dtype = tuple(self.entry(name).shape), self._dtype(name)
        fresh = self._add(name, "array", lambda: self._empty(shape, dtype), lambda tensor: tensor)
        return lambda: fresh.value().numpy()

    def _dtype(self, name: str) -> torch.dtype:
        dtype = DTYPES.get(self.entry(name).dtype)
        if dtype is None:
            raise CorruptCheckpointError(
                f"tensor {name!r} has dtype {self.entry(name).dtype!r}, which this torch does not know."
            )
        return dtype

    def _add(self, name: str, where: Hashable, make: Callable[[], Tensor], finish: Callable[[Tensor], Tensor]) -> Fresh:
        """The tensor called ``name``, made once for all its names, so that what shared memory shares it again."""
        fqn = self.manifest.aliases.get(name, name)
        if (fqn, where) not in self._made:
            fresh = Fresh(fqn, self.entry(fqn), make, finish)
            self._made[fqn, where] = fresh
            self.fresh.append(fresh)
            self.restored.append(fqn)
        return self._made[fqn, where]


def _in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _state_dict(versions: Mapping[str, int], keys: Iterable[str]) -> dict[str, Any]:
    """An empty state dict of a module, with the versions that modules' loading code asks for; the usual one is 1.

    ``keys`` are what it is to hold, which tells of the modules that have that version.
    """
    modules = {key.rpartition(".")[0] for key in keys} | versions.keys()
    state_dict: dict[str, Any] = OrderedDict()
    state_dict._metadata = {  # type: ignore[attr-defined]  # noqa: SLF001 - torch passes them this way
        name: {"version": versions.get(name, 1)} for name in modules
    }
    return state_dict


def _sparse(node: Mapping[str, Any], parts: Mapping[str, Tensor], path: str) -> Tensor:
    size = torch.Size(node["size"])
    # Indices out of bounds would have torch read and write anywhere. On the meta device there are none to look at.
    check = not parts["values"].is_meta
    try:
        if node["layout"] == "sparse_coo":
            coalesced = node["coalesced"]
            return torch.sparse_coo_tensor(
                parts["indices"], parts["values"], size, is_coalesced=coalesced, check_invariants=check
            )
        compressed, plain = ("crow", "col") if "crow_indices" in parts else ("ccol", "row")
        return torch.sparse_compressed_tensor(
            parts[f"{compressed}_indices"],
            parts[f"{plain}_indices"],
            parts["values"],
            size,
            layout=getattr(torch, node["layout"]),
            check_invariants=check,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise CorruptCheckpointError(f"the parts of the sparse tensor {path!r} do not fit together: {error}") from error
