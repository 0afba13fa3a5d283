"""``on_save_error="warn"``: a save that fails costs that checkpoint, and neither the job nor an older checkpoint."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
import shardckpt
from multirank import save_error_cases as cases
from shardckpt import Checkpointer, CheckpointManager, SaveFailedError, UnserialisableError, UsageError

WAYS = [*cases.BACKGROUND, *cases.FOREGROUND]
"""Each a call of the storage that fails, once, and the names it fails for."""


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((1000,), value), "step": value}


def value_at(path: Path) -> float:
    return float(shardckpt.load(path)["w"][0])


def failures_in(caplog: Any) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_the_job_goes_on_and_each_failure_is_counted_and_logged_once(tmp_path: Path, way: Any, caplog: Any) -> None:
    """Wherever a storage fails, the call returns, the count is one more, the log has one line, the next save works."""
    engine = Checkpointer(on_save_error="warn")
    engine.save(state(1), tmp_path / "a")
    with cases.failing(*way):
        lost = engine.async_save(state(2), tmp_path / "a")
        engine.wait()
    assert engine.failed_saves == 1
    assert lost.done()
    assert lost.staged
    assert len(failures_in(caplog)) == 1
    assert "the cable is out" in failures_in(caplog)[0]
    assert value_at(tmp_path / "a") == 1
    with pytest.raises(SaveFailedError, match="the cable is out"):
        lost.result()
    engine.async_save(state(3), tmp_path / "a")
    engine.close()
    assert value_at(tmp_path / "a") == 3
    assert engine.failed_saves == 1
    assert len(failures_in(caplog)) == 1


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_synchronous_save_reports_what_it_failed_of(tmp_path: Path, way: Any) -> None:
    """A report of a save that failed cannot be taken for that of one that did not, and says why."""
    engine = Checkpointer(on_save_error="warn")
    with cases.failing(*way):
        report = engine.save(state(1), tmp_path / "a")
    assert "the cable is out" in str(report.error)
    assert "failed" in repr(report)
    assert report.nbytes == 0
    assert not shardckpt.is_checkpoint(tmp_path / "a")
    assert engine.save(state(1), tmp_path / "a").error is None
    assert engine.failed_saves == 1


@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("waited", [False, True])
@pytest.mark.parametrize("save", [Checkpointer.save, Checkpointer.async_save])
def test_what_a_lost_save_was_to_replace_is_kept(
    tmp_path: Path, way: Any, waited: bool, save: Callable[..., Any]
) -> None:
    """A removal asked for after a save that failed, however long after, does not take the last good checkpoint."""
    engine = Checkpointer(on_save_error="warn")
    engine.save(state(1), tmp_path / "a")
    with cases.failing(*way):
        save(engine, state(2), tmp_path / "b")
        if waited:
            engine.wait()
        engine.remove(tmp_path / "a")
        engine.wait()
    assert value_at(tmp_path / "a") == 1
    engine.async_save(state(3), tmp_path / "c")
    engine.remove(tmp_path / "a")
    engine.close()
    assert not (tmp_path / "a").exists()
    assert value_at(tmp_path / "c") == 3


def test_whoever_asks_for_the_result_may_remove(tmp_path: Path) -> None:
    """Only removals of those who cannot know are held back: a caller that was told decides for itself."""
    engine = Checkpointer(on_save_error="warn")
    engine.save(state(1), tmp_path / "a")
    with cases.failing(*cases.BACKGROUND[0]):
        pending = engine.async_save(state(2), tmp_path / "b")
        with pytest.raises(SaveFailedError):
            pending.result()
    engine.remove(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_alias_of_a_lost_save_is_written_anew_or_lost_with_it(tmp_path: Path) -> None:
    """A save that was to share the shards of one that failed cannot refer to shards that are not there."""
    engine = Checkpointer(on_save_error="warn")
    with cases.failing(*cases.BACKGROUND[0]):
        engine.async_save(state(1), tmp_path / "a", state_version=1)
        engine.async_save(state(1), tmp_path / "b", state_version=1)
        engine.wait()
    assert 1 <= engine.failed_saves <= 2
    report = engine.save(state(1), tmp_path / "c", state_version=1)
    assert report.error is None
    assert not report.alias or engine.failed_saves == 1
    assert value_at(tmp_path / "c") == 1


def test_mistakes_are_errors_as_ever(tmp_path: Path) -> None:
    """What no later save could do better is no misfortune: a wrong call and a state that cannot be saved raise."""
    engine = Checkpointer(on_save_error="warn")
    with pytest.raises(UnserialisableError):
        engine.save({"f": (value for value in ())}, tmp_path / "a")
    with pytest.raises(UsageError, match="a path is text"):
        engine.save(tmp_path / "a", state(1))  # type: ignore[arg-type]
    assert engine.failed_saves == 0
    with pytest.raises(UsageError, match="on_save_error is 'raise' or 'warn', not 'ignore'"):
        Checkpointer(on_save_error="ignore")  # type: ignore[arg-type]


def test_by_default_a_failure_is_raised(tmp_path: Path) -> None:
    """Nobody loses checkpoints for days without having said that this is fine."""
    engine = Checkpointer()
    with cases.failing(*cases.BACKGROUND[0]), pytest.raises(SaveFailedError, match="the cable is out"):
        engine.save(state(1), tmp_path / "a")
    with cases.failing(*cases.FOREGROUND[0]), pytest.raises(shardckpt.StorageError, match="the cable is out"):
        engine.save(state(1), tmp_path / "a")


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_manager_keeps_what_it_has(tmp_path: Path, way: Any) -> None:
    """With ``keep_last=1`` a lost save removes nothing, and the next good one all that is superfluous."""
    with CheckpointManager(tmp_path, keep_last=1, checkpointer=Checkpointer(on_save_error="warn")) as manager:
        manager.save(1, state(1))
        assert manager.steps() == [1]
        with cases.failing(*way):
            manager.save(2, state(2))
            assert manager.steps() == [1]
        manager.save(3, state(3))
        assert manager.steps() == [3]


@pytest.mark.multiprocess
@pytest.mark.parametrize("failing", (0, 1))
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_all_ranks_count_the_same_failures_and_go_on(tmp_path: Path, way: Any, failing: int) -> None:
    """A failure on one rank is on every rank one more in the count and one line in the log; none is left waiting."""
    if failing == 1 and way not in cases.ON_ANY_RANK:
        pytest.skip("only rank 0 makes this call")
    for told in ranks.world(2).run(cases.goes_on, str(tmp_path), failing, way):
        assert told["counts"] == [0, 1, 1]
        assert told["logged"] == 1
        assert told["values"] == [1.0, 1.0, 3.0]


@pytest.mark.multiprocess
def test_ranks_that_fail_of_different_things_part_nowhere(tmp_path: Path) -> None:
    """One rank's disk fails while another's state cannot be saved: that is an error on both, or on neither."""
    first, second = ranks.world(2).run(cases.two_failures, str(tmp_path))
    assert first == second
    assert first[-1] == "saved"
    assert "saved" not in first[:-1]
