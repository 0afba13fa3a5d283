"""The plugin: Lightning's ``CheckpointIO`` over a `Checkpointer`.

By itself it honours the contract that Lightning documents: called on one rank, it saves what it is given and returns.
The binding (`shardckpt.lightning.binding`) has every rank call `save_from_every_rank` and `load_lazily` instead.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn
from torch.optim import Optimizer

from shardckpt import coordinator
from shardckpt.background import PendingSave
from shardckpt.checkpointer import Checkpointer
from shardckpt.commit import checkpoint_path
from shardckpt.errors import SaveFailedError, UsageError
from shardckpt.lightning import agreement, fabric, flavours, from_checkpoint, model_checkpoint, ordinary, restore
from shardckpt.lightning.every_rank import save
from shardckpt.lightning.figures import Figures
from shardckpt.lightning.lazy import plain
from shardckpt.lightning.living import living
from shardckpt.lightning.places import Places, Resume
from shardckpt.lightning.sharing import Nesting, Running, Twins
from shardckpt.options import CheckpointerOptions

if TYPE_CHECKING:
    from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO as _CheckpointIO
else:
    _CheckpointIO = flavours.main().checkpoint_io()

log = logging.getLogger(__name__)


class ShardedCheckpointIO(_CheckpointIO):
    """Sharded, asynchronous checkpoints for a Lightning Trainer: ``Trainer(plugins=[ShardedCheckpointIO()])``.

    Under a single device, DDP, FSDP and ModelParallel every process writes a part of each checkpoint while training
    goes on, and it resumes on any number of processes, under any of these. Ordinary ``.ckpt`` files still load.

    Args:
        resume: what to do about a checkpoint that was never completed, where a path or "last" leads to one: None for an
            error that names the newest complete one beside it, ``"latest"`` to take that, with a warning.
        log_reports: whether the figures of each save and load go to the Trainer's loggers, as ``checkpoint/...``.
        options: those of `shardckpt.Checkpointer`, passed on as they are: ``storage_options``, ``compression``,
            ``replicated``, ``include``, ``exclude``, ``staging_limit``, ``overlap``, ``timeout``, ``commit_timeout``,
            ``on_save_error``, ``on_report`` and ``share_reads``.

    Raises:
        UsageError: an option is unknown or has an impossible value.
    """

    def __init__(
        self, *, resume: Resume = None, log_reports: bool = False, **options: Unpack[CheckpointerOptions]
    ) -> None:
        super().__init__()
        self._resume = resume
        self._log_reports = log_reports
        self._options = options
        self._start()
        self._make(alone=False)  # so that a wrong option is known here, and not at the first save

    def _start(self) -> None:
        self._checkpointer: Checkpointer | None = None
        self._pid = os.getpid()
        self._is_bound = False
        self._nesting = Nesting()
        self._quiet = False
        self._warned = False
        self._latest: PendingSave | None = None
        self._asked: list[tuple[str, PendingSave | None]] = []
        """Removals that wait for a save, and come to nothing if it fails, or None where it has: for the next to ask."""
        self._failed_alone = 0
        self._lost = False
        """Whether the newest save was one from this process alone, and failed."""
        self.twins = Twins()
        self.places = Places(self._options.get("storage_options"), self._resume)
        self.displaced = ordinary.Displaced()
        self.figures = Figures(self._options.get("on_report")) if self._log_reports else None
        """What goes to loggers; None where nothing is to."""
        flavours.register(type(self))
        from_checkpoint.install()
        model_checkpoint.install()
        fabric.install()
        living.add(self)

    def _make(self, *, alone: bool) -> Checkpointer:
        hearing: CheckpointerOptions = {} if self.figures is None else {"on_report": self.figures.hear}
        try:
            return Checkpointer(**(self._options | hearing), alone=alone)
        except TypeError as error:
            raise UsageError(f"ShardedCheckpointIO takes the options of shardckpt.Checkpointer: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self._options, "resume": self._resume, "log_reports": self._log_reports}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._options, self._resume, self._log_reports = state["options"], state["resume"], state["log_reports"]
        self._start()

    @property
    def checkpointer(self) -> Checkpointer:
        """The engine of this process, made when it is first needed: plugins are copied, pickled and forked."""
        if self._checkpointer is None or self._pid != os.getpid():
            self._checkpointer = self._make(alone=False)
            self._pid = os.getpid()
        return self._checkpointer

    @property
    def failed_saves(self) -> int:
        """How many saves have failed so far in this process; ``on_save_error="warn"`` goes on after each."""
        own = 0 if self._checkpointer is None else self._checkpointer.failed_saves
        return own + self._failed_alone

    @property
    def overlaps(self) -> bool:
        """Whether a copy may still be under way when a save has returned."""
        return self._options.get("overlap") is not None

    @property
    def requires_state_on_load(self) -> bool:
        """True: given the live state, `load_checkpoint` reads tensors into it in place."""
        return True

    # -- the contract of CheckpointIO: called on one rank -------------------------------------------------------------

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save from this process alone, whatever the other ranks do; committed when it returns.

        Raises:
            SaveFailedError: what was at ``path`` before is intact.
        """
        world_size = coordinator.rank_and_world_size()[1]
        if world_size > 1 and not self._is_bound and not self._warned:
            self._warned = True
            log.warning(
                "ShardedCheckpointIO is not bound to this Trainer's strategy, so one of %d processes writes the whole"
                " checkpoint, and training waits for it. The binding comes from an entry point of the installed"
                " shardckpt (of a source tree: `pip install -e .`) and covers the strategies for a single device, DDP,"
                " FSDP and ModelParallel; or pass Trainer(strategy=shardckpt.lightning.ShardedDDPStrategy()).",
                world_size,
            )
        text = checkpoint_path(path)
        with self.displaced.making_way() as way, closing(self._make(alone=True)) as alone:
            way.make(text)
            state = plain(checkpoint)  # a state dict as it is: the versions of its modules are an attribute of it
            alone.save(state if isinstance(state, dict) else dict(state), text, storage_options=storage_options)
            self._failed_alone += alone.failed_saves
            self._lost = alone.failed_saves > 0
        self.places.wrote(text, storage_options)

    def load_checkpoint(  # type: ignore[override]  # what it returns is that of the documented contract
        self,
        path: Any,
        map_location: Any = None,
        weights_only: bool | None = None,
        *,
        state: nn.Module | Optimizer | dict[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Load on this process.

        Args:
            path: a sharded checkpoint or the ``manifest.json`` in it, an ordinary file, or a directory that Lightning's
                FSDP or ModelParallel strategy wrote.
            map_location: as in ``torch.load``, for tensors that have no live counterpart; None puts them on the CPU.
            weights_only: as in ``torch.load``; None is true, so pickled objects are refused.
            state: a module, an optimizer, a dict of such and of plain values, or the dict that the Trainer's
                ``dump_checkpoint`` returns. What the checkpoint has for it is read into it in place.

        Returns:
            What the caller has still to apply: without ``state``, or of an ordinary checkpoint, everything; with it,
            what has no place in it. None where that is nothing. For a Trainer's dict it is again a whole one, which
            shares the live tensors, because the Trainer looks up all of its keys.
        """
        self.wait()
        text, options, is_ordinary = self.places.find(path)
        if is_ordinary:
            loaded: dict[str, Any] | None = ordinary.load(text, map_location, weights_only, options)
            return loaded
        with closing(self._make(alone=True)) as alone:
            opened = alone.open(text, storage_options=options)
            reading = restore.Reading(opened, "cpu" if map_location is None else map_location, weights_only)
            restored: dict[str, Any] | None = reading.everything() if state is None else reading.into(state)
            return restored

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, once the save in flight is committed; if that fails, the older one is kept.

        It is kept until the next removal then, since nobody asks for its own again. A symbolic link is unlinked, never
        followed. Ordinary files and directories are removed as Lightning does it.
        """
        again = [asked for asked, save in self._asked if save is None or (save.done() and not save.succeeded())]
        self._asked = [(asked, save) for asked, save in self._asked if save is not None and not save.done()]
        for text in dict.fromkeys([checkpoint_path(path), *again]):
            self._remove(text)

    def _remove(self, text: str) -> None:
        if ordinary.is_link(text):
            ordinary.remove(text)
            return
        options = self.places.options_for(text)
        latest = self._latest
        if self._lost or latest is not None:
            self._asked.append((text, None if self._lost else latest))
        if self._lost or (latest is not None and latest.done() and not latest.succeeded()):
            log.warning("keeping %s: the save that was to replace it failed", text)
        elif self.places.has_ours(text):
            self.checkpointer.remove(text, storage_options=options)
            self.places.removed(text)
        elif latest is not None and isinstance(latest.outcome(), SaveFailedError):
            log.warning("keeping %s: the save that was to replace it failed", text)
        else:
            ordinary.remove(text, options)

    def teardown(self) -> None:
        """Wait for the save in flight and free the memory. The plugin can be used again afterwards.

        Raises:
            SaveFailedError: a save failed and nobody has been told yet; on every rank.
        """
        if self._checkpointer is None or self._pid != os.getpid():
            return
        try:
            self._checkpointer.close()
        except SaveFailedError as error:
            if not self._quiet:
                raise
            log.error("a checkpoint was not saved: %s", error)
        finally:
            self._latest = None
            self.displaced.settle()

    # -- called by the binding, on every rank -------------------------------------------------------------------------

    def bind(self) -> None:
        """Note that every rank will call: from here on a save from one rank is the launcher's, and no mistake."""
        self._is_bound = True

    def save_from_every_rank(
        self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any | None, running: Running
    ) -> None:
        """Save together with all ranks: each its part, to the path that rank 0 was given.

        Raises on every rank alike; SaveFailedError of the save before this one too, if nobody has been told of it. In
        an emergency that one is only logged, and after an exception nothing is raised.
        """
        self._is_bound = True
        with self._nesting.another() as interrupts:
            if running.emergency and not interrupts:
                try:
                    self.wait()
                except SaveFailedError as error:
                    log.error("a checkpoint was not saved: %s", error)
            try:
                if interrupts:
                    # What it interrupts goes on after it: so it waits for nothing of that, and changes nothing of it.
                    with closing(self._make(alone=False)) as own:
                        self._save(own, checkpoint, path, storage_options, running._replace(asynchronous=False))
                        self._failed_alone += own.failed_saves
                else:
                    self._lost = False
                    self._latest = self._save(self.checkpointer, checkpoint, path, storage_options, running)
            except Exception as error:
                if not running.interrupted:
                    raise
                log.error("the checkpoint %s was not saved: %s", path, error, exc_info=error)

    def _save(
        self, engine: Checkpointer, checkpoint: Mapping[str, Any], path: Any, options: Any | None, running: Running
    ) -> PendingSave | None:
        text, pending = save(
            engine,
            checkpoint,
            path,
            options,
            running,
            displaced=self.displaced,
            twins=self.twins,
            with_buffers=bool(self._options.get("replicated")),
            timeout=self.timeout,
        )
        self.places.wrote(text, options)
        self._asked = [(asked, save) for asked, save in self._asked if asked != text]
        model_checkpoint.forget_listing(text, self.places.options_for(text))
        return pending

    def load_lazily(
        self,
        path: Any,
        weights_only: bool | None,
        *,
        otherwise: Callable[[str], dict[str, Any]] | None = None,
        mapped: bool = False,
    ) -> dict[str, Any]:
        """Read the plain values of a Trainer's checkpoint, on every rank of one save; large tensors when needed.

        ``otherwise`` is how the strategy itself loads a directory of DCP files. An ordinary local file is ``mapped``
        into memory for those that need only a part of each tensor in it.
        """
        text, options, is_ordinary = self.find_together("Trainer.load_checkpoint", path)
        if is_ordinary and otherwise is not None and ordinary.is_directory(text):
            return otherwise(text)
        if is_ordinary:
            return agreement.on_all(
                "Trainer.read_checkpoint",
                lambda: ordinary.load(text, None, weights_only, options, mapped=mapped),
                timeout=self.timeout,
            )
        opened = self.checkpointer.open(text, storage_options=options, collective=True)
        reading = restore.Reading(opened, "cpu", weights_only)
        return agreement.on_all("Trainer.read_checkpoint", reading.lazily, timeout=self.timeout)

    def find_together(self, call: str, path: Any) -> tuple[str, dict[str, Any], bool]:
        """As `Places.find`, once no save is in flight: what rank 0 finds, on every rank."""
        text, is_ordinary = agreement.from_rank_zero(
            call, lambda: self.places.find(path)[::2], tuple[str, bool], timeout=self.timeout, before=self.wait
        )
        return text, self.places.options_for(text), is_ordinary

    @contextmanager
    def tearing_down(self, *, interrupted: bool) -> Iterator[None]:
        """Encloses a strategy's teardown: whatever it does, the plugin is torn down too.

        After an exception (``interrupted``) a failed save is logged and not raised, so as not to hide what went wrong
        first.
        """
        self._quiet = interrupted
        try:
            yield
        finally:
            try:
                self.teardown()
            finally:
                self._quiet = False

    def wait(self) -> None:
        """Until no save is in flight. Raises SaveFailedError, on every rank, of one that failed unnoticed."""
        if self._checkpointer is not None and self._pid == os.getpid():
            self._checkpointer.wait()

    def settle(self) -> None:
        """Until no save is in flight, however it ends: its failure is told where saves are told of."""
        if self._latest is not None and self._checkpointer is not None and self._pid == os.getpid():
            self._latest.outcome()

    @property
    def timeout(self) -> float:
        """Seconds to wait for the other ranks."""
        return self._options.get("timeout", agreement.TIMEOUT)
