"""How evenly ranks that hold the same bytes share the work of writing them."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from shardckpt.box import full_box
from shardckpt.planner import Held, ShardPlan, plan_save
from shardckpt.sharing import pour

ITEMSIZE = {"bool": 1, "float32": 4}
MIB = 1 << 20


def loads(plans: Sequence[ShardPlan]) -> list[int]:
    return [sum(item.nbytes for item in plan.items) for plan in plans]


def data_parallel(world: int, shapes: Sequence[tuple[int, ...]], dtype: str = "float32") -> list[list[Held]]:
    return [[Held(f"t{n}", s, dtype, (full_box(s),), split=True) for n, s in enumerate(shapes)]] * world


@given(st.integers(1, 64), st.lists(st.integers(0, 20 * MIB // 4), max_size=20))
def test_replicated_bytes_are_shared_evenly(world: int, sizes: list[int]) -> None:
    """No rank makes the others wait: a mebibyte over the mean at most, or two where the mean is below one."""
    plans = plan_save(data_parallel(world, [(n,) for n in sizes]), ITEMSIZE)
    # Two, since a tensor of nearly two mebibytes can't be cut into pieces of at least one.
    mean = sum(loads(plans)) / world
    assert max(loads(plans)) <= max(mean + MIB, 2 * MIB)


@given(
    st.integers(2, 16),
    st.lists(st.tuples(st.integers(1, 3000), st.sampled_from([1, 3, 64, 768, 1024, 50_000])), min_size=1, max_size=12),
)
def test_matrices_are_cut_between_rows_into_few_boxes(world: int, shapes: list[tuple[int, int]]) -> None:
    """Evenness doesn't cost crumbs: each piece is a run of whole rows, of a mebibyte or more."""
    plans = plan_save(data_parallel(world, shapes), ITEMSIZE)
    least = MIB + 4 * 50_000  # a piece may need one row more than a mebibyte
    assert max(loads(plans)) <= max(sum(loads(plans)) / world + least, 2 * least)
    for plan in plans:
        for item in plan.items:
            shape = shapes[int(item.fqn[1:])]
            assert item.box.lengths[1] == shape[1]
            assert item.box.lengths == shape or item.nbytes >= MIB
    cuts = sum(len(plan.items) for plan in plans) - len(shapes)
    assert cuts < world


def test_shared_bytes_go_to_those_with_less_to_write() -> None:
    """A rank with a large part of its own writes less of what all hold."""
    ranks = [[*common] for common in data_parallel(4, [(40 * MIB,)], "bool")]
    for rank, n in ((1, 5 * MIB), (3, 20 * MIB)):
        ranks[rank].append(Held(f"own{rank}", (n,), "bool", (full_box((n,)),), split=True))
    assert loads(plan_save(ranks, ITEMSIZE)) == [15 * MIB, 15 * MIB, 15 * MIB, 20 * MIB]


def test_overlapping_groups_of_holders_are_levelled_together() -> None:
    """Where ranks 0, 1 share one tensor and ranks 1, 2 another, rank 1 doesn't write half of both."""
    box = full_box((30 * MIB,))
    a, b = (Held(name, (30 * MIB,), "bool", (box,), split=True) for name in "ab")
    assert max(loads(plan_save([[a], [a, b], [b]], ITEMSIZE))) <= 21 * MIB


def test_small_tensors_fill_what_cutting_leaves() -> None:
    """Thousands of small tensors are spread so that ranks differ by less than one of them, and none is cut."""
    shapes = [(n % 97 * 16 + 1, 5) for n in range(4000)]
    plans = plan_save(data_parallel(7, shapes), ITEMSIZE)
    assert max(loads(plans)) - min(loads(plans)) <= 97 * 16 * 5 * 4
    assert sum(len(plan.items) for plan in plans) == 4000


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.integers(0, 5000))
def test_pouring_raises_the_lowest_to_one_level(levels: list[int], amount: int) -> None:
    """The target that cuts aim at is the best there is."""
    poured = pour(levels, amount)
    assert sum(poured) == amount
    assert min(poured) >= 0
    after = [level + more for level, more in zip(levels, poured, strict=True)]
    top = max((level for level, more in zip(after, poured, strict=True) if more), default=0)
    assert all(level >= top - 1 for level in after)
