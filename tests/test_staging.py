"""Staging memory and the copy into it."""

import errno
import gc
import mmap
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from shardckpt import Checkpointer
from shardckpt.errors import UsageError
from shardckpt.staging import (
    Block,
    Budget,
    Early,
    Source,
    StagingPool,
    blocks_of,
    copy_memory,
    filling,
    memory,
    place_early,
    stage,
)
from shardckpt.staging.filling import Filler
from shardckpt.storage import BLOCK
from shards import in_order, noise, raw, source


@pytest.fixture
def pool() -> Iterator[StagingPool]:
    pool = StagingPool()
    yield pool
    pool.close()


def staged(
    sources: list[Source],
    pool: StagingPool,
    *,
    limit: int | None = None,
    offset: int = 0,
    threads: int = 1,
    early: Early | None = None,
) -> torch.Tensor:
    """The stream that staging makes of `sources`; blocks are released as they come."""
    parts: list[torch.Tensor] = []

    def emit(block: Block) -> None:
        parts.append(block.tensor[0 if parts else offset : block.filled].clone())
        block.release()

    stage(sources, pool, limit=limit, first_block_offset=offset, emit=emit, threads=threads, early=early)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def test_blocks_start_on_huge_pages(pool: StagingPool) -> None:
    """Direct I/O and huge pages need the alignment, over several arenas too."""
    blocks = [pool.take() for _ in range(40)]
    assert {block.tensor.data_ptr() % (2 << 20) for block in blocks} == {0}
    assert {len(block.memory) for block in blocks} == {BLOCK}
    assert len({block.tensor.data_ptr() for block in blocks}) == 40
    assert pool.nbytes == 40 * BLOCK


def test_memory_and_tensor_are_the_same_bytes(pool: StagingPool) -> None:
    """What is staged through the tensor is what is written through the memory."""
    block = pool.take()
    block.tensor[5] = 77
    assert block.memory[5] == 77


def test_blocks_are_reused(pool: StagingPool) -> None:
    """The second save touches no new memory: page faults cost more than the copies."""
    tensor = noise(3 * BLOCK, dtype=torch.uint8)
    for _ in range(3):
        staged([source("a", tensor)], pool)
        assert pool.nbytes == BLOCK


def test_a_pool_that_nobody_has_is_not_warmed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Checkpointer that is dropped beside its warming takes its memory along, however much was to come."""
    asked, go_on = threading.Event(), threading.Event()
    mapped: list[int] = []
    map_arena = memory._map_arena

    def slow() -> list[Block]:
        mapped.append(1)
        asked.set()
        assert go_on.wait(60)
        return map_arena()

    monkeypatch.setattr(memory, "ARENA_BLOCKS", 1)
    monkeypatch.setattr(memory, "_map_arena", slow)
    engine = Checkpointer()
    pool = weakref.ref(engine._pool)
    engine._pool.warm(8 * BLOCK)
    assert asked.wait(60)
    del engine
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "shardckpt-warm":
            thread.join()
    assert pool() is None
    assert len(mapped) == 1


def test_reserve_touches_ahead(pool: StagingPool) -> None:
    """After `prepare` a save finds all its memory present."""
    pool.reserve(3 * BLOCK - 1)
    assert pool.nbytes == 3 * BLOCK
    assert len({id(pool.take()) for _ in range(3)}) == 3
    assert pool.nbytes == 3 * BLOCK
    pool.reserve(2 * BLOCK)
    assert pool.nbytes == 3 * BLOCK


@pytest.mark.parametrize("limit", [None, 2 * BLOCK + 1])
@pytest.mark.parametrize("nbytes", [4, BLOCK, 3 * BLOCK - 64])
def test_the_first_save_after_prepare_touches_no_new_memory(nbytes: int, limit: int | None, tmp_path: Path) -> None:
    """What `prepare` has touched is all that the first save needs, header and odd limits included."""
    state = {"w": noise(nbytes, dtype=torch.uint8)}
    with closing(Checkpointer(staging_limit=limit)) as engine:
        engine.prepare(state)
        for thread in threading.enumerate():
            if thread.name == "shardckpt-warm":
                thread.join()
        prepared = engine._pool.nbytes
        engine.async_save(state, tmp_path / "c").result()
        assert 0 < engine._pool.nbytes == prepared
        assert limit is None or prepared <= limit


class Meeting:
    """A lock that every thread comes to once before any gets it the first time."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._lock = threading.Lock()
        self._here = threading.local()

    def __enter__(self) -> None:
        if not hasattr(self._here, "was"):
            self._here.was = True
            self._act()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_memory_is_touched_ahead_once() -> None:
    """Two that touch memory ahead, or one and a save, together take no more than the one of them that needs most."""
    pool = StagingPool()
    pool._lock = Meeting(threading.Barrier(2, timeout=60).wait)  # type: ignore[assignment]
    threads = [threading.Thread(target=pool.reserve, args=(2 * BLOCK,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool._touched == 2


def test_a_pool_that_is_closed_while_it_grows_stays_empty() -> None:
    """Memory for saves that will not come is not taken, nor kept by whoever keeps the pool."""
    for taken in (False, True):
        pool = StagingPool()
        pool._lock = Meeting(pool.close)  # type: ignore[assignment]
        if taken:
            with pytest.raises(UsageError, match="closed"):
                pool.take()
        else:
            pool.reserve(BLOCK)
        assert pool.nbytes == 0
        assert not pool._untouched


@pytest.mark.parametrize("what", ["thread", "memory"])
def test_what_cannot_be_touched_ahead_is_let_be(
    pool: StagingPool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    """A save that has been made doesn't fail, and none is blamed, for want of what the next one may need."""
    asked = threading.Event()

    def refuse(*_: object) -> None:
        asked.set()
        raise RuntimeError("can't start new thread") if what == "thread" else OSError(errno.ENOMEM, "no memory")

    if what == "thread":
        monkeypatch.setattr(threading.Thread, "start", refuse)
    else:
        monkeypatch.setattr(memory, "_map_arena", refuse)
    pool.warm(BLOCK)
    assert asked.wait(60)
    for thread in threading.enumerate():
        if thread.name == "shardckpt-warm":
            thread.join(60)
    assert pool.nbytes == 0
    assert capfd.readouterr().err == ""


def test_a_process_may_end_while_memory_is_touched() -> None:
    """A job that fails right after its start says why, where torch would abort it, and does not wait for gigabytes."""
    ending = textwrap.dedent("""
        import sys, threading, time
        from shardckpt.staging import StagingPool, memory
        pool, many = StagingPool(), threading.Event()
        arena, left = memory._map_arena, []
        def same():  # however much is asked for, it is the same memory that is touched
            left[:] = left or arena()
            many.set()
            return left.copy()
        memory._map_arena = same
        pool.warm(1 << 60)
        many.wait()
        sys.exit(7)
    """)
    done = subprocess.run([sys.executable, "-c", ending], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize("limit", [0, 1, BLOCK, 3 * BLOCK, 3 * BLOCK + 5])
def test_budget_is_kept_and_always_lets_one_block_through(pool: StagingPool, limit: int) -> None:
    """A limit bounds memory, and no limit is so small that nothing moves."""
    budget = Budget(pool, limit)
    allowed = max(1, limit // BLOCK)
    blocks = [budget.acquire() for _ in range(allowed)]
    assert budget.try_acquire() is None
    blocks.pop().release()
    assert budget.try_acquire() is not None
    assert pool.nbytes == allowed * BLOCK


def test_waiting_for_a_block_ends_with_its_release(pool: StagingPool) -> None:
    """Staging resumes when the writer gives a block back."""
    budget = Budget(pool, BLOCK)
    block = budget.acquire()
    threading.Timer(0.1, block.release).start()
    start = time.monotonic()
    budget.acquire().release()
    assert 0.05 < time.monotonic() - start < 10


def test_budgets_of_one_pool_are_independent(pool: StagingPool) -> None:
    """A load doesn't wait for the memory that a save in the background holds."""
    Budget(pool, BLOCK).acquire()
    assert Budget(pool, BLOCK).try_acquire() is not None


def test_closed_pool_refuses(pool: StagingPool) -> None:
    """Using a closed Checkpointer is an error that says so, and blocks still out stay valid."""
    block = Budget(pool, None).acquire()
    pool.close()
    pool.close()
    with pytest.raises(UsageError, match="closed"):
        pool.take()
    block.tensor.fill_(1)
    block.release()
    assert pool.nbytes == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_gets_a_clear_error(pool: StagingPool) -> None:
    """The memory isn't in a child, where others may use its addresses: it is neither touched nor unmapped there."""
    Budget(pool, None).acquire().release()
    held = pool._lock.acquire()  # as a thread that the child does not have may
    child = os.fork()
    if child == 0:
        status = 1
        gc.freeze()  # of what other tests left, finalizers may wait for threads of the parent
        try:
            pool.take()
        except UsageError:
            # Whatever the child maps now may get the addresses of the pool, which must survive the pool's end.
            maps = [mmap.mmap(-1, 256 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(4)]
            pool.close()
            del pool
            gc.collect()
            for area in maps:
                area[0] = area[-1] = 1
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert held
    pool._lock.release()
    assert pool.take() is not None


@pytest.mark.parametrize(("threads", "limit"), [(1, None), (3, None), (3, BLOCK), (3, 3 * BLOCK)])
def test_stream_is_the_sources_back_to_back(pool: StagingPool, threads: int, limit: int | None) -> None:
    """Every layout of memory arrives as the elements in row-major order, small and large, over block boundaries."""
    large = noise(1500, 2001)
    sources = [
        source("complex", noise(7, 3, dtype=torch.complex64).conj()),
        source("negative", noise(5, dtype=torch.complex128).conj().imag),
        source("transposed", large.t()),
        source("large", large),
        source("stepped", large[::3, 1::7]),
        source("expanded", noise(1, 9).expand(4, 9)),
        source("scalar", torch.tensor(4.5)),
        source("one of many", noise(8)[3:4:2].as_strided((1, 1), (5, 2))),
        source("empty", torch.empty(0, 3)),
        source("parameter", torch.nn.Parameter(noise(33))),
        source("channels", noise(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        source("half", noise(3_000_001, dtype=torch.bfloat16)),
        source("bytes", noise(9_000_001, dtype=torch.uint8)),
        source("bool", noise(11, dtype=torch.bool)),
    ]
    for offset in (0, 4096, BLOCK - 4096):
        sources = in_order(sources)
        expected = torch.cat([raw(item.tensor) for item in sources])
        assert torch.equal(staged(sources, pool, offset=offset, threads=threads, limit=limit), expected)


def test_unaligned_streams_are_right_too(pool: StagingPool) -> None:
    """Strided tensors after an odd number of bytes can't be viewed in place; they are copied all the same."""
    sources = [source("a", noise(3, dtype=torch.uint8)), source("b", noise(70, 90).t()), source("c", noise(9))]
    assert torch.equal(staged(sources, pool), torch.cat([raw(item.tensor) for item in sources]))


def test_blocks_end_on_the_grid(pool: StagingPool) -> None:
    """Each block but the last is full, since the storage takes nothing else; an exact fit leaves no empty block."""
    filled: list[int] = []

    def emit(block: Block) -> None:
        filled.append(block.filled)
        block.release()

    def fills(nbytes: int, offset: int) -> list[int]:
        filled.clear()
        tensor = torch.zeros(nbytes, dtype=torch.uint8)
        stage([source("a", tensor)], pool, limit=None, first_block_offset=offset, emit=emit)
        return list(filled)

    assert fills(BLOCK + 1, 0) == [BLOCK, 1]
    assert fills(2 * BLOCK - 4096, 4096) == [BLOCK, BLOCK]
    assert fills(10, 4096) == [4106]
    assert fills(0, 4096) == []


def test_snapshot_is_finished_on_return(pool: StagingPool) -> None:
    """What the training loop does after the call isn't in the checkpoint."""
    tensor = noise(2 * BLOCK, dtype=torch.uint8)
    expected = tensor.clone()
    blocks: list[Block] = []
    stage([source("a", tensor)], pool, limit=None, first_block_offset=0, emit=blocks.append)
    tensor.zero_()
    assert torch.equal(torch.cat([block.tensor[: block.filled] for block in blocks]), expected)


def test_limit_makes_staging_wait(pool: StagingPool) -> None:
    """A synchronous save of any size uses bounded memory."""
    out: list[Block] = []
    most = 0

    def emit(block: Block) -> None:
        nonlocal most
        out.append(block)
        most = max(most, len(out))
        if len(out) == 2:
            threading.Timer(0.01, out.pop().release).start()

    stage(
        [source("a", torch.zeros(9 * BLOCK, dtype=torch.uint8))], pool, limit=2 * BLOCK, first_block_offset=0, emit=emit
    )
    assert most == 2
    assert pool.nbytes == 2 * BLOCK


class FakeStream:
    """What staging asks of a CUDA stream; its events remember how many were recorded when each was waited for."""

    def __init__(self) -> None:
        self.recorded = 0
        self.waits: list[tuple[int, int]] = []

    def record_event(self) -> "FakeEvent":
        self.recorded += 1
        return FakeEvent(self, self.recorded)

    def synchronize(self) -> None:
        self.waits.append((self.recorded, self.recorded))


class FakeEvent:
    def __init__(self, stream: FakeStream, number: int) -> None:
        self.stream = stream
        self.number = number

    def synchronize(self) -> None:
        self.stream.waits.append((self.number, self.stream.recorded))


@pytest.mark.parametrize(("limit", "ahead"), [(None, 1), (BLOCK, 0)])
def test_device_copies_overlap(pool: StagingPool, limit: int | None, ahead: int) -> None:
    """A block is emitted only after its copies; the next block's are queued before, unless memory allows but one."""
    stream, emitted = FakeStream(), []

    def emit(block: Block) -> None:
        emitted.append((block.filled, list(stream.waits)))
        block.release()

    filler = Filler(Budget(pool, limit), 0, emit, [stream])
    filler.add(noise(3 * BLOCK + 5, dtype=torch.uint8), 3 * BLOCK + 5)
    filler.finish()
    assert [filled for filled, _ in emitted] == [BLOCK, BLOCK, BLOCK, 5]
    assert [waits[-1] for _, waits in emitted] == [(number, min(number + ahead, 4)) for number in range(1, 5)]
    filler.abandon()
    assert pool.nbytes == BLOCK * (1 + ahead)


def test_a_block_is_emitted_after_its_copies(pool: StagingPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several threads too, whoever writes a block never sees it half full, however slow one copy is."""
    tensor = noise(4 * BLOCK, dtype=torch.uint8)
    others = threading.Semaphore(0)

    def slow_first(to: int, source: int, nbytes: int) -> None:
        if source == tensor.data_ptr():
            # The copies of later blocks are done before that of the first.
            assert all(others.acquire(timeout=30) for _ in range(3))
        copy_memory(to, source, nbytes)
        others.release()

    monkeypatch.setattr(filling, "copy_memory", slow_first)
    assert torch.equal(staged([source("a", tensor)], pool, threads=4), tensor)


@pytest.mark.parametrize("threads", [1, 2])
def test_failed_emit_leaks_no_block(pool: StagingPool, threads: int) -> None:
    """After a failed save the pool is whole: its memory serves the next."""
    seen = 0

    def emit(block: Block) -> None:
        nonlocal seen
        seen += 1
        block.release()
        if seen == 2:
            raise OSError("disk on fire")

    for _ in range(3):
        seen = 0
        with pytest.raises(OSError, match="disk on fire"):
            stage(
                [source("a", torch.zeros(5 * BLOCK, dtype=torch.uint8))],
                pool,
                limit=threads * BLOCK,
                first_block_offset=0,
                emit=emit,
                threads=threads,
            )
    assert pool.nbytes == threads * BLOCK


def test_failed_copy_leaks_no_block(pool: StagingPool) -> None:
    """A tensor that can't be copied ends the save, and takes nothing with it."""
    bad = torch.empty(64, 1 << 20, dtype=torch.uint8, device="meta")
    for _ in range(3):
        with pytest.raises((NotImplementedError, RuntimeError)):
            stage(
                [source("a", torch.zeros(100)), source("b", bad)],
                pool,
                limit=BLOCK,
                first_block_offset=0,
                emit=Block.release,
            )
    assert pool.nbytes == BLOCK


def test_many_small_tensors_are_fast(pool: StagingPool) -> None:
    """Optimizers have thousands of small tensors; each may cost microseconds of the training loop, not more."""
    tensors = [torch.randn(1024) for _ in range(20_000)]
    sources = [source(str(number), tensor) for number, tensor in enumerate(tensors)]
    pool.reserve(BLOCK)
    start = time.thread_time()
    stage(sources, pool, limit=BLOCK, first_block_offset=0, emit=Block.release)
    assert time.thread_time() - start < 1.0


class Driver:
    """What of CUDA's runtime pinning calls; it takes `most` blocks."""

    def __init__(self, most: int) -> None:
        self.most, self.registered, self.cleared = most, list[int](), 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        assert (nbytes, flags) == (BLOCK, 1)
        if len(self.registered) == self.most:
            return 2
        assert address not in self.registered
        self.registered.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        self.registered.remove(address)
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A stand-in for a driver: there is no GPU where these tests run, and what is tested is what it is told."""
    driver = Driver(most=100)

    def clear() -> None:
        driver.cleared += 1

    monkeypatch.setattr(memory, "_cudart", lambda: driver)
    monkeypatch.setattr(memory, "_clear_cuda_error", clear)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return driver


def test_memory_is_pinned_before_a_save_waits_for_it(driver: Driver) -> None:
    """Telling the driver of a block takes as long as touching it: whoever reserves it pays, and no block pays twice."""
    pool = StagingPool()
    pool.pin()
    pool.reserve(3 * BLOCK)
    assert len(driver.registered) == 3
    held = [pool.take() for _ in range(4)]
    assert sorted(driver.registered) == sorted(block.address for block in held)
    for block in held:
        pool.give(block)
    pool.take()
    assert len(driver.registered) == 4
    pool.close()
    assert driver.registered == []


def test_a_driver_that_refuses_is_not_asked_again(driver: Driver) -> None:
    """Its refusal would else be taken for the fault of a later kernel, once for each block."""
    driver.most = 1
    pool = StagingPool()
    pool.pin()
    assert len({pool.take().address for _ in range(3)}) == 3
    pool.pin()
    pool.take()
    assert (len(driver.registered), driver.cleared) == (1, 1)
    pool.close()


def test_a_driver_that_fails_costs_no_block(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the caller's; the block is there for the next one."""
    pool = StagingPool()
    pool.reserve(BLOCK)
    pool.pin()
    monkeypatch.setattr(driver, "cudaHostRegister", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pool.take()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pool.pin()
    pool.take()
    assert pool.nbytes == BLOCK
    pool.close()


def test_a_pool_closed_while_it_pins_leaves_nothing_pinned(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver would go on knowing memory that has been given back."""
    pool = StagingPool()
    pool.pin()
    register = driver.cudaHostRegister

    def slow(address: int, nbytes: int, flags: int) -> int:
        pool.close()
        return register(address, nbytes, flags)

    monkeypatch.setattr(driver, "cudaHostRegister", slow)
    pool.take()
    assert driver.registered == []


def test_a_forked_child_tells_the_driver_nothing(driver: Driver) -> None:
    """CUDA does not work there, and what the parent pinned is the parent's."""
    pool = StagingPool()
    pool.pin()
    pool.take()
    child = os.fork()
    if child == 0:
        pool.close()
        os._exit(len(driver.registered))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    pool.close()
    assert driver.registered == []


@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("offset", (0, 4096, BLOCK - 100))
def test_what_is_placed_early_is_where_staging_puts_it(pool: StagingPool, offset: int, threads: int) -> None:
    """The same stream, whichever sources are copied first, and no block more than it takes."""
    sizes = (5, 3 << 20, 0, BLOCK, 17, 2 * BLOCK + 9, 1, 6 << 20)
    sources = [source(f"t{number}", noise(size, dtype=torch.uint8, seed=number)) for number, size in enumerate(sizes)]
    expected = staged(sources, pool, offset=offset)
    for chosen in (set(), {0}, {1, 4}, {3}, {0, 2, 5, 7}, {5, 6}, set(range(len(sizes)))):
        early = place_early(sources, chosen, pool, limit=None, first_block_offset=offset, threads=threads)
        assert len(early.blocks) == blocks_of(sources, chosen, offset)
        late = [
            each._replace(tensor=torch.zeros_like(each.tensor)) if number in chosen else each
            for number, each in enumerate(sources)
        ]
        assert torch.equal(staged(late, pool, offset=offset, threads=threads, early=early), expected)
        assert not early.blocks
    assert pool.nbytes <= BLOCK * -(-(offset + sum(sizes)) // BLOCK)


def test_what_is_placed_early_comes_back_if_staging_fails(pool: StagingPool) -> None:
    """Blocks that were filled for nothing are there for the next save."""
    sources = [source(name, noise(BLOCK, dtype=torch.uint8)) for name in "abc"]
    early = place_early(sources, {0, 2}, pool, limit=None, first_block_offset=0)

    def refuse(block: Block) -> None:
        block.release()
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        stage(sources, pool, limit=None, first_block_offset=0, emit=refuse, early=early)
    assert len({pool.take().address for _ in range(2)}) == 2
    assert pool.nbytes == 2 * BLOCK
