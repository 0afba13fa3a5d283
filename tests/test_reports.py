"""What saves and loads tell of themselves: reports, who hears them, retries, and the bar of a long load."""

import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt import Checkpointer, LoadReport, SaveReport, UsageError, checkpointer, progress
from storage.proxy import Proxy, bursts
from storage.wrappers import FaultyStorage

BROKEN = shardckpt.StorageError("the cable is out")


def test_a_report_says_when_what_was_done(tmp_path: Path) -> None:
    """Whoever looks for what a checkpoint costs finds the stall, the copy, the write and the commit apart."""
    engine = Checkpointer()
    report = engine.async_save({"w": torch.randn(1 << 20)}, tmp_path / "ck").result()
    assert 0 < report.staged_seconds <= report.written_seconds <= report.total_seconds
    assert (report.slowest_rank, report.slowest_seconds) == (0, report.written_seconds)
    assert report.retries == 0
    assert report.nbytes == report.rank_nbytes > 4 << 20
    assert "staged after" in repr(report)
    synchronous = engine.save({"w": torch.randn(8)}, tmp_path / "ck")
    assert synchronous.stall_seconds >= synchronous.total_seconds


def test_every_save_and_load_is_heard_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics miss nothing: not a save in the background, not one that failed, and count none twice."""
    heard: list[SaveReport | LoadReport] = []
    engine = Checkpointer(on_report=heard.append, on_save_error="warn")
    state = {"w": torch.ones(100)}
    engine.save(state, tmp_path / "a")
    engine.async_save(state, tmp_path / "b").result()
    engine.load(tmp_path / "a", state)
    original = checkpointer.open_storage
    monkeypatch.setattr(checkpointer, "open_storage", lambda *a: FaultyStorage(original(*a), "writer.commit", BROKEN))
    engine.async_save(state, tmp_path / "c")
    engine.wait()
    assert [type(report).__name__ for report in heard] == ["SaveReport", "SaveReport", "LoadReport", "SaveReport"]
    assert [Path(report.path).name for report in heard] == ["a", "b", "a", "c"]
    assert [getattr(report, "error", None) is None for report in heard] == [True, True, True, False]
    assert heard[1].stall_seconds > 0  # type: ignore[union-attr]


def test_a_save_that_raises_is_heard_of_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function hears of the failure, and the caller gets the error as ever."""
    heard: list[Any] = []
    engine = Checkpointer(on_report=heard.append)
    original = checkpointer.open_storage
    monkeypatch.setattr(checkpointer, "open_storage", lambda *a: FaultyStorage(original(*a), "writer.commit", BROKEN))
    with pytest.raises(shardckpt.SaveFailedError):
        engine.save({"w": torch.ones(100)}, tmp_path / "ck")
    (report,) = heard
    assert report.error is not None


def test_what_hears_reports_cannot_harm_a_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A metrics server that is down is logged, and nothing else: the checkpoint is there."""

    def fail(_: Any) -> None:
        raise RuntimeError("no route to the metrics server")

    engine = Checkpointer(on_report=fail)
    engine.async_save({"w": torch.ones(3)}, tmp_path / "ck").result()
    engine.wait()
    assert engine.load(tmp_path / "ck", {"w": torch.zeros(3)}).restored == ["w"]
    assert [record.exc_info is not None for record in caplog.records if "on_report" in record.message] == [True, True]
    with pytest.raises(UsageError, match="on_report"):
        Checkpointer(on_report="print")  # type: ignore[arg-type]


@pytest.mark.s3
def test_retries_are_counted_and_logged(s3_place: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A store that is slow because it refuses every tenth request can be told from one that is slow."""
    endpoint = s3_place.storage_options["client_kwargs"]["endpoint_url"]
    caplog.set_level(logging.INFO, logger="shardckpt")
    with Proxy(endpoint, bursts(4, 1)) as proxy:
        options = s3_place.storage_options | {"client_kwargs": {"endpoint_url": proxy.endpoint}}
        report = shardckpt.save({"w": torch.ones(3)}, f"{s3_place.url}/ck", storage_options=options)
    assert report.retries > 0
    assert "is made again" in caplog.text
    assert f"{report.retries} retries" in repr(report)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_long_load_shows_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a load sees that it goes on; what is short, or goes to a file, shows nothing."""
    pytest.importorskip("rich")
    state = {"w": torch.randn(1 << 20)}
    shardckpt.save(state, tmp_path / "ck")
    shown = []
    for after, stream in ((0.0, Terminal()), (60.0, Terminal()), (0.0, io.StringIO())):
        monkeypatch.setattr(progress, "AFTER_SECONDS", after)
        monkeypatch.setattr(sys, "stderr", stream)
        shardckpt.load(tmp_path / "ck", state)
        shown.append("loading" in stream.getvalue())
    assert shown == [True, False, False]
