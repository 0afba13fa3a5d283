"""The file that a shard goes to, and the threads that write it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shardckpt.staging import Block
from shardckpt.storage import BLOCK, ObjectWriter, Storage
from shardckpt.workers import Workers


class Output:
    """One object of a storage, written in pieces of `BLOCK` bytes by a few threads.

    `writing` comes first, then either `commit` or `abort`.
    """

    def __init__(self, storage: Storage, name: str, *, threads: int) -> None:
        self._storage = storage
        self._name = name
        self._workers = Workers(threads, "write")
        self._object: ObjectWriter | None = None

    @contextmanager
    def writing(self, size_hint: int, *, front_last: bool) -> Iterator[None]:
        """Begin the object; at the end wait until every job is done, and raise the first error of one.

        `size_hint` is the size that the object will have, in bytes, or about that. `front_last`: its first piece comes
        after all others.
        """
        self._object = self._storage.create(self._name, size_hint, front_last=front_last)
        with self._workers:
            yield

    @property
    def error(self) -> BaseException | None:
        """What went wrong in a thread; jobs that begin now need not do their work."""
        return self._workers.error

    def run(self, job: Callable[[], None]) -> None:
        """Have a thread call `job`."""
        self._workers.submit(job)

    def put(self, offset: int, block: Block, before: Callable[[], None] | None = None) -> None:
        """Have a thread call `before`, write the filled part of `block` at file offset `offset` and release the block.

        `before` is called even if something has gone wrong, since that of a later block may wait for it.
        """

        def write() -> None:
            try:
                if before is not None:
                    before()
                if self.error is None:
                    self._begun.write(offset, block.memory[: block.filled])
            finally:
                block.release()

        self.run(write)

    def put_header(self, header: bytes, block: Block | None) -> None:
        """Write the first bytes of the file.

        What shares a piece with data goes to the head of `block`, whose data starts at byte ``len(header) % BLOCK``;
        the rest is written now. Without a block the header fills its pieces, or is all there is.
        """
        shared = len(header) % BLOCK if block is not None else 0
        alone, rest = memoryview(header)[: len(header) - shared], memoryview(header)[len(header) - shared :]
        for start in range(0, len(alone), BLOCK):
            self._begun.write(start, alone[start : start + BLOCK])
        if block is not None:
            block.memory[:shared] = rest

    def commit(self) -> None:
        """Make the object durable."""
        self._begun.commit()

    def give_up(self, error: BaseException) -> None:
        """Release the blocks that no thread has begun to write; see `Workers.give_up`."""
        self._workers.give_up(error)

    def abort(self) -> None:
        """Remove what was written, if anything was."""
        if self._object is not None:
            self._object.abort()

    @property
    def _begun(self) -> ObjectWriter:
        assert self._object is not None, "`writing` comes first"
        return self._object
