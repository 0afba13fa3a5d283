"""No rank waits for one that will not come: it is told why, and long before a timeout, which would be past the test."""

import pytest

import ranks
from multirank import hang_cases

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("saver", (0, 1))
def test_ranks_that_make_different_calls_hear_so(tmp_path, saver):
    """Where one saves, twice where the other does once, and the other loads, both learn who called what."""
    for kind, text in ranks.world(2).run(hang_cases.save_and_load, str(tmp_path / "ck"), saver):
        assert kind == "ConflictingStateError"
        assert "rank 0 called" in text
        assert "rank 1 called" in text
        assert "save(" in text
        assert "load(" in text


@pytest.mark.parametrize(("case", "who"), ((hang_cases.interrupted_load, 1), (hang_cases.interrupted_between_turns, 0)))
def test_an_interrupted_load_ends_on_every_rank(tmp_path, case, who):
    """Ctrl-C on one rank is an error on the others, wherever in the load it comes."""
    found = ranks.world(2).run(case, str(tmp_path / "ck"))
    assert found[who][0] == "KeyboardInterrupt"
    kind, text = found[1 - who]
    assert kind == "RemoteError"
    assert f"rank {who}: interrupted by KeyboardInterrupt" in text


def test_an_interrupt_ends_the_wait_for_a_rank_that_is_busy(tmp_path):
    """Ctrl-C is not held up by the Store, and a rank that has agreed to write is not waited for if it then leaves."""
    found = ranks.world(2).run(hang_cases.interrupted_wait, str(tmp_path / "ck"))
    assert found[1][0] == "KeyboardInterrupt"
    assert found[0][0] == "SaveFailedError"
    assert "rank 1: interrupted by KeyboardInterrupt" in found[0][1]


def test_ranks_that_fail_differently_go_one_way(tmp_path):
    """A damaged block here and a bad sector there: all ranks take the same next checkpoint, or none."""
    for number in range(4):
        found = ranks.world(2).run(hang_cases.different_errors, str(tmp_path / str(number)))
        # Whichever rank 0 heard of first.
        assert found in ([1, 1], ["StorageError", "StorageError"])


def test_a_manager_of_one_rank_asks_no_other(tmp_path):
    """What `Checkpointer(alone=True)` saves is that rank's, and so is its manager."""
    assert ranks.world(2).run(hang_cases.manager_of_one, str(tmp_path)) == [[], [1]]


def test_the_background_hears_that_a_rank_has_left(tmp_path):
    """A rank that writes while rank 0 leaves learns it then, and not after half an hour."""
    found = ranks.world(2).run(hang_cases.interrupted_before_its_job, str(tmp_path / "ck"))
    assert found[0][0] == "KeyboardInterrupt"
    assert found[1][0] == "SaveFailedError"
    assert "rank 0: interrupted by KeyboardInterrupt" in found[1][1]
