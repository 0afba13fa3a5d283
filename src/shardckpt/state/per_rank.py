"""Values that differ by rank: how a state marks them, and what restoring one means on each number of ranks.

Each rank saves its own value. On as many ranks as saved, each rank gets its own back, in place. On another number there
is no such thing as a rank's own value, so the state is asked (`PerRank.resize`), or the values are offered to the
caller: nobody is given another rank's value without having asked for it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shardckpt.errors import LoadFailedError, UsageError
from shardckpt.state import names
from shardckpt.state.skeleton import MAX_DEPTH

Json = Any

Resize = Callable[[list[Any], int, int], Any]
"""``resize(values, rank, world_size)``: all saved values by rank, and this rank's place in the job that loads."""

WRAP_IT = "wrap it in shardckpt.PerRank"
DO_NOT_WRAP_IT = "take the shardckpt.PerRank around it off"


@dataclass(eq=False, slots=True)
class PerRank:
    """Marks a value of a state that differs by rank: a random generator's state, a position in the data.

    It may stand anywhere in a state but within another one, and hold whatever a state may hold, though no tensor that
    is spread over ranks and no optimizer around it. Ranks may hold different things, and some ranks none at all.

    Loading on as many ranks as saved puts each rank's own value into ``value``, in place as anywhere in a state. On
    another number of ranks ``value`` becomes what ``resize(values, rank, world_size)`` returns, where ``values`` is a
    list of all saved values by rank, made anew, with None for a rank that had none. Nothing has been changed when it is
    called; if it raises on any rank, the load fails on every rank. Without ``resize``, ``value`` stays as it is, and
    ``LoadReport.per_rank`` has the list.
    """

    value: Any
    resize: Resize | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.resize is not None and not callable(self.resize):
            raise UsageError(f"PerRank: resize is a function of (values, rank, world_size), not {self.resize!r}")


class Here(NamedTuple):
    """The place of this rank in the job that loads."""

    rank: int
    world_size: int


@dataclass(slots=True)
class Offer:
    """A place whose values were saved by another number of ranks than load them."""

    place: str
    live: PerRank | None
    """None where the live state has nothing there."""
    value: Any = None
    """What ``resize`` made of the values."""

    def put(self) -> PerRank | None:
        if self.live is not None and self.live.resize is not None:
            self.live.value = self.value
        return self.live


def rank_path(place: str, rank: int) -> str:
    """Under what name the value of one rank is stored."""
    return names.child_path(place, f"rank-{rank}")


def holders(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, PerRank]]:
    """Every `PerRank` in what a stateful object's ``state_dict()`` returned, with its path."""
    if depth > MAX_DEPTH:  # saving it would say what is wrong
        return
    if isinstance(value, PerRank):
        yield path, value
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from holders(item, names.child_path(path, key), depth + 1)
    elif names.is_stateful(value) and not names.is_module(value) and not names.is_optimizer(value):
        yield from holders(value.state_dict(), path, depth + 1)


def resize(offers: list[Offer], values: Mapping[str, list[Any]], here: Here, where: str) -> dict[str, list[Any]]:
    """Have the state say what becomes of all ranks' ``values``; returns those, by place, that it says nothing about.

    Raises LoadFailedError where the state's own code raises. Nothing is put into the state yet.
    """
    unsaid = {}
    for offer in offers:
        saved = values[offer.place]
        if offer.live is None or offer.live.resize is None:
            unsaid[offer.place] = saved
            continue
        try:
            offer.value = offer.live.resize(saved, here.rank, here.world_size)
        except Exception as error:
            raise LoadFailedError(
                f"{where}: resize(values of {len(saved)} ranks, {here.rank}, {here.world_size}) of the PerRank at"
                f" {offer.place!r} raised {type(error).__name__} on rank {here.rank}: {error}. Nothing was changed."
            ) from error
    return unsaid
