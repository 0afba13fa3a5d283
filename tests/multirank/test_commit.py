"""All ranks reach one verdict about a commit, and none deletes what another may just have committed."""

import pytest

import ranks
from multirank import commit_cases

pytestmark = pytest.mark.multiprocess

OLD, NEW, AFTER = float(4 << 18), 0.0, 2.0 * (4 << 18)


@pytest.mark.parametrize("lands", (True, False))
def test_an_unknown_outcome_is_unknown_to_all_and_loses_nothing(tmp_path, lands):
    """Rank 0's storage falls silent in the act of the commit: every rank is told so, and none removes its shard."""
    for told in ranks.world(2).run(commit_cases.silent_at_commit, str(tmp_path / "ck"), lands):
        kind, message = told["error"]
        assert kind == "UncertainCommitError"
        assert "the cable is out" in message
        assert told["sum"] == (NEW if lands else OLD)
        assert told["after"] == AFTER
        assert told["seconds"] < 15
    assert len(list((tmp_path / "ck").iterdir())) == 5


def test_what_fails_after_the_commit_fails_no_rank(tmp_path):
    """A storage, or a bug, that breaks while rubbish is cleared cannot turn a committed save into a failure."""
    for told in ranks.world(2).run(commit_cases.silent_after_commit, str(tmp_path / "ck")):
        assert told["error"] is None
        assert (told["sum"], told["after"]) == (NEW, AFTER)
    assert len(list((tmp_path / "ck").iterdir())) == 5


@pytest.mark.parametrize("failing", (0, 1))
def test_a_rank_that_cannot_begin_its_shard_tells_the_others(tmp_path, failing):
    """Between the agreement and the writing there is no gap in which one rank fails and the others wait for it."""
    for rank, told in enumerate(ranks.world(2).run(commit_cases.failing_writer, str(tmp_path / "ck"), failing)):
        kind, message = told["error"]
        assert kind == "SaveFailedError"
        assert "too many tensors" in message
        assert rank == failing or f"rank {failing}" in message
        assert (told["sum"], told["after"]) == (OLD, AFTER)
        assert told["seconds"] < 15
    assert len(list((tmp_path / "ck").iterdir())) == 5


def test_the_cause_is_what_failed_first(tmp_path):
    """A rank that fails because another has failed, and has cleared up, tells of that one's error, not of its own."""
    for rank, told in enumerate(ranks.world(2).run(commit_cases.one_failure_after_the_other, str(tmp_path / "ck"))):
        kind, message = told["error"]
        assert kind == "SaveFailedError"
        assert "the cable is out" in message
        assert "removed my file" not in message
        assert rank == 0 or "rank 0: the cable is out" in message
        assert (told["sum"], told["after"]) == (OLD, AFTER)


@pytest.mark.parametrize("interrupted", (0, 1))
def test_an_interrupt_between_agreement_and_job_is_told(tmp_path, interrupted):
    """Ctrl-C in the one moment in which a rank is counted on and has no job yet does not leave the others waiting."""
    case = commit_cases.interrupted_before_its_job
    for rank, (told, seconds, kept, files) in enumerate(ranks.world(2).run(case, str(tmp_path / "ck"), interrupted)):
        if rank == interrupted:
            assert told.startswith("KeyboardInterrupt")
        else:
            assert told.startswith("SaveFailedError")
            assert "interrupted by KeyboardInterrupt" in told
        assert seconds < 30
        assert kept == 3
        assert files == 5


def test_a_users_bug_on_one_rank_ends_the_load_on_all(tmp_path):
    """An error that is none of ours on one rank is every rank's at once, says what was changed, and leaves no hang."""
    for rank, (kind, message, seconds) in enumerate(
        ranks.world(2).run(commit_cases.bug_while_loading, str(tmp_path / "ck"))
    ):
        assert kind == "LoadFailedError"
        assert "ZeroDivisionError: a bug of the user's" in message
        assert "partly restored" in message
        assert rank == 1 or "rank 1" in message
        assert seconds < 15


def test_an_alias_of_a_removed_checkpoint_is_written_anew(tmp_path):
    """Removal is one rank's call: the others learn at the next save that there is nothing left to share."""
    for aliases in ranks.world(2).run(commit_cases.removed_behind_our_back, str(tmp_path)):
        assert aliases == [False, False, True]


@pytest.mark.parametrize("compression", (None, "zstd"))
def test_a_plan_that_is_kept_spares_parsing_what_ranks_wrote(tmp_path, compression):
    """From a plan's second save on, rank 0 parses only what says more than where tensors lie; each save is its own."""
    for rank, told in enumerate(ranks.world(2).run(commit_cases.plan_again, str(tmp_path), compression)):
        # Compressed, each save's bytes lie elsewhere.
        expected = [2, 2, 2] if compression else [2, 1, 1]
        assert told["counts"] == (expected if rank == 0 else [0, 0, 0])
        assert told["found"] == [(0, True), (1, True), (2, True)]


def test_a_layout_that_changes_under_a_plan_is_seen(tmp_path):
    """A rank's own tensors move bytes though the plan stays: no save takes the places of another's."""
    for rank, told in enumerate(ranks.world(2).run(commit_cases.own_layouts_again, str(tmp_path))):
        assert told["counts"] == ([2] * 5 if rank == 0 else [0] * 5)
        sizes = [2, 2, 5, 5, 2] if rank else [2] * 5
        assert told["found"] == [(100 * n, [10 * n + rank] * size) for n, size in enumerate(sizes)]
