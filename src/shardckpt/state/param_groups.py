"""Which saved param groups a live one takes its options from, and whether it can. Pure: names and JSON."""

import functools
import inspect
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

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


def unlike(optimizer: torch.optim.Optimizer, saved_groups: Sequence[Mapping[str, Json] | None], path: str) -> list[str]:
    """A line for each live param group whose options in the checkpoint are those of another kind of optimizer.

    That is so where they lack one of this optimizer's and have one that it lacks, of those that torch's know.
    An option that a later release has added, or a scheduler, is no sign of another kind.
    """
    lines = []
    for place, (live, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        options = _options(saved).keys() if saved is not None else set[str]()
        lacking = (live.keys() - options) & _known_options()
        foreign = (options - live.keys()) & _known_options()
        if options and lacking and foreign:
            lines.append(
                f"{names.child_path(path, place)}: {', '.join(sorted(foreign))} in the checkpoint, but"
                f" no {', '.join(sorted(lacking))}: not those of {type(optimizer).__name__}, which is here"
            )
    return lines


@functools.cache
def _known_options() -> frozenset[str]:
    """What the constructors of torch's optimizers take, less what they call their parameters."""
    kinds = [kind for kind in vars(torch.optim).values() if inspect.isclass(kind)]
    return frozenset(
        name for kind in kinds if issubclass(kind, torch.optim.Optimizer) for name in inspect.signature(kind).parameters
    ) - {"params"}


def _options(group: Mapping[str, Json]) -> dict[str, Json]:
    pairs = values.pairs_of(group["options"]) or []
    return {str(key): value for key, value in pairs if key != "param_names"}
