"""The exchange: in each round every rank reads its part, then passes on what others want of it.

Reading runs one round ahead of passing on, in threads. Whatever crosses between ranks does so in the calling thread.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, NamedTuple

import torch
import torch.distributed as dist

from shardckpt.box import Box, intersect
from shardckpt.codecs import ITEMSIZE, torch_dtype
from shardckpt.reader.exchange import LIMIT, Exchange, Group, Part, Round
from shardckpt.reader.group import Passed, leave_group, over_group, reduce, transfer
from shardckpt.reader.place import Placement, Target
from shardckpt.reader.targets import Reading
from shardckpt.reader.wants import Entry

_ALIGNMENT: Final = 16
"""Bytes: of the widest dtype."""
_SMALL: Final = 2 << 20
"""Bytes of the buffers with which an exchange begins."""
_SLACK: Final = 1 << 20
"""Bytes of a buffer beyond `LIMIT`, for alignment."""


class _Item(NamedTuple):
    """Elements of one entry in a message."""

    entry: Entry
    box: Box
    """In coordinates of the whole tensor."""
    start: int
    """Of its bytes in the buffer."""
    stop: int


class _Message(NamedTuple):
    """What one rank has for the ranks of a group. Offsets are bytes of the buffer that it is in."""

    reader: int
    group: Group
    tag: int
    """Which of the reader's messages of this round it is: one rank may get several."""
    items: list[_Item]
    start: int
    stop: int


class Rounds:
    """One rank's part in the rounds of an `Exchange`. All ranks call the same methods in the same order."""

    def __init__(self, plan: Exchange, reading: Reading, rank: int, listen: Callable[[], None]) -> None:
        """Takes memory only; the rest needs `join_group`. ``listen`` raises what other ranks have left of, if any."""
        self.plan = plan
        self._reading = reading
        self._rank = rank
        self._view = plan.view_of[rank]
        self._listen = listen
        # One is filled while another is sent.
        self._sending = [_room(0), _room(0)]
        self._receiving = _room(0)
        self.ended: list[float] = []
        """When each round that was done had been passed on, in seconds of ``time.perf_counter``."""

    def meet(self, failure: BaseException | None = None) -> bool:
        """Wait for all ranks, and tell them whether this one has failed; whether none has."""
        failed = torch.tensor([failure is not None], dtype=torch.int32)
        over_group(partial(reduce, failed, self._listen))
        return not failed.item()

    def run(self, rounds: Sequence[Round], failure: BaseException | None = None) -> bool:
        """Do `rounds`, and return True; or stop, on all ranks in the same round, once one of them has failed.

        A rank whose own reading or placing failed raises that error when all have been told, as it does with `failure`,
        an error that it met before; the others return False. Of a failure to place what came in the last round they are
        not told. Raises RankTimeoutError where a rank is gone.
        """
        ahead: _Ahead | None = None
        try:
            for number in range(len(rounds) + 1):
                current, ahead = ahead, None
                if current is not None:
                    failure = current.wait() or failure
                if failure is None and number < len(rounds):
                    try:
                        ahead = self._begin(rounds[number], self._sending[number % 2], number % 2)
                    except BaseException as error:  # noqa: BLE001 - it is raised when the others know
                        failure = error
                if not self.meet(failure):
                    break
                if current is not None:
                    failure = self._pass_on(rounds[number - 1], current)
                    self.ended.append(time.perf_counter())
            else:
                if failure is None:
                    return True
        except BaseException:
            leave_group()  # the others have not been told
            raise
        finally:
            if ahead is not None:
                ahead.wait()
        if failure is not None:
            raise failure
        return False

    def _begin(self, current: Round, buffer: torch.Tensor, slot: int) -> "_Ahead":
        """Start to read this rank's part of a round, into targets and into `buffer`."""
        parts = current.get(self._rank, ())
        messages: list[_Message] = []
        at = 0
        for tag, group in enumerate(self._groups(parts)):
            if not self.plan.is_only(self._rank, group):
                messages.append(self._message(self._rank, parts, group, tag, at))
                at = messages[-1].stop
        if at > len(buffer):
            buffer = self._sending[slot] = _room(at)
        others: defaultdict[Entry, list[Placement]] = defaultdict(list)
        for message in messages:
            for item in message.items:
                name, shard = item.entry
                tensor = self._reading.manifest.tensors[name]
                dtype = torch_dtype(tensor.dtype)
                room = buffer[item.start : item.stop].view(dtype).view(item.box.lengths)
                stored = Box(tensor.starts[shard], tensor.lengths[shard])
                others[item.entry].append(Placement(stored, item.box, Target(name, item.box, room), dtype))
        return _Ahead(self._reading, runs_of(parts), others, messages, buffer)

    def _pass_on(self, current: Round, outgoing: "_Ahead") -> BaseException | None:
        """Send what was read, receive what others read, and place that; returns what went wrong with placing."""
        incoming: list[_Message] = []

        def swap(group: dist.ProcessGroup) -> torch.Tensor:
            at = 0
            for reader, parts in sorted(current.items()):
                for tag, alike in enumerate(self._groups(parts)):
                    if reader != self._rank and self._view in alike:
                        incoming.append(self._message(reader, parts, alike, tag, at))
                        at = incoming[-1].stop
            if at > len(self._receiving):
                self._receiving = _room(at)
            buffer = self._receiving
            sends: list[Passed] = []
            for message in outgoing.messages:
                if not message.items:  # a cell between two that are wanted, of which nothing is
                    continue
                ranks = [rank for view in message.group for rank in self.plan.views[view] if rank != self._rank]
                # Everybody begins with the rank after its own: not all send to one at a time.
                ranks.sort(key=lambda rank: (rank < self._rank, rank))
                sends += [Passed(outgoing.buffer[message.start : message.stop], rank, message.tag) for rank in ranks]
            receives = [Passed(buffer[m.start : m.stop], m.reader, m.tag) for m in incoming if m.items]
            transfer(group, receives, sends)
            return buffer

        buffer = over_group(swap)
        try:
            for message in incoming:
                for item in message.items:
                    self._place(item, buffer[item.start : item.stop])
        except BaseException as error:  # noqa: BLE001 - it is raised when the others know
            return error
        return None

    def _place(self, item: _Item, raw: torch.Tensor) -> None:
        name, _ = item.entry
        dtype = torch_dtype(self._reading.manifest.tensors[name].dtype)
        stats = self._reading.stats
        stats.bytes_received += len(raw)
        stats.placing = True
        for target in self._reading.targets[name]:
            overlap = intersect(item.box, target.box)
            if overlap is not None:
                Placement(item.box, overlap, target, dtype).copy(raw, dtype, 0)

    def _groups(self, parts: Sequence[Part]) -> list[Group]:
        return sorted({group for part in parts for group in self.plan.groups(part)})

    def _message(self, reader: int, parts: Sequence[Part], group: Group, tag: int, at: int) -> _Message:
        """What a group gets of parts that one rank reads, from byte `at` of a buffer on."""
        items: list[_Item] = []
        start = at
        for part in parts:
            if group in self.plan.groups(part):
                itemsize = ITEMSIZE[self._reading.manifest.tensors[part.entry[0]].dtype]
                for box in self.plan.boxes(part, group[0]):
                    at = -(-at // _ALIGNMENT) * _ALIGNMENT
                    stop = at + box.volume * itemsize
                    items.append(_Item(part.entry, box, at, stop))
                    at = stop
        # The same length for sender and receiver, wherever in their buffers it starts.
        return _Message(reader, group, tag, items, start, -(-at // _ALIGNMENT) * _ALIGNMENT)


def runs_of(parts: Iterable[Part]) -> dict[Entry, list[tuple[int, int]]]:
    """The cells of parts, as half-open runs by entry."""
    found: defaultdict[Entry, list[tuple[int, int]]] = defaultdict(list)
    for part in parts:
        found[part.entry].append((part.first, part.stop))
    return found


class _Ahead:
    """The reading of a round, while another is passed on."""

    def __init__(
        self,
        reading: Reading,
        wanted: dict[Entry, list[tuple[int, int]]],
        others: dict[Entry, list[Placement]],
        messages: list[_Message],
        buffer: torch.Tensor,
    ) -> None:
        self.messages = messages
        """For views, by number, in `buffer`."""
        self.buffer = buffer
        self._error: BaseException | None = None

        def run() -> None:
            try:
                reading.cells(wanted, others)
            except BaseException as error:  # noqa: BLE001 - it is raised when the others know
                self._error = error

        self._thread = threading.Thread(target=run, name="shardckpt-ahead")
        self._thread.start()

    def wait(self) -> BaseException | None:
        """Wait until all is read, even if the user interrupts, since threads write to targets; what went wrong."""
        while self._thread.is_alive():
            try:
                self._thread.join()
            except BaseException as interruption:  # noqa: BLE001 - it is raised when the others know
                self._error = self._error or interruption
        return self._error


def _room(nbytes: int) -> torch.Tensor:
    """A buffer of at least `nbytes`: a small one is enough for a trial, and others are for any round.

    Its pages are there: the first use of memory is slow, and would be taken for slow storage.
    """
    nbytes = _SMALL if nbytes <= _SMALL else max(nbytes, LIMIT + _SLACK)
    return torch.empty(nbytes, dtype=torch.uint8).fill_(0)
