"""Where a plugin's checkpoints lie, what lies there, and with which storage options it is reached."""

import os
from collections.abc import Mapping
from typing import Any

from shardckpt.commit import checkpoint_path
from shardckpt.lightning import ordinary
from shardckpt.storage import local_path


class Places:
    """The places that one plugin is asked for; ``storage_options`` are its own."""

    def __init__(self, storage_options: Mapping[str, Any] | None) -> None:
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
        """What lies at ``path``: where it is, with which storage options, and whether it is an ordinary checkpoint."""
        text = checkpoint_path(path)
        options = self.options_for(text)
        text = ordinary.standing(text, options)
        return text, options, ordinary.is_ordinary(text, options)


def _key(path: str) -> str:
    local = local_path(path)
    return path.rstrip("/") if local is None else os.path.abspath(os.path.expanduser(local))
