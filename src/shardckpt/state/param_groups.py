"""Which saved param groups a live one takes its options from. Pure: names and JSON."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from shardckpt.state import names, values

Json = Any


def holders_of(
    live_names: list[list[str]], saved: list[dict[str, Json]], sources: Mapping[str, str]
) -> list[list[int]]:
    """For each live param group the saved groups that held its parameters; the one that held most of them first."""
    indices: defaultdict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(saved):
        for name in group["params"]:
            indices[name].append(index)
    found = []
    for place, group_names in enumerate(live_names):
        counts = Counter(index for name in group_names if name in sources for index in indices[sources[name]])
        found.append(sorted(counts, key=lambda index: (-counts[index], index != place, index)))
    return found


def conflicts(
    holders: list[list[int]],
    live_names: list[list[str]],
    saved: list[dict[str, Json]],
    sources: Mapping[str, str],
    path: str,
) -> list[str]:
    """A line for each live param group that unites saved ones of different options, of which it can have but one's."""
    lines = []
    for place, (indices, group_names) in enumerate(zip(holders, live_names, strict=True)):
        if len(indices) < 2:
            continue
        taken, *others = (_options(saved[index]) for index in indices)
        apart = {sources[name] for name in group_names if name in sources} - set(saved[indices[0]]["params"])
        differ = {
            key
            for index, other in zip(indices[1:], others, strict=True)
            for key in taken.keys() | other.keys()
            if apart & set(saved[index]["params"]) and taken.get(key) != other.get(key)
        }
        if differ:
            lines.append(
                f"{names.child_path(path, place)}: one group here, groups {', '.join(map(str, sorted(indices)))} in the"
                f" checkpoint, which differ in {', '.join(sorted(differ))}; all would take those of group {indices[0]}"
            )
    return lines


def _options(group: Mapping[str, Json]) -> dict[str, Json]:
    pairs = values.pairs_of(group["options"]) or []
    return {str(key): value for key, value in pairs if key != "param_names"}
