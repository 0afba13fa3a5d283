"""The background half of a save that writes its tensors."""

from typing import Final

import msgspec

from shardckpt import commit, manifest
from shardckpt.manifest import RankManifest
from shardckpt.saving.jobs import Job, Order, find_place
from shardckpt.saving.own import put_objects, with_objects
from shardckpt.workers import for_each
from shardckpt.writer import ShardWriter

_WRITTEN: Final = msgspec.msgpack.Decoder(commit.Written)


class SaveJob(Job):
    """Shard, rank manifest, commit."""

    def __init__(self, order: Order, writer: ShardWriter | BaseException) -> None:
        """``writer`` may be what kept this rank from having one: that is for all ranks to know."""
        self.order = order
        self.shards_of = order.pending.save_id
        self._writer: ShardWriter | BaseException | None = writer

    def cancel(self, error: Exception) -> None:
        if isinstance(self._writer, ShardWriter):
            self._writer.cancel(error)

    def _put(self) -> tuple[bytes, int]:
        order = self.order
        rank, save_id = order.operation.rank, order.pending.save_id
        if isinstance(self._writer, BaseException):
            raise self._writer
        assert self._writer is not None, "a job runs once"
        find_place(order)
        own_word = self._writer.run()
        self.patience.check()
        objects = order.objects if order.speaks else {}
        own = order.own.objects if order.own is not None else {}
        entries = put_objects(order.storage, rank, save_id, objects | own)
        if order.speaks:
            own_word.state = order.skeleton
            own_word.objects = {path: entries[path] for path in objects}
        if order.own is not None:
            own_word.per_rank = with_objects(order.own, entries)
        self.patience.check()
        written = commit.put_rank_manifest(order.storage, own_word)
        return msgspec.msgpack.encode(written), written.file.size

    def _give_up(self, error: Exception) -> None:
        if isinstance(self._writer, ShardWriter):
            self._writer.give_up(error)

    def _forget(self) -> None:
        self._writer = None  # and with it the tensors, which the caller may want to free

    def _conclude(self, words: list[bytes]) -> int:
        order = self.order
        ranks = [_WRITTEN.decode(word) for word in words]
        files, layouts = [rank.file for rank in ranks], [rank.layout for rank in ranks]
        tables = order.structure.known.get(layouts)
        said: dict[int, RankManifest] = {}

        def read(index: int) -> None:
            data = commit.read_back(order.storage, files[index])
            if tables is None or ranks[index].speaks:
                # These are the bytes that the rank encoded, by the digest that it told.
                where = f"{order.storage.url}/{files[index].manifest}"
                said[index] = manifest.decode_rank_manifest(data, where, doubted=False)

        # Whoever has overtaken this save has removed its files; that they are missing would be a poor reason.
        commit.check_unchanged(order.storage, order.previous)
        for_each(range(len(ranks)), read, threads=order.storage.width, name="manifests")
        if tables is None:
            tables = commit.tables(said, order.structure.heads, order.structure.aliases)
            order.structure.known.keep(layouts, tables)
        record = commit.encoded(commit.assemble(order.pending.save_id, files, tables, said))
        self._publish(record)
        return sum(file.size for file in files)
