"""Which names of a state are saved."""

import fnmatch
from collections.abc import Sequence


class Selection:
    """The names that match ``include``, less those that match ``exclude``; both are ``fnmatch`` patterns.

    A pattern that matches a container takes, or leaves, all that is in it.
    """

    def __init__(self, include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
        self._include, self._exclude = include, exclude
        self.takes_all = include is None and exclude is None

    def __call__(self, path: str) -> bool:
        if self._exclude is not None and _matches_or_within(path, self._exclude):
            return False
        return self._include is None or _matches_or_within(path, self._include)


def matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _matches_or_within(path: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches ``path``, or something that it lies in."""
    while path:
        if matches(path, patterns):
            return True
        path = path.rpartition(".")[0]
    return False
