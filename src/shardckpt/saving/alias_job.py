"""The background half of a save that shares the shards of the one before, since nothing of its tensors has changed."""

from typing import Final

import msgspec

from shardckpt import commit
from shardckpt.errors import SaveFailedError
from shardckpt.manifest import Manifest, RankValues
from shardckpt.saving.jobs import Job, Order, find_place
from shardckpt.saving.own import put_objects, with_objects

_VALUES: Final = msgspec.json.Decoder(RankValues)


class AliasJob(Job):
    """Of a save whose tensors are those of the one before: links, and a manifest of its own."""

    is_alias = True

    def __init__(self, order: Order, source: Job) -> None:
        self.order = order
        self.shards_of = source.shards_of
        self._source: Job | None = source
        self._from = source.order.storage
        self._shared: Manifest | None = None
        self._refusal: Exception | None = None

    def cancel(self, error: Exception) -> None:
        self._refusal = error

    def _put(self) -> tuple[bytes, int]:
        # Kept no longer than needed: the next save that shares has this one, and would have all before it.
        source, self._source = self._source, None
        if self._refusal is not None:
            raise self._refusal
        assert source is not None, "a job runs once"
        if not source.order.pending.succeeded():
            raise SaveFailedError(f"the save to {source.order.pending.path}, whose shards it shares, failed.")
        self._shared = source.committed
        return self._own_values(), 0

    def _own_values(self) -> bytes:
        """What rank 0 is to hear of this rank's values: those in the rank manifest that is shared may be older."""
        order = self.order
        if order.own is None or order.operation.rank == 0:
            return b""
        find_place(order)
        entries = put_objects(order.storage, order.operation.rank, order.pending.save_id, order.own.objects)
        return msgspec.json.encode(with_objects(order.own, entries))

    def _conclude(self, words: list[bytes]) -> int:
        order = self.order
        shared = self._shared
        assert shared is not None, "rank 0 knows what it committed"
        names = [name for file in shared.files for name in (file.name, file.manifest)]
        present = {stat.name for stat in order.storage.list()}
        self.linked = [name for name in names if name not in present]
        order.storage.copy_from(self._from, self.linked)
        own = order.own.objects if order.own is not None else {}
        entries = put_objects(order.storage, 0, order.pending.save_id, order.objects | own)
        alone = msgspec.structs.replace(
            shared,
            save_id=order.pending.save_id,
            created=commit.now(),
            state=order.skeleton,
            objects={path: entries[path] for path in order.objects},
        )
        values = {rank: _VALUES.decode(word) if word else None for rank, word in enumerate(words)}
        values[0] = with_objects(order.own, entries) if order.own is not None else None
        record = commit.encoded(commit.with_values(alone, values))
        self._publish(record)
        return sum(file.size for file in record.manifest.files)
