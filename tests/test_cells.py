"""Digests of a shard's blocks, whatever thread works them out."""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt import codecs
from shardckpt.writer import cells
from shardckpt.writer.cells import Cells

CELL = 16


@given(
    st.lists(st.sampled_from([0, 1, CELL - 1, CELL, CELL + 1, 5 * CELL, 11 * CELL + 3]), max_size=12),
    st.integers(1, 60),
    st.integers(CELL + 1, 60),
    st.randoms(use_true_random=False),
)
def test_digests_do_not_depend_on_how_bytes_arrive(
    sizes: list[int], first: int, block: int, random_: random.Random
) -> None:
    """The writer cuts the stream by blocks of the file, readers by the cells of each entry; both must agree."""
    data = memoryview(random_.randbytes(sum(sizes)))
    with mock.patch.object(cells, "DIGEST_BLOCK", CELL), mock.patch.object(codecs, "DIGEST_BLOCK", CELL):
        counted = Cells(sizes)
        bounds = [0, *range(first, len(data), block), len(data)]
        jobs = [counted.next(data[start:stop]) for start, stop in itertools.pairwise(bounds) if start < stop]
        counted.check_end()
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result(30)
        at = 0
        for size, text in zip(sizes, counted.texts(), strict=True):
            assert codecs.parse_digests(text) == codecs.block_digests(data[at : at + size])
            at += size


def test_missing_bytes_are_noticed() -> None:
    """A shard that is shorter than its manifest says is never finished."""
    counted = Cells([40, 2])
    counted.next(memoryview(bytes(41)))
    with pytest.raises(AssertionError, match="41 of 42 bytes"):
        counted.check_end()
