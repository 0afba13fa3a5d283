"""No rank waits for one that will not come: it is told why, and long before a timeout, which would be past the test."""

import pytest

import ranks
import shardckpt
from lowest import CANNOT
from multirank import hang_cases, leaving_cases, processes

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


@pytest.mark.parametrize(("who", "how"), ((0, "exit"), (0, "destroy"), (1, "exit"), (2, "destroy")))
def test_a_process_that_ends_finishes_its_save_and_is_heard(tmp_path, who, how):
    """A script that ends while its save is in flight fails nobody's save, nor that of a rank that is slow to hear."""
    found = processes.run(leaving_cases.after_the_call, 3, str(tmp_path / "ck"), who, how)
    assert [one and one[0] for one in found] == [None if rank == who else "ok" for rank in range(3)]
    assert shardckpt.load(tmp_path / "ck")["t"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("who", (0, 1))
@pytest.mark.parametrize("case", (leaving_cases.before_it_has_a_job, leaving_cases.between_turns))
def test_a_rank_that_leaves_its_call_is_heard_of_in_the_background(tmp_path, case, who):
    """Once the others wait in the background for its word, or its verdict, Ctrl-C there is their error at once."""
    found = processes.run(case, 3, str(tmp_path / "ck"), who)
    assert found[who][0] == "KeyboardInterrupt"
    for kind, text in found[:who] + found[who + 1 :]:
        assert kind == "SaveFailedError"
        assert f"rank {who}: interrupted by KeyboardInterrupt" in text


@pytest.mark.parametrize(
    ("who", "at", "told"),
    (
        (0, "put_rank_manifest", "SaveFailedError"),
        (1, "put_rank_manifest", "SaveFailedError"),
        (0, "publish", "UncertainCommitError"),
    ),
)
def test_whatever_ends_a_job_in_the_background_is_told(tmp_path, who, at, told):
    """SystemExit in a thread is for that thread alone; who waits for what it was to say must hear of it."""
    for kind, text in processes.run(leaving_cases.in_the_background, 3, str(tmp_path / "ck"), who, at):
        assert kind == told
        assert "interrupted by SystemExit" in text


@pytest.mark.parametrize(("who", "kind"), ((0, "UncertainCommitError"), (1, "SaveFailedError")))
def test_an_interrupt_at_the_end_of_a_process_is_heard_of(tmp_path, who, kind):
    """Python waits for our save at its end, and a second Ctrl-C ends that wait: the others hear who left, and how."""
    found = processes.run(leaving_cases.at_the_end, 3, str(tmp_path / "ck"), who)
    assert found[who] is None
    for told, text in found[:who] + found[who + 1 :]:
        assert told == kind
        assert f"rank {who}" in text
        assert "ended before" in text


@pytest.mark.parametrize("when", ("save", "background", "load", "exchange"))
def test_the_death_of_the_store_ends_all_waits(tmp_path, when):
    """The process that hosts the Store is killed: every rank hears at once that it is gone, and in our words."""
    found = processes.run(leaving_cases.without_a_store, 3, str(tmp_path / "ck"), when, host=True)
    expected = {"background": {"SaveFailedError", "UncertainCommitError"}}.get(when, {"RankTimeoutError"})
    for kind, text in found:
        assert kind in expected
        assert "lost contact with the process group's store" in text
        assert "hosts it" in text


def test_a_verdict_that_was_heard_stands(tmp_path):
    """Where the Store ends with a process that is through, as rank 0 may be, nobody's committed save has failed."""
    found = processes.run(leaving_cases.store_gone_once_heard, 2, str(tmp_path / "ck"), host=True)
    assert [kind for kind, _ in found] == ["ok", "ok"]


@pytest.mark.parametrize(
    "where",
    (
        "save",
        "result",
        "load",
        pytest.param(
            "exchange", marks=pytest.mark.skipif(bool(CANNOT), reason="torch 2.6 closes groups under the GIL")
        ),
    ),
)
def test_an_interrupt_ends_every_wait(tmp_path, where):
    """Ctrl-C reaches whoever waits for another rank, wherever; a save that is in flight goes on all the same."""
    first, second = processes.run(leaving_cases.interrupted_wait, 2, str(tmp_path / "ck"), where, host=True)
    assert first[0].startswith("KeyboardInterrupt")
    if where == "result":
        assert (first[1:], second) == (["ok"], ["ok", "ok"])
    else:
        assert "rank 0: interrupted by KeyboardInterrupt" in second[0]


def test_a_forked_child_waits_for_nobody(tmp_path):
    """At its end a DataLoader's worker must not ask the Store over the connection that it shares with its parent."""
    (owed, in_child), (others, _) = ranks.world(2).run(hang_cases.owed_in_a_fork, str(tmp_path / "ck"))
    assert owed > 0
    assert others == in_child == 0
