"""One load by all ranks: whether they read for each other, and what they tell each other to find that out."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Final

import msgspec
import zstandard

from shardckpt.box import Box
from shardckpt.codecs import ITEMSIZE, digest, digests_text
from shardckpt.coordinator import Operation, turn
from shardckpt.errors import RankTimeoutError
from shardckpt.manifest import Manifest
from shardckpt.options import ShareReads
from shardckpt.planner import Wanted
from shardckpt.reader.common import Crowd, is_common
from shardckpt.reader.exchange import LIMIT, TRIAL_ROUNDS, Exchange, Part
from shardckpt.reader.gains import Trial, bytes_by_file, exchange_is_faster, most_spared, parts_in, worthwhile
from shardckpt.reader.group import has_group, join_group
from shardckpt.reader.rounds import Rounds, runs_of
from shardckpt.reader.targets import Reading
from shardckpt.reader.wants import Stored, View, Wants, demand_of, wants_of
from shardckpt.storage import BLOCK

log = logging.getLogger(__name__)

_MOST_WIRE_BYTES: Final = 1 << 30
"""Of what one rank wants, as it may unpack: the others would not unpack more."""


class _Opening(msgspec.Struct, array_like=True):
    """What each rank says first."""

    share: bool | str
    cache: str
    """Through which it reads; empty for none."""
    sample: list[int]
    """Of what it wants, for those that have the same cache."""


class _Asking(msgspec.Struct, array_like=True):
    """What each rank says of what it wants, where ranks may share."""

    files: dict[int, int]
    """Bytes that this rank reads of each file if it reads alone."""
    parts: int
    """About how many parts that is to the plan."""
    digest: str
    """Of what it wants."""


_OPENING: Final = msgspec.msgpack.Decoder(_Opening)
_ASKING: Final = msgspec.msgpack.Decoder(_Asking)
_SECONDS: Final = msgspec.msgpack.Decoder(tuple[float, float])
_WANTS: Final = msgspec.msgpack.Decoder(Wants)


def opening(reading: Reading, share: ShareReads) -> bytes:
    """What this rank says before `read_together`: whether it would read for others, and a sample of what it wants.

    `share` is True for always, False for never, and "auto" for where that spares much and a trial shows that it is
    faster. All ranks do the same: if one says False nobody shares, and only if all say True there is no trial.
    """
    cache = reading.plan.storage.read_cache
    return msgspec.msgpack.encode(_Opening(share, cache, reading.plan.sample() if cache else []))


def read_together(reading: Reading, heard: Sequence[bytes], operation: Operation, *, patience: float) -> None:
    """Fill the targets of `reading`, on every rank of `operation`; errors are those of `Reading`.

    Where several ranks want the same stored bytes, one of them may read these for all. `heard` is every rank's
    `opening`, by rank. `patience` is in seconds: how long one rank may wait for another that reads. Call it in a `turn`
    of all ranks: the last steps are made without another agreement.
    """
    if operation.world_size == 1:
        reading.alone()
        return
    openings = [_OPENING.decode(word) for word in heard]
    crowd = _crowd(openings, operation.rank)
    forced = all(opening.share is True for opening in openings)
    plan = None
    if forced or _may_gain(openings):
        plan = _agree_on_plan(operation, reading, _stored_in(reading.manifest), forced=forced)
    rounds = None if plan is None else _join(plan, reading, operation, patience)
    with reading.placing():
        if rounds is None:
            reading.everything(crowd)
        else:
            _share(rounds, reading, operation, patience, crowd)


def _may_gain(openings: Sequence[_Opening]) -> bool:
    """Whether all ranks allow sharing, and don't have it anyway.

    What one rank reads the others have from a cache that they share, and measured, nothing passes it on faster.
    """
    caches = {opening.cache for opening in openings}
    return all(opening.share for opening in openings) and (len(caches) > 1 or caches == {""})


def _crowd(openings: Sequence[_Opening], rank: int) -> Crowd | None:
    """Those that will read what this rank reads from the same cache; None where they are few or want little of it."""
    own = openings[rank]
    near = [other for other, opening in enumerate(openings) if own.cache and opening.cache == own.cache]
    if not is_common(own.sample, [openings[other].sample for other in near if other != rank]):
        return None
    return Crowd(near.index(rank), len(near))


def _agree_on_plan(
    operation: Operation, reading: Reading, stored: Callable[[str], Sequence[Stored]], *, forced: bool
) -> Exchange | None:
    """The plan of an exchange; None where there will be none. The same on all ranks."""
    with turn(operation, "wants") as said:
        wants = wants_of(Wanted(name, t.box) for name, targets in reading.targets.items() for t in targets)
        demand = demand_of(wants, stored)
        body = zstandard.ZstdCompressor(level=1).compress(msgspec.msgpack.encode(wants))
        said.word = msgspec.msgpack.encode(
            _Asking(bytes_by_file(demand, stored), parts_in(demand, stored), digests_text([digest(body)]))
        )
    askings = [_ASKING.decode(word) for word in said.heard]
    alone = sum(sum(asking.files.values()) for asking in askings)
    spared = most_spared([asking.files for asking in askings])
    work = sum({asking.digest: asking.parts for asking in askings}.values())
    if not (spared if forced else worthwhile(alone, spared, operation.world_size, work)):
        return None
    digests = [asking.digest for asking in askings]
    # What many ranks want alike crosses the wire once.
    is_first = digests.index(digests[operation.rank]) == operation.rank
    bodies = operation.agree("wanted", body if is_first else b"")
    with turn(operation, "plan"):
        views: list[View] = []
        for mark in dict.fromkeys(digests):
            ranks = tuple(rank for rank, other in enumerate(digests) if other == mark)
            views.append((ranks, _unpacked(bodies[ranks[0]])))
        plan = Exchange(views, stored, trial=not forced, limit=LIMIT)
        spared = plan.alone - plan.union
        if not (plan.rounds if forced else plan.trial and worthwhile(plan.alone, spared, operation.world_size, work)):
            return None
    return plan


def _join(plan: Exchange, reading: Reading, operation: Operation, patience: float) -> Rounds | None:
    """What this rank needs for an exchange: memory and a group; None where some rank can't have a group."""
    with turn(operation, "rounds") as ready:
        # Whatever may fail on one rank does so here: from now on the others wait for it in collectives.
        reading.ready()
        rounds = Rounds(plan, reading, operation.rank, partial(_listen, operation))
        ready.word = b"has" if has_group() else b""
    if all(ready.heard):
        return rounds
    with turn(operation, "group") as joined:
        joined.word = b"yes" if join_group(patience) else b"no"
    return None if b"no" in joined.heard else rounds


def _share(rounds: Rounds, reading: Reading, operation: Operation, patience: float, crowd: Crowd | None) -> None:
    """Fill the targets as planned, if that is the faster way; `crowd` is for what is read alone."""
    rank, plan = operation.rank, rounds.plan
    left = plan.rounds
    if plan.trial:
        first, left = left[:TRIAL_ROUNDS], left[TRIAL_ROUNDS:]
        with turn(operation, "trial", patience) as tried, _naming(operation):
            tried.word = msgspec.msgpack.encode(_try(plan, first, reading, rounds, rank, crowd))
        seconds = [_SECONDS.decode(word) for word in tried.heard]
        cells = sum(part.stop - part.first for part in plan.trial)
        # So few cells don't keep all threads busy. With more, reading alone would be as many times as fast, at best.
        nbytes = sum(part.nbytes for part in plan.trial) * reading.threads // min(reading.threads, cells)
        alone = Trial(nbytes, max(alone for alone, _ in seconds))
        nbytes = sum(part.nbytes for current in first[1:] for parts in current.values() for part in parts)
        exchange = Trial(nbytes, max(exchange for _, exchange in seconds))
        shares = exchange_is_faster(alone, exchange)
        log.debug("a trial of reading: alone %s, by exchange %s", alone, exchange)
        if not shares:
            parts = [part for current in left for parts in current.values() for part in parts]
            mine = [part for part in parts if plan.view_of[rank] in part.views]
            reading.cells(runs_of([*plan.own[rank], *mine]), {}, crowd)
            return
    with turn(operation, "exchange", patience), _naming(operation):
        rounds.run(left)
    reading.cells(runs_of(plan.own[rank]), {})


def _listen(operation: Operation) -> None:
    for point in ("trial", "exchange"):
        operation.listen(point)


@contextmanager
def _naming(operation: Operation) -> Iterator[None]:
    """Have an error that a rank is gone, which all others meet, say which."""
    try:
        yield
    except RankTimeoutError as error:
        silent = operation.roll_call(partial(_listen, operation))
        if not silent:  # the one that failed first says so itself
            raise
        named = RankTimeoutError(f"no answer from {', '.join(f'rank {rank}' for rank in silent)}: {error}")
        raise named from error


def _try(
    plan: Exchange,
    first: Sequence[Mapping[int, Sequence[Part]]],
    reading: Reading,
    rounds: Rounds,
    rank: int,
    crowd: Crowd | None,
) -> tuple[float, float]:
    """Seconds that this rank takes to read the trial's parts alone, and to do the `first` rounds but the very first."""
    alone = [part for part in plan.trial if plan.view_of[rank] in part.views]
    failure: BaseException | None = None
    times = [0.0, 0.0]
    try:
        # What only the first use costs would be taken for slowness of that way.
        reading.pool.reserve(reading.threads * BLOCK)
        reading.open(runs_of([*alone, *(part for current in first for part in current.get(rank, ()))]))
    except BaseException as error:  # noqa: BLE001 - it is raised when the others know
        failure = error
    if rounds.meet(failure):
        started = time.perf_counter()
        try:
            reading.cells(runs_of(alone), {}, crowd)
        except BaseException as error:  # noqa: BLE001 - it is raised when the others know
            failure = error
        times[0] = time.perf_counter() - started
        if rounds.meet(failure):
            rounds.run(first)
            times[1] = rounds.ended[-1] - rounds.ended[0] if rounds.ended else 0.0
    if failure is not None:
        raise failure
    return times[0], times[1]


def _stored_in(manifest: Manifest) -> Callable[[str], Sequence[Stored]]:
    """The entries of a tensor by its name, made once for each."""

    @cache
    def stored(name: str) -> Sequence[Stored]:
        tensor = manifest.tensors[name]
        itemsize = ITEMSIZE[tensor.dtype]
        columns = zip(tensor.file, tensor.offset, tensor.starts, tensor.lengths, strict=True)
        return [Stored(file, offset, Box(start, lengths), itemsize) for file, offset, start, lengths in columns]

    return stored


def _unpacked(body: bytes) -> Wants:
    raw = zstandard.ZstdDecompressor().decompress(body, max_output_size=_MOST_WIRE_BYTES)
    return _WANTS.decode(raw)
