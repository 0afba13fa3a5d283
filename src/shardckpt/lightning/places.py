"""Where a plugin's checkpoints lie, what lies there, and with which storage options it is reached."""

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

from shardckpt.commit import checkpoint_path, is_checkpoint, latest
from shardckpt.errors import CheckpointNotFoundError, UsageError
from shardckpt.lightning import ordinary
from shardckpt.storage import local_path, split

log = logging.getLogger(__name__)

Resume = Literal["latest"] | None


class Places:
    """The places that one plugin is asked for; ``storage_options`` are its own.

    ``resume``: what is taken for a checkpoint that was never completed. Raises UsageError where it is something else.
    """

    def __init__(self, storage_options: Mapping[str, Any] | None, resume: Resume) -> None:
        if resume not in (None, "latest"):
            raise UsageError(f"resume is 'latest' or None, not {resume!r}")
        self.resume = resume
        self._storage_options = storage_options or {}
        self._options: dict[str, Mapping[str, Any]] = {}
        self._written: set[str] = set()

    def wrote(self, path: str, storage_options: Mapping[str, Any] | None) -> None:
        """Note that this process has saved to ``path``, and with what options of the call."""
        self._written.add(_key(path))
        self._options[_key(path)] = storage_options or {}

    def removed(self, path: str) -> None:
        """Note that what was saved to ``path`` is gone, or will be, unless the save that is to replace it fails.

        With which options it was saved is remembered: it may have to be removed again.
        """
        self._written.discard(_key(path))

    def options_for(self, path: str) -> dict[str, Any]:
        """The storage options for ``path``: the plugin's, and those of the call that saved it in this process."""
        return {**self._storage_options, **self._options.get(_key(path), {})}

    def has_ours(self, path: str) -> bool:
        """Whether a sharded checkpoint is at ``path``, or will be once the save in flight is committed."""
        return _key(path) in self._written or ordinary.is_ours(path, self.options_for(path))

    def find(self, path: Any) -> tuple[str, dict[str, Any], bool]:
        """What lies at ``path``: where it is, with which storage options, and whether it is an ordinary checkpoint.

        Where it is incomplete, this is about what `complete` has for it, and raises what that raises.
        """
        text = checkpoint_path(path)
        options = self.options_for(text)
        text = ordinary.standing(text, options)
        is_ordinary = ordinary.is_ordinary(text, options)
        if not is_ordinary:
            text = self.complete(text) or text
        return text, options, is_ordinary

    def is_cut_short(self, path: str) -> bool:
        """Whether at ``path`` lies a sharded checkpoint that was never completed, or a link to nothing."""
        options = self.options_for(path)
        if ordinary.standing(path, options) != path:
            return False
        if os.path.islink(path) and not os.path.exists(path):
            return True
        return ordinary.is_ours(path, options) and not is_checkpoint(path, options)

    def complete(self, path: str, resume: Resume = None) -> str | None:
        """``path``, unless what lies there was cut short.

        Then the ordinary file that it was to replace, if there is one; else the newest complete checkpoint beside it,
        where ``resume``, or that of the plugin, is "latest"; None where there is none. Raises CheckpointNotFoundError
        that names it where ``resume`` is None.
        """
        options = self.options_for(path)
        if not self.is_cut_short(path):
            return ordinary.standing(path, options)
        newest = latest(split(path)[0], options)
        if newest is None:
            log.warning("%s is not complete: its save was cut short, and no complete checkpoint lies beside it", path)
        elif (resume or self.resume) is None:
            raise CheckpointNotFoundError(
                f"{path} is not complete: its save was cut short. The newest complete checkpoint beside it is {newest}."
                ' Resume from that, or have ShardedCheckpointIO(resume="latest") take the newest by itself.'
            )
        else:
            log.warning("%s is not complete: its save was cut short. Taking the newest complete one, %s", path, newest)
        return newest


def _key(path: str) -> str:
    local = local_path(path)
    return path.rstrip("/") if local is None else os.path.abspath(os.path.expanduser(local))
