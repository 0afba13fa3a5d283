"""The clients of obstore for one bucket, and the one thing that they cannot bear: a fork."""

import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

from shardckpt.errors import UsageError
from shardckpt.storage.concealment import longest_first, secrets_of

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Factory = Callable[[int], "tuple[ObjectStore, Collection[str]]"]
"""Makes a client that tries a request again so many times, and returns it with the words that no message may show.

Of credentials that are renewed, the new ones join those words.
"""

RETRIES: Final = 10
"""Further attempts at a request that fails in a way that may pass, with pauses that grow and are scattered."""

_log = logging.getLogger(__name__)
_users: set[int] = set()


def forked() -> bool:
    """Whether a process that used obstore was forked to make this one: any request would hang."""
    return bool(_users) and os.getpid() not in _users


class Connection:
    """What all places in one bucket share. Nothing is looked up or connected to before the first request.

    Args:
        url: the bucket, for messages.
        make: makes the clients.
        secrets: such words as are known from the beginning.
    """

    def __init__(self, url: str, make: Factory, secrets: tuple[str, ...]) -> None:
        self._secrets: list[Collection[str]] = [secrets]
        self._url = url
        self._make = make
        self._lock = threading.Lock()
        self._stores: dict[int, ObjectStore] = {}
        self._told = False

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no message may show, the longest word first."""
        return longest_first(word for words in self._secrets for word in tuple(words))

    @property
    def store(self) -> "ObjectStore":
        """The client for requests that may be sent twice."""
        return self._store(RETRIES)

    @property
    def once(self) -> "ObjectStore":
        """The client for requests of which it must be known whether an earlier attempt has been made."""
        return self._store(0)

    def lacks_conditions(self) -> None:
        """Say once that the store writes only without conditions."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            _log.warning(
                "%s does not know If-Match and If-None-Match: two jobs that save to one path at the same moment are "
                "found out only if one of them looks after the other has written",
                self._url,
            )

    def _store(self, retries: int) -> "ObjectStore":
        if forked():
            raise UsageError(
                f"{self._url} cannot be used in a forked process, since the one that it was forked from has used it and"
                " its client would hang: start processes with the spawn or forkserver method"
            )
        with self._lock:
            if retries not in self._stores:
                self._stores[retries], secrets = self._make(retries)
                self._secrets.append(secrets)
                _users.add(os.getpid())
            return self._stores[retries]


_connections: dict[tuple[Any, ...], Connection] = {}
_lock = threading.Lock()


def connection_to(
    url: str, options: Mapping[str, Any], variables: tuple[str, ...], factory: Callable[[], Factory]
) -> Connection:
    """The connection to a bucket by these options, made at the first call; ``factory`` makes what makes its clients.

    ``variables`` are how the names begin of what the environment decides where the options leave it open.
    """
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith(variables)))
    key = (url, repr(sorted(options.items())), environment)
    with _lock:
        if key not in _connections:
            _connections[key] = Connection(url, factory(), secrets_of(options))
        return _connections[key]
