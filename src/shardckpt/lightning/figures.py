"""The figures of saves and loads, on their way to the Trainer's loggers."""

from collections import deque
from collections.abc import Callable
from typing import Any

from shardckpt.reports import LoadReport, SaveReport

Report = SaveReport | LoadReport


class Figures:
    """Hears reports in any thread, and hands them to loggers in the Trainer's own: most of those want no other."""

    def __init__(self, also: Callable[[Report], None] | None) -> None:
        """``also`` hears each report, too: it is what the user gave."""
        self._also = also
        self._waiting: deque[dict[str, float]] = deque()

    def hear(self, report: Report) -> None:
        self._waiting.append(figures_of(report))
        if self._also is not None:
            self._also(report)

    def log(self, trainer: Any) -> None:
        """Hand over what has been heard since the last time."""
        while self._waiting:
            figures = self._waiting.popleft()
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)


def figures_of(report: Report) -> dict[str, float]:
    """Numbers by what loggers are to call them; sizes are bytes, times seconds."""
    if isinstance(report, LoadReport):
        return {
            "checkpoint/load/seconds": report.seconds,
            "checkpoint/load/bytes_read": report.bytes_read,
            "checkpoint/load/retries": report.retries,
        }
    if report.error is not None:
        return {"checkpoint/save/failed": 1}
    return {
        "checkpoint/save/failed": 0,
        "checkpoint/save/bytes": report.nbytes,
        "checkpoint/save/stall_seconds": report.stall_seconds,
        "checkpoint/save/staged_seconds": report.staged_seconds,
        "checkpoint/save/written_seconds": report.written_seconds,
        "checkpoint/save/slowest_seconds": report.slowest_seconds,
        "checkpoint/save/total_seconds": report.total_seconds,
        "checkpoint/save/retries": report.retries,
    }
