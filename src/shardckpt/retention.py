"""Which checkpoints of a run to keep. Pure: what lies where is for others to know."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Literal

import msgspec

from shardckpt.errors import UsageError

Mode = Literal["min", "max"]


class Kept(msgspec.Struct, frozen=True):
    """A complete checkpoint of a run."""

    save_id: str
    """Sorts by the time at which its save was begun."""
    step: int
    path: str
    metrics: Mapping[str, float]


class Retention(msgspec.Struct, frozen=True):
    """What is kept: whatever any of these asks for, and always the newest."""

    last: int | None
    """How many of the newest; None for all."""
    every: int | None
    """Those at multiples of so many steps, for good."""
    metric: str | None
    """By which the best are judged."""
    mode: Mode
    best: int
    """How many of the best."""

    @classmethod
    def of(cls, last: int | None, every: int | None, metric: str | None, mode: Mode, best: int) -> "Retention":
        """From what a caller passes. Raises UsageError that names the option."""
        for name, value in (("keep_last", last), ("keep_every", every), ("keep_best", best)):
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} is a number of 1 or more, not {value!r}")
        if mode not in ("min", "max"):
            raise UsageError(f"mode is 'min' or 'max', not {mode!r}")
        return cls(last, every, metric, mode, best)

    def ranked(self, found: Sequence[Kept]) -> list[Kept]:
        """Those that have the metric, the best first; of equals the newest."""
        sign = 1.0 if self.mode == "min" else -1.0
        metric = self.metric
        if metric is None:
            return []
        judged = [one for one in found if not isnan(one.metrics.get(metric, float("nan")))]
        judged.sort(key=lambda one: one.save_id, reverse=True)
        return sorted(judged, key=lambda one: sign * one.metrics[metric])

    def superfluous(self, found: Sequence[Kept]) -> list[Kept]:
        """Those that nothing asks for, oldest first.

        The newest are those saved last, whatever their steps: a run that was taken back to an earlier step goes on from
        there, and what it saves is not old.
        """
        if self.last is None:
            return []
        by_age = sorted(found, key=lambda one: one.save_id)
        wanted = {one.save_id for one in (*by_age[-self.last :], *self.ranked(found)[: self.best])}
        return [one for one in by_age if one.save_id not in wanted and not (self.every and one.step % self.every == 0)]
