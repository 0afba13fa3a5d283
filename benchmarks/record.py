"""What was measured, its medians, and how these stand to the targets."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

HIGHER_IS_BETTER = ("steps/s", "x")
ENOUGH = 5
"""Counted repeats that each side of a verdict needs."""
MET, MISSED, TOO_FEW, REPORTED = "met", "MISSED", "too few repeats", "reported"


@dataclass(frozen=True)
class Measurement:
    """One figure of one repeat: of the slowest or largest rank for ``value`` and memory, of all for the rest."""

    what: str
    setting: str
    """Layout, size and ranks: what is compared with each other has the same."""
    contender: str
    repeat: int
    """0 is the warm-up."""
    value: float
    unit: str = "s"
    nbytes: int = 0
    cpu_seconds: float = 0.0
    peak_memory: int = 0
    """Bytes that a rank held beyond what it held before."""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """The repeats of one thing by one contender."""

    what: str
    setting: str
    contender: str
    unit: str
    median: float
    lowest: float
    highest: float
    counted: int
    nbytes: int
    cpu_seconds: float
    peak_memory: int


@dataclass(frozen=True)
class Target:
    """A bound on one median, or on the quotient of two; without a bound, a quotient to report.

    A side is ``(what, contender)``. A contender that runs in several modes, ``"DCP, 1 thread"`` and so on, is named by
    what they have in common, and stands for the best of them.
    """

    text: str
    top: tuple[str, str]
    bottom: tuple[str, str] | None = None
    at_least: float | None = None
    at_most: float | None = None
    per_byte: bool = False
    """Divide by the bytes of the row."""

    def judge(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What was reached, once for each setting that has both sides."""
        verdicts = []
        for setting in dict.fromkeys(row.setting for row in rows):
            here = [row for row in rows if row.setting == setting]
            top = _best(here, *self.top)
            bottom = _best(here, *self.bottom) if self.bottom else None
            if top is None or (self.bottom and bottom is None):
                continue
            counted = min(row.counted for row in (top, bottom) if row is not None)
            reached = top.median / (bottom.median if bottom else top.nbytes if self.per_byte else 1.0)
            verdicts.append(
                {
                    "target": self.text,
                    "setting": setting,
                    "of": [top.what, top.contender],
                    "over": [bottom.what, bottom.contender] if bottom else None,
                    "at_least": self.at_least,
                    "at_most": self.at_most,
                    "reached": reached,
                    "unit": "" if bottom or self.per_byte else top.unit,
                    "counted": counted,
                    "verdict": self._verdict(reached) if counted >= ENOUGH else TOO_FEW,
                }
            )
        return verdicts

    def _verdict(self, reached: float) -> str:
        if self.at_least is None and self.at_most is None:
            return REPORTED
        low = self.at_least is not None and reached < self.at_least
        high = self.at_most is not None and reached > self.at_most
        return MISSED if low or high else MET


def rows_of(measurements: Iterable[Measurement]) -> list[Row]:
    """Medians of the counted repeats, in the order in which they were first measured."""
    groups: dict[tuple[str, str, str, str], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault((one.setting, one.what, one.contender, one.unit), []).append(one)
    rows = []
    for (setting, what, contender, unit), found in groups.items():
        counted = [one for one in found if one.repeat > 0] or found
        values = [one.value for one in counted]
        rows.append(
            Row(
                what=what,
                setting=setting,
                contender=contender,
                unit=unit,
                median=median(values),
                lowest=min(values),
                highest=max(values),
                counted=len(counted),
                nbytes=counted[-1].nbytes,
                cpu_seconds=median(one.cpu_seconds for one in counted),
                peak_memory=max(one.peak_memory for one in counted),
            )
        )
    places = {key: place for place, key in enumerate(dict.fromkeys((row.setting, row.what) for row in rows))}
    return sorted(rows, key=lambda row: places[row.setting, row.what])


def judged(rows: Sequence[Row], targets: Iterable[Target]) -> list[dict[str, Any]]:
    return [verdict for target in targets for verdict in target.judge(rows)]


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def table(rows: Sequence[Row], verdicts: Sequence[dict[str, Any]]) -> str:
    """The rows and the targets, for a terminal."""
    lines = []
    setting = ""
    width = max((len(row.what) + len(row.contender) + 6 for row in rows), default=0)
    for row in rows:
        if row.setting != setting:
            setting = row.setting
            head = ("median", "lowest", "highest", "GB/s", "CPU s", "memory")
            lines += ["", f"{setting:{width}}" + "".join(f"{name:>11}" for name in head)]
        speed = f"{row.nbytes / row.median / 1e9:.2f}" if row.unit == "s" and row.nbytes and row.median else ""
        figures = [f"{_figure(value, row.unit)}" for value in (row.median, row.lowest, row.highest)]
        cpu = f"{row.cpu_seconds:.2f}" if row.cpu_seconds else ""
        memory = f"{row.peak_memory / 2**20:.0f} MiB" if row.peak_memory else ""
        named = f"  {row.what}: {row.contender}"
        lines.append(f"{named:{width}}" + "".join(f"{text:>11}" for text in (*figures, speed, cpu, memory)))
    lines.append("")
    for verdict in verdicts:
        reached = _figure(verdict["reached"], verdict["unit"])
        lines.append(f"{verdict['verdict']:{len(TOO_FEW)}} {reached:>11}  {verdict['target']}  [{verdict['setting']}]")
    return "\n".join(lines)


def _figure(value: float, unit: str) -> str:
    match unit:
        case "s":
            return f"{value:.4f} s"
        case "B":
            return f"{value / 2**20:.1f} MiB"
        case "" | "x":
            return f"{value:.3g}"
    return f"{value:.1f}"


def _best(rows: Iterable[Row], what: str, contender: str) -> Row | None:
    named = [row for row in rows if row.what == what]
    exact = [row for row in named if row.contender == contender]
    found = exact or [row for row in named if row.contender.startswith(f"{contender},")]
    best = max if found and found[0].unit in HIGHER_IS_BETTER else min
    return best(found, key=lambda row: row.median, default=None)
