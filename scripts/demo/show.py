"""What the demonstration shows at its end: the loss as a picture and as text, and the files with their sizes."""

from collections.abc import Sequence
from itertools import pairwise
from math import log10
from pathlib import Path
from statistics import fmean
from typing import NamedTuple


class Curve(NamedTuple):
    """The losses of one run between two restarts."""

    label: str
    steps: list[int]
    losses: list[float]

    def smoothed(self, window: int = 15) -> list[float]:
        """The mean of each loss and those before it, ``window`` at most: one batch alone says little."""
        return [fmean(self.losses[max(0, end - window) : end]) for end in range(1, len(self.losses) + 1)]


_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a Braille character, by row and column: four by two dots."""


def text_plot(curves: Sequence[Curve], columns: int = 72, rows: int = 12) -> str:
    """The curves on a logarithmic scale in Braille dots; a vertical line stands where a run took over."""
    last = max(max(curve.steps) for curve in curves)
    logs = [[log10(max(loss, 1e-6)) for loss in curve.smoothed()] for curve in curves]
    top, bottom = max(map(max, logs)), min(map(min, logs))
    grid = [[0] * columns for _ in range(rows)]

    def dot(step: float, value: float) -> None:
        x = round(step / last * (2 * columns - 1))
        y = round((top - value) / ((top - bottom) or 1) * (4 * rows - 1))
        grid[y // 4][x // 2] |= _DOTS[y % 4][x % 2]

    for curve, values in zip(curves, logs, strict=True):
        points = list(zip(curve.steps, values, strict=True))
        for (step, value), (next_step, next_value) in pairwise(points):
            for part in range(8):
                dot(step + (next_step - step) * part / 8, value + (next_value - value) * part / 8)
        dot(*points[-1])

    lines = [[chr(0x2800 | bits) if bits else " " for bits in row] for row in grid]
    axis = ["─"] * columns
    names = [" "] * (columns + 40)
    for curve in curves:
        x = min(round(curve.steps[0] / last * (2 * columns - 1)) // 2, columns - 1)
        for line in lines:
            line[x] = "│" if line[x] == " " else line[x]
        axis[x] = "┴"
        names[x : x + len(curve.label)] = curve.label
    text = []
    for index, line in enumerate(lines):
        value = 10 ** (top - (top - bottom) * (index + 0.5) / rows)
        text.append(f"{value:9.4f} ┤{''.join(line)}".rstrip())
    return "\n".join([*text, " " * 10 + "└" + "".join(axis), " " * 11 + "".join(names).rstrip()])


def picture(curves: Sequence[Curve], saves: Sequence[int], path: Path) -> None:
    """The same as a PNG, with a tick under each checkpoint."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for index, curve in enumerate(curves):
        axes.plot(curve.steps, curve.losses, color=f"C{index}", alpha=0.25, linewidth=0.8)
        axes.plot(curve.steps, curve.smoothed(), color=f"C{index}", label=curve.label, linewidth=1.8)
        axes.axvline(curve.steps[0], color=f"C{index}", linestyle=":", linewidth=1)
    axes.plot(saves, [0.02] * len(saves), "k^", transform=axes.get_xaxis_transform(), label="checkpoint", markersize=5)
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title="Digits under DDP, killed and resumed")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def tree(root: str, sizes: dict[str, int]) -> str:
    """Files by their path below ``root``, grouped by checkpoint, with sizes in bytes."""
    lines = [root]
    folders = sorted({name.rpartition("/")[0] for name in sizes})
    for folder in folders:
        files = {name: size for name, size in sizes.items() if name.rpartition("/")[0] == folder}
        lines.append(f"  {folder + '/':<52}{sum(files.values()):>12,}")
        lines += [f"    {name.rpartition('/')[2]:<50}{size:>12,}" for name, size in sorted(files.items())]
    return "\n".join(lines)


def shards(sizes: dict[str, int]) -> str:
    """One line a checkpoint: how many shards it has, and its size in bytes. ``sizes`` as for `tree`."""
    lines = []
    for folder in sorted({name.rpartition("/")[0] for name in sizes}):
        files = {name: size for name, size in sizes.items() if name.rpartition("/")[0] == folder}
        count = sum(name.endswith(".safetensors") for name in files)
        state = "complete" if f"{folder}/manifest.json" in files else "no manifest: not a checkpoint"
        lines.append(
            f"  {folder:<20}{count:>3} shard{'s' if count != 1 else ' '} {sum(files.values()):>14,} bytes, {state}"
        )
    return "\n".join(lines)
