"""Values that differ by rank, with real processes: each rank's own on as many ranks, all of them on other numbers."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import ranks
import shardckpt
from multirank import per_rank_cases as cases

pytestmark = pytest.mark.multiprocess

SAVED_BY = 3


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("per_rank") / "by-3")
    names = ranks.world(SAVED_BY).run(cases.save, path, synchronously=False)[0]
    # Rank 0 has no object of its own, the others have.
    assert [name[-8:] for name in names if name.startswith("objects")] == ["0001.pkl", "0002.pkl"]
    return path


def everybody(*keys: Any) -> list[Any]:
    """The values by rank that were saved at a place."""
    found = []
    for rank in range(SAVED_BY):
        value: Any = cases.state_of(rank)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else value[key]
        found.append(cases.shown(value))
    return found


def test_each_rank_gets_its_own_back(written):
    """On as many ranks as saved every rank has its own value, of the instant of the call, in the live tensors."""
    for rank, result in enumerate(ranks.world(SAVED_BY).run(cases.load, written)):
        assert result["state"] == cases.shown(cases.state_of(rank))
        assert (result["per_rank"], result["heard"]) == ({}, [])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_another_number_of_ranks_is_offered_everything(written, size):
    """What is a rank's own has no owner there: it stays as it is, the report has it all, and one line says so."""
    offers = {
        "rng": everybody("rng"),
        "position": [100, 101, 102],
        "loader.at.0": [200, 201, 202],
        "whole": [{"position": 300}, {"position": 301}, {"position": 302}],
        "nested.1.own": everybody("nested", 1, "own"),
        "nested.1.again": everybody("nested", 1, "again"),
        "some.odd": [None, "of 1", None],
    }
    results = ranks.world(size).run(cases.load, written)
    for rank, result in enumerate(results):
        untouched = cases.shown(cases.fresh_state(rank))
        untouched |= {"shared": result["state"]["shared"], "loader": [5, -1]}
        untouched["nested"][0], untouched["some"]["step"] = 7, 9
        assert result["state"] == untouched
        assert result["state"]["shared"][2] == [0, 1, 2, 3, 4, 5]
        assert result["per_rank"] == offers
        assert "per_rank=['rng', 'position'" in result["text"]
    heard = [line for result in results for line in result["heard"]]
    assert len(heard) == 1
    assert all(repr(place) in heard[0] for place in offers)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_state_says_what_becomes_of_the_values(written, size):
    """``resize`` gets every saved value and its own place, and what it returns is the value; the rest is offered."""
    whole, own = [{"position": 300 + rank} for rank in range(SAVED_BY)], everybody("nested", 1, "own")
    for rank, result in enumerate(ranks.world(size).run(cases.resize, written)):
        assert result["asked"] == [(SAVED_BY, rank, size)] * 3
        assert result["position"] == [100, 101, 102][rank::size]
        assert result["whole"] == whole[rank::size]
        assert result["own"] == own[rank::size]
        assert result["loader"] == 202
        assert result["offered"] == ["nested.1.again", "rng", "some.odd"]
        assert result["bytes"] > SAVED_BY * 5056


def test_a_resize_that_fails_fails_everywhere_and_changes_nothing(written):
    """The user's code may raise on one rank: all hear which and where, before a byte of the state has changed."""
    for told, unchanged in ranks.world(2).run(cases.failing_resize, written):
        assert "'position'" in told
        assert "ZeroDivisionError on rank 1: no such share. Nothing was changed." in told
        assert unchanged


@pytest.mark.parametrize("size", [2, 3])
def test_marked_and_unmarked_values_do_not_match(written, size):
    """Nobody gets another rank's value because a mark was forgotten, on any number of ranks, and all hear of it."""
    results = ranks.world(size).run(cases.mismatches, written)
    for told, *_ in results:
        for place in ("position", "rng", "whole"):
            assert f"{place}: " in told
        assert told.count("wrap it in shardckpt.PerRank") == 3
        assert told.count("take the shardckpt.PerRank around it off") == 2
        assert ("nested.1.again: nothing here, a value of rank 2" in told) == (size == SAVED_BY)
    *_, (_, position, mismatched, unexpected) = results
    assert position == 3
    assert len(mismatched) == 5 + (size == SAVED_BY)
    assert unexpected == []
    for rank, (_, position, mismatched, _) in enumerate(results[:-1]):
        assert (position, mismatched) == (100 + rank if size == SAVED_BY else -1, [])


def test_without_a_template_everybody_is_listed(written):
    """``load(path)`` gives the values of all ranks, and each tensor of theirs has a name of its own."""
    loaded = shardckpt.load(written, weights_only=False)
    assert loaded["position"] == [100, 101, 102]
    assert loaded["loader"] == {"epoch": 5, "at": [[200, 201, 202]]}
    assert loaded["some"] == {"step": 9, "odd": [None, "of 1", None]}
    assert cases.shown(loaded["rng"]) == everybody("rng")
    own = loaded["nested"][1]["own"]
    assert cases.shown(own) == everybody("nested", 1, "own")
    assert own[2]["tied"] is own[2]["counts"]
    assert shardckpt.read_tensor(written, "nested.1.own.rank-2.counts").tolist() == [[2, 2]] * 3
    assert shardckpt.read_tensor(written, "rng.rank-1").equal(cases.rng(1))
    with pytest.raises(shardckpt.TensorNotFoundError, match=r"rng\.rank-"):
        shardckpt.read_tensor(written, "rng.rank-3")


def test_what_cannot_be_marked_is_refused(tmp_path):
    """A mark in a mark, on a part of a tensor, in an optimizer, on some ranks only: all hear which and where."""
    for told in ranks.world(2).run(cases.refused, str(tmp_path / "ck")):
        nested, spread, in_set, optimizer, on_some, elsewhere, here, *left = told
        assert "'a.rank-1.b' lies within another PerRank" in nested
        assert "'a.rank-1' is a DTensor in a PerRank" in spread
        assert "the set at 'a' holds a PerRank" in in_set
        assert "the optimizer at 'optimizer' has a PerRank" in optimizer
        assert "'a' is a PerRank on rank 1, but another value on a rank below it" in on_some
        assert "'a.rank-0' is the name of a value by rank of rank 0" in elsewhere
        assert "UsageError" in here
        assert left == []


def test_the_documentation_works(tmp_path):
    """The code that people copy runs as it stands."""
    text = (Path(__file__).parents[2] / "docs" / "per_rank.md").read_text(encoding="utf-8")
    results = ranks.world(2).run(cases.documented, str(tmp_path / "ck"), text)
    assert results == [(1000 + rank, [1000, 1001], {}, 1000 + rank) for rank in range(2)]


def test_plans_stay_good_while_values_by_rank_change(tmp_path):
    """Ten thousand ranks must not describe all tensors to each other because a counter went on, nor all store them."""
    for described, speaking, loaded in ranks.world(2).run(cases.repeated, str(tmp_path)):
        assert described == 1
        assert speaking == [True, False]
        assert [value["n"] for value in loaded] == [3, 3]
        assert [value["t"][2] for value in loaded] == [[3] * 3, [3] * 4]


def test_a_save_that_shares_shards_has_its_own_values(tmp_path):
    """Only tensors are promised to be equal: plain values and objects are those of the second save, on every rank."""
    for aliased, loaded, files in ranks.world(2).run(cases.alias, str(tmp_path)):
        assert aliased == [False, True, False]
        first, second, third = loaded
        assert [value["n"] for value in first] == [["a", 0], ["a", 1]]
        assert [value["n"] for value in second] == [["b", 0], ["b", 1]]
        assert [str(value["o"]) for value in first + second] == ["0", "1/7", "0", "1/8"]
        assert [value["t"] for value in first] == [value["t"] for value in second]
        assert [value["t"][2] for value in third] == [[0], [1.0]]
        assert sum(name.startswith("objects") for name in files) == 2
        assert len(files) == 2 * 3 + 1


def test_a_damaged_value_of_one_rank_is_found(written, tmp_path):
    """Digests guard values by rank as they guard all else."""
    path = tmp_path / "ck"
    shutil.copytree(written, path)
    shard = next(path.glob("rank-00001-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    Path(shard).write_bytes(data)
    with pytest.raises(shardckpt.CorruptCheckpointError, match="rank-00001"):
        shardckpt.load(path, weights_only=False)
