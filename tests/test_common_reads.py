"""Whether others want the same bytes: pure, so checked on random wants."""

import random

from hypothesis import given
from hypothesis import strategies as st

from shardckpt.reader.common import Crowd, is_common, points, sample

MIB = 1 << 20
Stretches = list[tuple[str, int, int]]


def told(stretches: Stretches) -> list[int]:
    return sample(point for name, start, stop in stretches for point in points(name, [(start * MIB, stop * MIB)]))


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
