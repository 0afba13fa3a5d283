"""The checkpoints of one run, for a loop of one's own: saved by step, kept as long as wanted, found again."""

import logging
import re
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import msgspec
import torch

from shardckpt import commit, coordinator, options
from shardckpt.background import PendingSave
from shardckpt.checkpointer import Checkpointer
from shardckpt.coordinator import turn
from shardckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, TensorNotFoundError, UsageError
from shardckpt.loading import OpenCheckpoint
from shardckpt.options import Path
from shardckpt.retention import Kept, Mode, Retention
from shardckpt.storage import join, open_storage

if TYPE_CHECKING:
    from typing import Self

log = logging.getLogger(__name__)

KEY: Final = "manager"
"""Of the saved state: what the manager notes beside what the caller saves."""
_FOUND: Final = msgspec.msgpack.Decoder(list[Kept])
_NAME: Final = re.compile(r"step=(\d+)", re.ASCII)


class CheckpointManager:
    """Saves the state of a run by step below one directory, removes what need not be kept, and finds the newest again.

    All ranks make the same calls in the same order. Those that look for what is there wait for the save in flight, and
    raise the SaveFailedError that nobody has been told of. There is no database: what is there is found by looking, so
    checkpoints may be removed, moved in and copied by hand. Only directories called ``step=<number>`` are its own.

    ::

        with CheckpointManager("checkpoints", keep_last=3) as manager:
            step = manager.restore(state) or 0
            while step < steps:
                ...
                manager.save(step, state)

    Args:
        root: the directory, or the URL of one.
        keep_last: how many of the newest to keep; None keeps all.
        keep_every: keep those whose step is a multiple of this for good.
        metric: the name of the metric by which `best` judges; the best are kept as well.
        mode: whether the lowest or the highest is the best: ``"min"`` or ``"max"``.
        keep_best: how many of the best.
        checkpointer: what saves and loads, with its options; by default one of its own.
        storage_options: of ``root``, as `Checkpointer` takes them.
        timeout: seconds to wait for the other ranks when looking for what is there.

    Nothing is removed before a newer checkpoint is committed, nor if its save fails.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_last: int | None = 3,
        keep_every: int | None = None,
        metric: str | None = None,
        mode: Mode = "min",
        keep_best: int = 1,
        checkpointer: Checkpointer | None = None,
        storage_options: Mapping[str, Any] | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.root = options.path_text(root)
        self._retention = Retention.of(keep_last, keep_every, metric, mode, keep_best)
        self._storage_options = options.mapping("storage_options", storage_options)
        self._checkpointer = checkpointer or Checkpointer()
        self._timeout = options.positive("timeout", timeout)
        self._known: list[Kept] | None = None
        """What is there once the save in flight is committed, oldest first."""
        self._kept: list[Kept] = []
        """What is there if it fails."""
        self._pending: PendingSave | None = None

    def save(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> PendingSave:
        """Save ``state`` as that of ``step`` in the background; returns once it may change.

        ``metrics`` are numbers, of which rank 0's count. What need not be kept any longer is removed once this save is
        committed. A checkpoint of the same step is replaced. Raises what `Checkpointer.async_save` does.
        """
        if type(step) is not int or step < 0:
            raise UsageError(f"a step is a number of 0 or more, not {step!r}")
        noted = {name: _number(name, value) for name, value in options.mapping("metrics", metrics).items()}
        whole = _with_note(state, {"step": step, "metrics": noted})
        if self._known is None:
            self._known = self._kept = self._look("save")
        path = self.path(step)
        pending = self._checkpointer.async_save(whole, path, storage_options=self._storage_options)
        # The save before has been waited for. If it failed, nothing was removed for it.
        if self._pending is not None and not self._pending.succeeded():
            self._known = self._kept
        self._kept, self._pending = self._known, pending
        there = [one for one in self._known if one.path != path]
        there.append(Kept(pending.save_id, step, path, noted))
        superfluous = self._retention.superfluous(there)
        if coordinator.rank_and_world_size()[0] == 0:
            for one in superfluous:
                self._checkpointer.remove(one.path, storage_options=self._storage_options)
        self._known = [one for one in there if one not in superfluous]
        return pending

    def restore(self, state: Mapping[str, Any], step: int | None = None, **how: Any) -> int | None:
        """Restore ``state`` in place from the newest complete checkpoint, or from that of ``step``; returns its step.

        None if there is none at all. A damaged checkpoint is skipped, loudly, for the one before: all ranks restore the
        same one. If all are damaged it raises the CorruptCheckpointError of the newest; nobody starts from scratch
        unawares. ``how`` are arguments of `Checkpointer.load`, which says what else is raised.
        """
        found = self._look("restore")
        if step is not None:
            found = [one for one in found if one.step == step]
            if not found:
                raise CheckpointNotFoundError(f"there is no complete checkpoint of step {step} in {self.root}")
        damaged: CorruptCheckpointError | CheckpointNotFoundError | None = None
        for one in reversed(found):
            try:
                self._checkpointer.load(one.path, state, storage_options=self._storage_options, **how)
            except (CorruptCheckpointError, CheckpointNotFoundError) as error:  # or removed by another job meanwhile
                log.warning("skipping a damaged checkpoint: %s", error)
                damaged = damaged or error
                continue
            log.info("restored step %d from %s", one.step, one.path)
            return one.step
        if damaged is not None:
            raise damaged
        return None

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in the order in which they were saved."""
        return [one.step for one in self._look("steps")]

    def latest(self) -> str | None:
        """The path of the checkpoint that was saved last, or None."""
        found = self._look("latest")
        return found[-1].path if found else None

    def best(self) -> str | None:
        """The path of the checkpoint with the best metric; None where none has it, UsageError without `metric`."""
        if self._retention.metric is None:
            raise UsageError("this CheckpointManager was made without `metric`, so it cannot tell which is the best")
        ranked = self._retention.ranked(self._look("best"))
        return ranked[0].path if ranked else None

    def path(self, step: int) -> str:
        """Where the checkpoint of a step lies, or would."""
        return join(self.root, f"step={step}")

    def wait(self) -> None:
        """Until nothing is in flight. Raises the SaveFailedError that nobody has been told of yet."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Wait as `wait` does, and give staging memory back."""
        self._checkpointer.close()

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception:
            log.exception("the last save failed, while another error was on its way")

    def _look(self, call: str) -> list[Kept]:
        """The complete checkpoints, oldest first, as rank 0 sees them; every rank calls."""
        self.wait()  # what is being removed would be found, and be gone when it is looked at
        operation = self._checkpointer.begin(f"CheckpointManager.{call}({self.root!r})")
        with turn(operation, "checkpoints", self._timeout) as looked:
            if operation.rank == 0:
                looked.word = msgspec.msgpack.encode(self._scan())
        return _FOUND.decode(looked.heard[0])

    def _scan(self) -> list[Kept]:
        names = open_storage(self.root, self._storage_options).children()
        found, damaged = [], []
        for step, name in ((match[1], name) for name in names if (match := _NAME.fullmatch(name))):
            path = join(self.root, name)
            try:
                if commit.is_checkpoint(path, self._storage_options):
                    opened = self._checkpointer.open(path, storage_options=self._storage_options)
                    found.append(Kept(opened.manifest.save_id, int(step), path, _metrics(opened)))
            except CorruptCheckpointError as error:
                log.warning("skipping a damaged checkpoint: %s", error)
                damaged.append(error)
            except CheckpointNotFoundError:  # removed by another job meanwhile
                continue
        if damaged and not found:
            raise damaged[0]
        return sorted(found, key=lambda one: one.save_id)


def _metrics(opened: OpenCheckpoint) -> dict[str, float]:
    try:
        noted = opened.materialise((KEY, "metrics"))
    except TensorNotFoundError:  # somebody else saved this
        return {}
    return {str(name): float(value) for name, value in noted.items()}


def _with_note(state: Any, note: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(state, Mapping) or KEY in state:
        raise UsageError(f"a manager saves a dict without the key {KEY!r}, under which it notes step and metrics")
    return {**state, KEY: note}


def _number(name: str, value: Any) -> float:
    """A metric as a number."""
    try:
        return float(value.item() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"the metric {name!r} is no number: {value!r}") from error
