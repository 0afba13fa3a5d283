"""Whether others want the same bytes: pure, so checked on random wants."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.reader.common import Crowd, is_common, points, sample, spacing

MIB = 1 << 20
Stretches = list[tuple[str, int, int]]


def told(stretches: Stretches) -> list[int]:
    apart = spacing(0)
    return sample(
        point for name, start, stop in stretches for point in points(name, [(start * MIB, stop * MIB)], apart)
    )


@st.composite
def wants(draw: st.DrawFn) -> Stretches:
    names = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True))
    return [(name, start := draw(st.integers(0, 999)), start + draw(st.integers(8, 999))) for name in names]


@given(wants(), st.integers(2, 5), st.randoms())
def test_the_same_wants_are_common(wanted: Stretches, ranks: int, rng: random.Random) -> None:
    """Ranks that want the same are known to, in whatever order and pieces they name it, and say little."""
    samples = []
    for _ in range(ranks):
        cut = [(name, start, (start + stop) // 2) for name, start, stop in wanted]
        cut += [(name, (start + stop) // 2, stop) for name, start, stop in wanted]
        rng.shuffle(cut)
        samples.append(told(cut))
    assert all(own == samples[0] for own in samples)
    assert 0 < len(samples[0]) <= 16
    assert is_common(samples[0], samples[1:])


@given(wants(), st.integers(2, 5))
def test_disjoint_wants_are_not(wanted: Stretches, ranks: int) -> None:
    """Ranks that each want a part of their own never take one another for company."""
    samples = [
        told(
            [
                (name, start + (stop - start) * r // ranks, start + (stop - start) * (r + 1) // ranks)
                for name, start, stop in wanted
            ]
        )
        for r in range(ranks)
    ]
    for rank, own in enumerate(samples):
        assert not is_common(own, samples[:rank] + samples[rank + 1 :])
    assert not is_common([], samples)


def test_how_much_is_much() -> None:
    """What counts is the part of a rank's own wants that others share, however much more they want."""
    whole = told([("a", 0, 4000)])
    assert is_common(told([("a", 0, 2000)]), [whole])
    assert is_common(told([("a", 0, 2000)]), [told([("a", 0, 1000)]), told([("a", 1000, 2000)])])
    assert not is_common(told([("a", 0, 400), ("b", 0, 3600)]), [told([("a", 0, 400), ("c", 0, 3600)])])
    assert is_common(told([("a", 0, 3600), ("b", 0, 400)]), [told([("a", 0, 3600), ("c", 0, 400)])])


@given(st.integers(1, 20), st.integers(0, 50))
def test_everybody_does_everything(size: int, count: int) -> None:
    """Each of a crowd does all the work, once, and they begin at different places if there are enough."""
    work = list(range(count))
    orders = [Crowd(position, size).order(work) for position in range(size)]
    assert all(sorted(order) == work for order in orders)
    if count >= size:
        assert len({order[0] for order in orders}) == size


@pytest.mark.parametrize("nbytes", [0, 1, 10 << 40, 1 << 63])
def test_a_huge_checkpoint_is_told_by_few_points(nbytes: int) -> None:
    """Neither many terabytes, wanted as columns of every row, nor a manifest that claims as much, take long to tell."""
    found = list(points("a", [(0, nbytes), *((start, nbytes) for start in range(10_000))], spacing(nbytes)))
    assert len(found) <= 1 << 16
    assert len(found) == len(set(range(0, nbytes, spacing(nbytes))))
    half = sample(points("a", [(0, nbytes // 2)], spacing(nbytes)))
    assert is_common(half, [sample(found)]) == (nbytes > 1)
