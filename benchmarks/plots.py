"""A record as a picture: the median of each contender as a bar, with its lowest and highest repeat."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import Row

COLOURS = {"shardckpt": "#1b6ca8", "Sharded": "#1b6ca8", "raw": "#9a9a9a", "memcpy": "#9a9a9a", "no ch": "#9a9a9a"}
OTHERS = "#e0a458"


def plot(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Draw to ``path``; False where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row.setting, row.what, row.unit) for row in rows))
    members = [[row for row in rows if (row.setting, row.what, row.unit) == panel] for panel in panels]
    heights = [0.6 + 0.3 * len(found) for found in members]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, sum(heights) + 0.6), height_ratios=heights, squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    for (setting, what, unit), found, axis in zip(panels, members, axes[:, 0], strict=True):
        scale = 2**20 if unit == "B" else 1
        medians = [row.median / scale for row in found]
        spread = [
            [(row.median - row.lowest) / scale for row in found],
            [(row.highest - row.median) / scale for row in found],
        ]
        colours = [_colour(row.contender) for row in found]
        axis.barh([row.contender for row in found], medians, xerr=spread, color=colours, ecolor="#555555", height=0.7)
        axis.invert_yaxis()
        axis.set_title(f"{what}: {setting}", fontsize=9, loc="left")
        axis.set_xlabel("MiB" if unit == "B" else unit, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _colour(contender: str) -> str:
    return next((colour for start, colour in COLOURS.items() if contender.startswith(start)), OTHERS)
