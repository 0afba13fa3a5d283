"""Boxes against brute force over every element of small arrays."""

import itertools
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.box import (
    Box,
    boxes_of_range,
    contains,
    contiguous_span,
    covers_exactly,
    find_overlap,
    full_box,
    intersect,
    relative_to,
    slice_notation,
    slices,
)

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def elements(box: Box) -> set[tuple[int, ...]]:
    ranges = (range(start, start + n) for start, n in zip(box.offsets, box.lengths, strict=True))
    return set(itertools.product(*ranges))


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(offsets, tuple(draw(st.integers(0, n - start)) for start, n in zip(offsets, shape, strict=True)))


@st.composite
def shape_and_boxes(draw: st.DrawFn, most: int = 2) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(shapes)
    return shape, draw(st.lists(boxes_in(shape), min_size=2, max_size=most))


@st.composite
def partitions(draw: st.DrawFn, most: int = 24) -> tuple[tuple[int, ...], list[Box]]:
    """An array of any size and boxes that tile it, made by straight cuts through one box after the other."""
    shape = tuple(draw(st.lists(st.integers(1, 40), max_size=4)))
    tiles = [full_box(shape)]
    for _ in range(draw(st.integers(0, most)) if shape else 0):
        index = draw(st.integers(0, len(tiles) - 1))
        dim = draw(st.integers(0, len(shape) - 1))
        offsets, lengths = tiles[index]
        if lengths[dim] < 2:
            continue
        at = draw(st.integers(1, lengths[dim] - 1))
        del tiles[index]
        tiles.append(Box(offsets, (*lengths[:dim], at, *lengths[dim + 1 :])))
        rest = (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :])
        tiles.append(Box(rest, (*lengths[:dim], lengths[dim] - at, *lengths[dim + 1 :])))
    return shape, draw(st.permutations(tiles))


def frames(count: int) -> tuple[tuple[int, int], list[Box]]:
    """A pinwheel of four strips around a smaller one, and so on: no straight cut separates them."""
    size = 2 * count + 1
    tiles = [Box((count, count), (1, 1))]
    for at in range(count):
        n = size - 2 * at - 1
        tiles += [
            Box((at, at), (1, n)),
            Box((at, at + n), (n, 1)),
            Box((at + n, at + 1), (1, n)),
            Box((at + 1, at), (n, 1)),
        ]
    return (size, size), tiles


@given(shape_and_boxes())
def test_intersect_and_contains_agree_with_sets(case: tuple[tuple[int, ...], list[Box]]) -> None:
    """What a read copies is exactly what the stored and the wanted box have in common."""
    _, (a, b) = case
    common = intersect(a, b)
    assert (elements(common) if common else set()) == elements(a) & elements(b)
    assert intersect(b, a) == common
    if b.volume:
        assert contains(a, b) == (elements(b) <= elements(a))


def test_a_scalar_is_one_box_of_one_element() -> None:
    """A 0-dim tensor (an optimizer's step) goes the way of all others."""
    scalar = full_box(())
    assert scalar == Box((), ())
    assert (scalar.volume, scalar.ends) == (1, ())
    assert intersect(scalar, scalar) == scalar
    assert boxes_of_range((), 0, 1) == [scalar]
    assert contiguous_span(scalar, scalar) == (0, 1)
    assert covers_exactly((), [scalar]).exact
    assert covers_exactly((), []).missing == 1
    assert covers_exactly((), [scalar, scalar]).overlap == (0, 1)


@given(st.data(), shapes)
def test_a_range_becomes_few_boxes_in_its_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    """A cut of a tensor at any element writes these elements, in this order, in the promised number of entries."""
    start, stop = sorted(data.draw(st.integers(0, prod(shape))) for _ in range(2))
    every = list(itertools.product(*map(range, shape)))
    found = boxes_of_range(shape, start, stop)
    assert list(itertools.chain.from_iterable(sorted(elements(box)) for box in found)) == every[start:stop]
    assert all(box.volume for box in found)
    assert len(found) <= max(1, 2 * len(shape) - 1)


@given(shape_and_boxes())
def test_contiguous_span_is_the_shortest_cover(case: tuple[tuple[int, ...], list[Box]]) -> None:
    """A ranged read fetches all of what is needed, and no more than one contiguous range must have."""
    _, (outer, box) = case
    inner = intersect(outer, box)
    if inner is None:
        return
    order = sorted(elements(outer))
    numbers = [order.index(element) for element in elements(inner)]
    assert contiguous_span(outer, inner) == (min(numbers), max(numbers) + 1)


def test_an_empty_box_spans_nothing() -> None:
    """A rank whose part of a tensor has no elements reads nothing."""
    assert contiguous_span(Box((2,), (5,)), Box((3,), (0,))) == (0, 0)


@given(partitions())
def test_tiles_cover_exactly(case: tuple[tuple[int, ...], list[Box]]) -> None:
    """No sound checkpoint is refused, however its tensors were cut."""
    shape, tiles = case
    assert covers_exactly(shape, tiles).exact


@given(partitions(), st.data())
def test_a_lost_tile_is_counted(case: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    """A hole is found, and its size is right, since the error message states it."""
    shape, tiles = case
    lost = tiles.pop(data.draw(st.integers(0, len(tiles) - 1)))
    assert covers_exactly(shape, tiles) == (lost.volume, None, None)


@given(partitions(), st.data())
def test_a_tile_too_many_is_found(case: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    """An element that two boxes claim is found, even where the total of elements is right."""
    shape, tiles = case
    extra = data.draw(boxes_in(shape))
    tiles.insert(data.draw(st.integers(0, len(tiles))), extra)
    coverage = covers_exactly(shape, tiles)
    if extra.volume == 0:
        assert coverage.exact
        return
    assert coverage.overlap is not None
    one, two = coverage.overlap
    assert one < two
    assert intersect(tiles[one], tiles[two])


@given(shape_and_boxes(most=8))
def test_coverage_agrees_with_brute_force(case: tuple[tuple[int, ...], list[Box]]) -> None:
    """Boxes in no order at all are judged as counting element by element would."""
    shape, boxes = case
    claims = [element for box in boxes for element in elements(box)]
    coverage = covers_exactly(shape, boxes)
    assert (coverage.overlap is not None) == (len(claims) != len(set(claims)))
    missing = prod(shape) - len(set(claims))
    assert coverage.missing <= missing
    assert coverage.exact == (len(claims) == prod(shape) == len(set(claims)))
    if coverage.overlap is None:
        assert coverage.missing == missing


@pytest.mark.parametrize(
    "box",
    [
        Box((0,), (4,)),
        Box((0, 0, 0), (4, 4, 1)),
        Box((0, 0), (4,)),
        Box((0, 0), (-2, -8)),
        Box((-1, 0), (4, 4)),
        Box((1, 0), (4, 4)),
        Box((0, 1 << 62), (4, 1 << 62)),
    ],
)
def test_a_box_that_is_no_region_of_the_array(box: Box) -> None:
    """A forged box is refused before anything is computed with it."""
    coverage = covers_exactly((4, 4), [Box((0, 0), (0, 9)), box])
    assert coverage.outside == 1
    assert not coverage.exact


def test_nothing_covers_an_empty_array() -> None:
    """A tensor with a 0 in its shape is complete without any box, and with empty ones."""
    assert covers_exactly((3, 0), []).exact
    assert covers_exactly((3, 0), [Box((0, 0), (3, 0)), Box((3, 0), (0, 0))]).exact


@pytest.mark.timeout(30)
@pytest.mark.parametrize("layout", ["slabs", "grid", "bricks", "frames", "growing"])
def test_ten_thousand_boxes_are_fast(layout: str) -> None:
    """Checking a large checkpoint doesn't take quadratic time; comparing all pairs would take over a minute."""
    n = 100
    shape, tiles = {
        "slabs": lambda: ((n * n * 3, 7), [Box((i * 3, 0), (3, 7)) for i in range(n * n)]),
        "grid": lambda: ((n * 2, n * 5), [Box((i * 2, j * 5), (2, 5)) for i in range(n) for j in range(n)]),
        "bricks": lambda: (
            (n, n * 4 + 2),
            [
                Box((i, max(0, j * 4 - i % 2 * 2)), (1, min(4, 4 - (i % 2 and not j) * 2)))
                for i in range(n)
                for j in range(n)
            ]
            + [Box((i, n * 4 - i % 2 * 2), (1, 2 + i % 2 * 2)) for i in range(n)],
        ),
        "frames": lambda: frames(n * n // 4),
        "growing": lambda: ((1 << 5000,), [Box(((1 << i) - (i == 0),), ((1 << i) + (i == 0),)) for i in range(5000)]),
    }[layout]()
    assert covers_exactly(shape, tiles).exact
    assert covers_exactly(shape, tiles[:-1]).missing == tiles[-1].volume
    assert find_overlap([*tiles, tiles[len(tiles) // 2]]) == (len(tiles) // 2, len(tiles))


def test_slices_and_notation() -> None:
    """The text in a shard's keys and the index used to copy mean the same elements."""
    box = Box((2, 0), (3, 4))
    assert slice_notation(box) == "2:5,0:4"
    assert slices(box) == (slice(2, 5), slice(0, 4))
    assert slice_notation(full_box(())) == ""
    assert slices(full_box(())) == ()
    assert relative_to(Box((2, 0), (9, 9)), Box((4, 3), (1, 2))) == Box((2, 3), (1, 2))
