"""What an object store takes and gives at most: the same bytes by as many connections, with nothing done to them."""

import http.client
import os
import threading
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

import obstore
import torch
from obstore.store import S3Store

PIECE: Final = 8 << 20
CONNECTIONS: Final = 8
"""Of each rank: as many as shardckpt uses."""


def _endpoint() -> str:
    return os.environ["AWS_ENDPOINT_URL"]


class RawHttp:
    """Plain sockets. The server must ask for no signature."""

    def __init__(self, bucket: str, nbytes: int) -> None:
        self.bucket = bucket
        self.buffer = memoryview(torch.ones(nbytes, dtype=torch.uint8).numpy().data)
        self.nbytes = nbytes

    def write(self, name: str) -> None:
        def send(connection: http.client.HTTPConnection, start: int) -> None:
            connection.request("PUT", f"/{self.bucket}/{name}-{start}", body=self.buffer[start : start + PIECE])
            connection.getresponse().read()

        self._in_pieces(send)

    def read(self, name: str) -> None:
        def get(connection: http.client.HTTPConnection, start: int) -> None:
            connection.request("GET", f"/{self.bucket}/{name}-{start}")
            answer, view = connection.getresponse(), self.buffer[start : start + PIECE]
            while view and (got := answer.readinto(view)):
                view = view[got:]
            answer.read()

        self._in_pieces(get)

    def _in_pieces(self, act: Callable[[http.client.HTTPConnection, int], None]) -> None:
        starts = iter(range(0, self.nbytes, PIECE))
        lock = threading.Lock()

        def run() -> None:
            connection = http.client.HTTPConnection(urlsplit(_endpoint()).netloc, blocksize=1 << 20)
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    break
                act(connection, start)
            connection.close()

        _in_threads(run)


class BareObstore:
    """obstore by itself: one object of each rank, in parts, from and into memory."""

    def __init__(self, bucket: str, nbytes: int) -> None:
        self.store = S3Store(
            bucket,
            config={"endpoint": _endpoint(), "unsigned_payload": True, "region": "us-east-1"},
            client_options={"allow_http": True},
        )
        self.buffer = memoryview(torch.ones(nbytes, dtype=torch.uint8).numpy().data)
        self.nbytes = nbytes

    def write(self, name: str) -> None:
        obstore.put(self.store, name, self.buffer, use_multipart=True, chunk_size=PIECE, max_concurrency=CONNECTIONS)

    def read(self, name: str) -> None:
        starts = iter(range(0, self.nbytes, PIECE))
        lock = threading.Lock()

        def run() -> None:
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                length = min(PIECE, self.nbytes - start)
                self.buffer[start : start + length] = memoryview(
                    obstore.get_range(self.store, name, start=start, length=length)
                )

        _in_threads(run)


def _in_threads(run: Callable[[], None]) -> None:
    threads = [threading.Thread(target=run) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
