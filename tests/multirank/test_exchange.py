"""Loads that share their reads, with real gloo processes: every bit, how many bytes, and what a failure does."""

from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
from multirank import exchange_cases as cases
from multirank import processes

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, str]:
    """The same state, saved by rows on three ranks; by compression."""
    root = tmp_path_factory.mktemp("rows")
    found = {}
    for compression in (None, "zstd"):
        found[compression] = str(root / str(compression))
        ranks.world(3).run(cases.save, found[compression], compression)
    return found


def stored_bytes(path: str) -> int:
    return sum(file.stat().st_size for file in Path(path).iterdir() if file.name != "manifest.json")


def read(results: list[dict[str, Any]]) -> int:
    return sum(sum(result["read"].values()) for result in results)


def received(results: list[dict[str, Any]]) -> int:
    return sum(result["received"] for result in results)


@pytest.mark.parametrize("compression", (None, "zstd"))
@pytest.mark.parametrize("size", (2, 4))
def test_each_stored_byte_is_read_once(written, size, compression):
    """Columns of rows, a replica each, several boxes a rank: together the ranks read what one alone would."""
    path = written[compression]
    kinds = [(kind, share) for kind in ("columns", "plain", "strided") for share in (True, False)]
    by_rank = ranks.world(size).run(cases.several, path, kinds)
    for index, (kind, share) in enumerate(kinds):
        results = [result[index] for result in by_rank]
        wanted = sum(result["wanted"] for result in results)
        if share:
            assert read(results) <= 1.1 * stored_bytes(path), kind
            # What a rank does not read of what it wants, it receives, once.
            assert wanted - cases.NBYTES - size * cases.CELL <= received(results) <= wanted, kind
        else:
            assert received(results) == 0
            assert kind == "strided" or read(results) > 1.8 * size / 2 * 0.9 * stored_bytes(path)


@pytest.mark.parametrize(
    ("kind", "hosts", "cached"),
    [("plain", 1, True), ("columns", 1, True), ("rows", 1, False), ("plain", 4, False), ("plain", 2, True)],
)
def test_the_disk_is_read_once_a_host(written, kind, hosts, cached):
    """Ranks of one host that want the same read through its cache; nobody else pays for a cache that nobody uses."""
    assert ranks.world(4).run(cases.ways, written[None], kind, hosts) == [{cached}] * 4


@pytest.mark.parametrize("size", (2, 4))
def test_auto_does_what_the_trial_shows_to_be_faster(written, size):
    """Where the storage is what takes time the ranks share, else they don't; and the trial reads less than a tenth."""
    kinds = [("columns", "auto"), ("plain", "auto")]
    for slow in ("storage", "network"):
        by_rank = ranks.world(size).run(cases.several, written[None], kinds, slow=slow)
        for index, (kind, _) in enumerate(kinds):
            results = [result[index] for result in by_rank]
            if slow == "storage":
                assert received(results) > 0.3 * cases.NBYTES, kind
                assert read(results) <= 1.1 * stored_bytes(written[None]), kind
            else:
                assert 0 < received(results) < 0.1 * sum(result["wanted"] for result in results), kind


def test_auto_leaves_sharing_to_the_page_cache(written):
    """Ranks of one host read each other's bytes from the page cache, and no exchange is faster: no trial even."""
    by_rank = ranks.world(2).run(cases.several, written[None], [("plain", "auto")], slow="storage", one_host=True)
    assert received([result[0] for result in by_rank]) == 0


def test_dtypes_are_converted_by_who_receives(written):
    """The stored dtype crosses between ranks, whatever the live one is."""
    results = ranks.world(2).run(cases.load, written[None], "columns", dtype=torch.float64)
    assert received(results) > 0.4 * cases.NBYTES


def test_nothing_to_share_is_not_shared(written):
    """A rank that wants nothing reads and receives nothing, and one that wants all alone reads alone."""
    results = ranks.world(2).run(cases.load, written[None], "plain", only=1)
    # Rank 0 reads its own manifest for the plain values in it.
    shards = [[name for name in result["read"] if name.endswith(".safetensors")] for result in results]
    assert [bool(names) for names in shards] == [False, True]
    assert received(results) == 0
    (alone,) = ranks.world(1).run(cases.load, written[None], "plain")
    assert alone["received"] == 0


def test_ranks_with_other_options_agree(written):
    """One rank that must not share keeps all from it, and nobody waits for an exchange that is not to come."""
    assert received(ranks.world(2).run(cases.load_differently, written[None])) == 0


@pytest.mark.parametrize(("share", "at"), ((True, 1), (True, 6), ("auto", 1), ("auto", 4)))
def test_a_rank_that_cannot_read_stops_all(written, share, at):
    """Storage that fails on one rank, early or in a later round: no other hangs, all hear why, the next load works."""
    told = ranks.world(3).run(cases.fail, written[None], share, at)
    assert all("the cable is out" in text and "partly restored" in text for text in told)
    assert all("rank 1" in told[rank] for rank in (0, 2))


def test_a_rank_without_memory_keeps_nobody_waiting(written):
    """What a rank needs for an exchange it takes before the others begin to wait for it in collectives."""
    for text in ranks.world(2).run(cases.without_memory, written[None]):
        assert "not another byte" in text


def test_a_rank_that_left_the_group_is_in_the_next(written):
    """One rank that has no group any more makes all of them make a new one, instead of one alone."""
    for first, second in ranks.world(2).run(cases.after_an_interruption, written[None]):
        assert first["received"] > 0
        assert second["received"] > 0


@pytest.mark.parametrize("share", (True, "auto"))
def test_damage_is_found_by_whoever_reads_it(tmp_path, written, share):
    """A damaged cell that one rank reads for all is every rank's error, which names tensor and file."""
    copy = tmp_path / "ck"
    copy.mkdir()
    for file in Path(written[None]).iterdir():
        data = bytearray(file.read_bytes())
        if file.name.startswith("rank-00001") and file.suffix == ".safetensors":
            data[len(data) // 2] ^= 1
        (copy / file.name).write_bytes(data)
    for text in ranks.world(4).run(cases.damaged, str(copy), share):
        assert "is damaged" in text
        assert "tensor '" in text
        assert "rank-00001" in text


def test_groups_come_and_go(written):
    """New process groups get new connections; and once a rank is killed nobody waits, nor for one who waits for it."""
    world = ranks.World(4)
    victim = 2
    try:
        for first, second in world.run(cases.in_new_groups, written[None]):
            assert first["received"] > 0
            assert second["received"] > 0
        for pipe in world._pipes:
            pipe.send((cases.__name__, "killed", (written[None], victim, 3), {}))
        for rank, pipe in enumerate(world._pipes):
            if rank != victim:
                assert pipe.poll(40), f"rank {rank} hangs"
                told = pipe.recv()
                assert "a rank left in the middle of a load" in told
                assert f"no answer from rank {victim}: " in told
                assert "partly restored" in told
    finally:
        world.stop()


@pytest.mark.parametrize("who", (0, 1))
def test_a_rank_that_is_interrupted_in_an_exchange_says_so(written, who):
    """Whatever ends one rank's part where the others can't be told over the group, they hear, and of whom."""
    told = ranks.world(2).run(cases.interrupted, written[None], who)
    assert told[who] == "KeyboardInterrupt"
    assert f"rank {who}: interrupted by KeyboardInterrupt" in told[1 - who]
    assert "partly restored" in told[1 - who]


def test_a_rank_that_stands_still_is_named(written):
    """A rank that neither reads nor dies is waited for as long as `commit_timeout` says, and then named."""
    for told in processes.run(cases.standing_still, 3, written[None], 1, without=(1,))[::2]:
        assert "no answer from rank 1: " in told
        assert "partly restored" in told


@pytest.mark.parametrize("target", (2, 4))
def test_along_the_saved_dimension_only_the_needed_is_read(tmp_path, target):
    """Resharded rows: at most a twentieth more than is wanted on each rank, and no file that it needs nothing of."""
    path = str(tmp_path / "ck")
    source = 3
    ranks.world(source).run(cases.save_large, path)
    rows, step = -(-cases.ROWS // source), -(-cases.ROWS // target)
    for rank, result in enumerate(ranks.world(target).run(cases.load_large, path)):
        names = {name for name in result["read"] if name != "manifest.json"}
        start, stop = rank * step, min((rank + 1) * step, cases.ROWS)
        needed = {part for part in range(source) if part * rows < stop and start < (part + 1) * rows}
        assert {int(name[5:10]) for name in names} == needed
        assert sum(result["read"][name] for name in names) <= 1.05 * result["wanted"]
