"""What a load reads: which files of a checkpoint hold what is wanted, and what of them. Nothing is allocated for it."""

from collections.abc import Sequence
from typing import Final

from shardckpt.box import Box
from shardckpt.errors import StateMismatchError
from shardckpt.garbage import held_off
from shardckpt.manifest import Manifest
from shardckpt.planner import Wanted, plan_load
from shardckpt.reader.common import sample, spacing
from shardckpt.reader.shards import Piece, ShardFile
from shardckpt.storage import Storage
from shardckpt.workers import for_each


class ReadPlan:
    """The files that hold what is wanted, each with the pieces of it that do.

    It grows, since what is wanted for tensors that are still to be made is known when they are.
    """

    def __init__(self, manifest: Manifest, storage: Storage, wanted: Sequence[Wanted] = ()) -> None:
        """Raises what `add` does."""
        self.manifest: Final = manifest
        self.storage: Final = storage
        self.pieces: Final[dict[tuple[str, int], tuple[ShardFile, Piece]]] = {}
        """With their files, by stored name and number of the stored box."""
        self._files: dict[int, ShardFile] = {}
        self._boxes: dict[str, list[Box]] = {}
        self.wanted: Final[list[Wanted]] = []
        """All that was added, in that order; pieces refer to it by number."""
        self._checked = 0
        self.add(wanted)

    @property
    def files(self) -> Sequence[ShardFile]:
        """All files to read something of."""
        return list(self._files.values())

    def file(self, index: int) -> ShardFile:
        """The file of that number, which counts among `files` from now on."""
        found = self._files.get(index)
        if found is None:
            found = self._files[index] = ShardFile(self.storage, self.manifest.files[index])
        return found

    @held_off()
    def add(self, wanted: Sequence[Wanted]) -> None:
        """Plan for more. What is wanted is numbered through, in the order in which it is added.

        Raises StateMismatchError where the checkpoint lacks a tensor, and CorruptCheckpointError where its stored boxes
        leave out a part of what is wanted or have it twice.
        """
        stored = [Wanted(self.stored_name(fqn), box) for fqn, box in wanted]
        for name, _ in stored:
            if name not in self._boxes:
                self._boxes[name] = self.manifest.tensors[name].boxes()
        for item in plan_load(stored, self._boxes.__getitem__):
            name = stored[item.wanted].fqn
            entry = name, item.shard
            if entry not in self.pieces:
                self.pieces[entry] = self._new_piece(name, item.shard)
            _, piece = self.pieces[entry]
            piece.wanted.append((len(self.wanted) + item.wanted, item.overlap))
        self.wanted.extend(wanted)

    def stored_name(self, fqn: str) -> str:
        """The name under which a tensor is stored; raises StateMismatchError where it is not."""
        name = self.manifest.aliases.get(fqn, fqn)
        if name not in self.manifest.tensors:
            raise StateMismatchError(f"the checkpoint at {self.storage.url} has no tensor {fqn!r}")
        return name

    def check(self) -> None:
        """Raise CorruptCheckpointError for files that are missing or of the wrong size; reads none.

        Files that have been checked are not looked at again.
        """
        files = self.files[self._checked :]
        for_each(files, ShardFile.check, threads=self.storage.width, name="check")
        self._checked += len(files)

    def sample(self) -> list[int]:
        """Of what is wanted, to be compared with that of other ranks by `is_common`."""
        apart = spacing(sum(file.size for file in self.manifest.files))
        return sample(point for file in self._files.values() for point in file.points(apart))

    def _new_piece(self, name: str, shard: int) -> tuple[ShardFile, Piece]:
        tensor = self.manifest.tensors[name]
        file = self.file(tensor.file[shard])
        piece = Piece(name, tensor, shard, self._boxes[name][shard])
        file.pieces.append(piece)
        return file, piece
