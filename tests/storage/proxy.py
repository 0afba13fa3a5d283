"""A small HTTP proxy on the loopback interface that stands before a real S3 server and misbehaves as it is told."""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Self

Fault = str
"""What may happen to a request.

``reset``: the connection is reset before the server hears of it; ``halfway``: when half of the request's body has
come. ``lost``: the server does its work, and the connection is reset before its answer. ``cut``: the answer ends in the
middle with a reset; ``short``: it does so with a polite end. ``slow``: the answer's first byte takes `SLOW` seconds.
The others are refusals: those of `_REFUSALS`, and otherwise a status and the store's word for it ("429 SlowDown").
"""

Rule = Callable[[str, dict[str, str]], Fault | None]
"""Given the request's first line and its headers (names in lower case), says what happens to it."""

SLOW = 0.3

_REFUSALS: dict[str, tuple[str, str]] = {
    "503": ("503", "SlowDown"),
    "501": ("501", "NotImplemented"),
    "403": ("403", "AccessDenied"),
    "expired": ("400", "ExpiredToken"),
    "skewed": ("403", "RequestTimeTooSkewed"),
}

PASSING: tuple[Fault, ...] = ("reset", "halfway", "503", "lost", "cut", "short", "slow")
"""What another attempt gets over."""


def sometimes(share: float, faults: tuple[Fault, ...] = PASSING, seed: int = 0) -> Rule:
    """One of ``faults`` happens to that share of the requests."""
    chance = random.Random(seed)
    lock = threading.Lock()

    def rule(line: str, headers: dict[str, str]) -> Fault | None:
        with lock:
            return chance.choice(faults) if chance.random() < share else None

    return rule


def first(count: int, word: str, fault: Fault) -> Rule:
    """It happens to the first so many requests whose first line contains ``word``."""
    left = [None] * count
    lock = threading.Lock()

    def rule(line: str, headers: dict[str, str]) -> Fault | None:
        with lock:
            if word in line and left:
                left.pop()
                return fault
        return None

    return rule


def bursts(every: int, length: int, fault: Fault = "503") -> Rule:
    """Of every so many requests the last few are refused one after another, as by a store that has had enough."""
    count = 0
    lock = threading.Lock()

    def rule(line: str, headers: dict[str, str]) -> Fault | None:
        nonlocal count
        with lock:
            count += 1
            return fault if count % every >= every - length else None

    return rule


class Proxy:
    """Passes requests on, one connection each, unless ``rule`` has a fault for them; a context manager.

    ``latency`` is in seconds, before each request is passed on; ``bandwidth`` in bytes a second, of each connection and
    in each direction.
    """

    def __init__(self, upstream: str, rule: Rule, *, latency: float = 0.0, bandwidth: float = 0.0) -> None:
        host, port = upstream.removeprefix("http://").split(":")
        self._upstream = (host, int(port))
        self._rule = rule
        self._latency = latency
        self._bandwidth = bandwidth
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.seen: Counter[str] = Counter()
        """How often each fault has happened; "" is none."""
        self.most = 0
        """Requests that were under way at the same time, at most."""
        self._under_way = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                self._exchange(client)
            except OSError:
                pass  # the client, or the test, has gone

    def _exchange(self, client: socket.socket) -> None:
        head, _, body = self._received(client, b"", lambda data: b"\r\n\r\n" in data).partition(b"\r\n\r\n")
        if not head:
            return
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
        fault = self._rule(line, headers)
        self.seen[fault or ""] += 1
        with self._lock:
            self._under_way += 1
            self.most = max(self.most, self._under_way)
        try:
            self._serve_one(client, fault, line, headers, body)
        finally:
            with self._lock:
                self._under_way -= 1

    def _serve_one(
        self, client: socket.socket, fault: Fault | None, line: str, headers: dict[str, str], body: bytes
    ) -> None:
        time.sleep(self._latency)
        if fault == "reset":
            _reset(client)
            return
        if headers.pop("expect", "") == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(headers.get("content-length", "0"))
        if fault == "halfway":
            self._received(client, body, lambda data: len(data) >= length // 2)
            _reset(client)
            return
        if headers.get("transfer-encoding") == "chunked":
            body = self._received(client, body, lambda data: data.endswith(b"\r\n\r\n"))
        else:
            body = self._received(client, body, lambda data: len(data) >= length)
        if fault is not None and (fault in _REFUSALS or " " in fault):
            client.sendall(_refusal(fault, with_body=not line.startswith("HEAD ")))
            return
        answer = self._answer(line, headers, body)
        if fault == "slow":
            time.sleep(SLOW)
        if fault == "lost":
            _reset(client)
        elif fault in ("cut", "short"):
            client.sendall(answer[: len(answer) // 2])
            if fault == "cut":
                _reset(client)
        else:
            self._send(client, answer)

    def _answer(self, line: str, headers: dict[str, str], body: bytes) -> bytes:
        headers["connection"] = "close"
        with socket.create_connection(self._upstream) as server:
            text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            server.sendall(f"{line}\r\n{text}\r\n".encode("latin-1"))
            server.sendall(body)
            answer = bytearray()
            while more := server.recv(1 << 20):
                answer += more
        return bytes(answer)

    def _received(self, source: socket.socket, data: bytes, complete: Callable[[bytearray], bool]) -> bytes:
        """What comes until it is complete, or the other side has no more."""
        gathered = bytearray(data)
        while not complete(gathered) and (more := source.recv(1 << 20)):
            self._take(len(more))
            gathered += more
        return bytes(gathered)

    def _send(self, client: socket.socket, data: bytes) -> None:
        step = 1 << 18 if self._bandwidth else len(data)
        for start in range(0, len(data), step):
            self._take(min(step, len(data) - start))
            client.sendall(data[start : start + step])

    def _take(self, nbytes: int) -> None:
        """The time that so many bytes take on the line."""
        if self._bandwidth:
            time.sleep(nbytes / self._bandwidth)


def _refusal(fault: str, *, with_body: bool) -> bytes:
    status, code = _REFUSALS.get(fault) or fault.split()
    body = f"<Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
    head = f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + (body if with_body else b"")


def _reset(client: socket.socket) -> None:
    """Close with a reset in place of a polite end."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
