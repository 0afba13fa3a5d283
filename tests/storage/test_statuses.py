"""Which answers of a store are asked for again, and which are final: for each kind of request, and both clients."""

from collections.abc import Callable
from typing import Any

import pytest

from s3_server import S3Place
from shardckpt.errors import ObjectNotFoundError, StorageAccessError, StorageError
from shardckpt.storage import BLOCK, Storage, open_storage, retry
from shardckpt.storage.s3_opening import open_with_s3fs
from storage.conformance import noise, store
from storage.proxy import Proxy, Rule, first
from storage.test_s3 import endpoint, through

PASSING = (
    *("408 RequestTimeout", "400 RequestTimeout", "429 TooManyRequests", "500 InternalError", "502 BadGateway"),
    *("503 SlowDown", "503 ServiceUnavailable", "504 GatewayTimeout", "409 OperationAborted"),
)
FINAL: dict[str, type[StorageError]] = {
    "400 InvalidRequest": StorageError,
    "401 Unauthorized": StorageAccessError,
    "403 AccessDenied": StorageAccessError,
    "403 SignatureDoesNotMatch": StorageAccessError,
    "404 NoSuchBucket": ObjectNotFoundError,
}

DATA = noise(2 * BLOCK + 5)


def _delete(storage: Storage) -> None:
    storage.delete(["small"])
    assert [stat.name for stat in storage.list()] == ["rank"]


def _list(storage: Storage) -> None:
    assert [stat.name for stat in storage.list()] == ["rank", "small"]


def _get(storage: Storage) -> None:
    assert storage.get("small") == b"data"


def _size(storage: Storage) -> None:
    assert storage.size("small") == 4


def _read(storage: Storage) -> None:
    into = bytearray(100)
    storage.read_into("rank", BLOCK, memoryview(into))
    assert into == DATA[BLOCK : BLOCK + 100]


def _put(storage: Storage) -> None:
    storage.put("other", b"more", replace=True)
    assert storage.get("other") == b"more"


def _put_new(storage: Storage) -> None:
    storage.put("other", b"more", replace=False)
    assert storage.get("other") == b"more"


def _part(storage: Storage) -> None:
    store(storage, "large", DATA)
    assert storage.size("large") == len(DATA)


REQUESTS: dict[str, tuple[str, str, Callable[[Storage], None]]] = {
    "get": ("GET", "/", _get),
    "range": ("GET", "/", _read),
    "size": ("HEAD", "/", _size),
    "put": ("PUT", "/", _put),
    "new": ("PUT", "/", _put_new),
    "list": ("GET", "list-type=2", _list),
    "delete": ("POST", "/", _delete),
    "begin": ("POST", "?uploads", _part),
    "part": ("PUT", "partNumber=2", _part),
    "complete": ("POST", "?uploadId=", _part),
}
FINAL_TO_OBSTORE = {"400 RequestTimeout", "409 OperationAborted"}
"""What it does not send again in an upload of several parts, which is its own from beginning to end."""


def _answering(count: int, kind: str, answer: str) -> Rule:
    method, word, _ = REQUESTS[kind]
    rule = first(count, word, answer)
    return lambda line, headers: rule(line, headers) if line.startswith(method + " ") else None


@pytest.fixture(params=[open_storage, open_with_s3fs], ids=["obstore", "s3fs"])
def opener(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    return request.param


def _filled(place: S3Place) -> None:
    storage = open_storage(place.url, place.storage_options)
    storage.put("small", b"data", replace=True)
    store(storage, "rank", DATA)


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("answer", PASSING)
def test_what_passes_is_asked_for_again(opener: Any, s3_place: S3Place, kind: str, answer: str) -> None:
    """A store that has too much to do, or a gateway before it, is no reason for a save or a load to fail."""
    if kind == "size" and answer in FINAL_TO_OBSTORE:
        return  # its answer has no body, and nothing but the body says that it passes
    _filled(s3_place)
    act = REQUESTS[kind][2]
    with Proxy(endpoint(s3_place), _answering(2, kind, answer)) as proxy:
        storage = opener(s3_place.url, through(proxy, s3_place))
        if opener is open_storage and kind in ("part", "complete") and answer in FINAL_TO_OBSTORE:
            with pytest.raises(StorageError, match=answer.split()[1]):
                act(storage)
            return
        act(storage)
        assert proxy.seen[answer] == 2


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("answer", FINAL)
def test_what_is_final_is_an_error_at_once(opener: Any, s3_place: S3Place, kind: str, answer: str) -> None:
    """Nobody waits for minutes to hear that a key is wrong: it was asked once, and is an error of its kind."""
    _filled(s3_place)
    with Proxy(endpoint(s3_place), _answering(99, kind, answer)) as proxy:
        with pytest.raises(FINAL[answer]):
            REQUESTS[kind][2](opener(s3_place.url, through(proxy, s3_place)))
        # botocore looks for another region of the bucket after such a HEAD.
        assert proxy.seen[answer] == 1 + (opener is not open_storage and kind == "size" and answer[:3] == "400")
