"""Whether ranks gain by reading for each other: what can be known beforehand, and what a trial says. Pure."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from shardckpt.codecs import DIGEST_BLOCK
from shardckpt.reader.wants import Demand, Stored, cells_wanted, nbytes_of

_GAIN: Final = 1.5
"""How many times the stored bytes are read where each rank reads alone, from which on sharing may be worth it."""
_GAIN_BYTES: Final = 32 << 20
"""Bytes that each rank must be spared, on average, to be worth the agreement and the trial."""
_GAIN_BYTES_PER_PART: Final = 16 << 10
"""The same for each part of an entry and each view that wants some of it: the plan, which is made in Python, takes some
ten microseconds for each, and small tensors take more in the exchange."""
_CELLS: Final = 8
"""Of a part, as far as the work is judged before there are parts."""
_MARGIN: Final = 1.15
"""How much faster the exchange must be. It needs all ranks in step, and a trial is short."""


class Trial(NamedTuple):
    """How long something took on the slowest rank."""

    nbytes: int
    """Of stored data that was brought to all who want it; data that several ranks read counts once."""
    seconds: float


def bytes_by_file(demand: Demand, stored: Callable[[str], Sequence[Stored]]) -> dict[int, int]:
    """Raw bytes of the cells that one rank wants, by file: what it reads if it reads alone."""
    found: defaultdict[int, int] = defaultdict(int)
    for (name, shard), overlaps in demand.items():
        entry = stored(name)[shard]
        found[entry.file] += sum(nbytes_of(entry, *run) for run in cells_wanted(entry, overlaps))
    return found


def most_spared(by_rank: Sequence[Mapping[int, int]]) -> int:
    """Bytes that sharing could spare all ranks together at most, judged by how much of each file each wants."""
    total: defaultdict[int, int] = defaultdict(int)
    most: defaultdict[int, int] = defaultdict(int)
    for files in by_rank:
        for file, nbytes in files.items():
            total[file] += nbytes
            most[file] = max(most[file], nbytes)
    return sum(total.values()) - sum(most.values())


def parts_in(demand: Demand, stored: Callable[[str], Sequence[Stored]]) -> int:
    """About how many parts the plan has for what one rank wants."""
    return sum(stored(name)[shard].nbytes // DIGEST_BLOCK // _CELLS + 1 for name, shard in demand)


def worthwhile(alone: int, spared: int, world_size: int, work: int) -> bool:
    """Whether sharing may be faster: `alone` bytes are read by all ranks alone, and `spared` fewer if they share.

    `work` is the sum of `parts_in` over those that want different things.
    """
    least = max(_GAIN_BYTES, work * _GAIN_BYTES_PER_PART)
    return alone >= _GAIN * (alone - spared) and spared >= least * world_size


def exchange_is_faster(alone: Trial, exchange: Trial) -> bool:
    """What the trial says of the rest: whether bytes came to where they are wanted clearly faster by exchange."""
    return alone.seconds * exchange.nbytes > _MARGIN * exchange.seconds * alone.nbytes
