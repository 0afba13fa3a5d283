"""A small HTTP proxy on the loopback interface that stands before a real S3 server and misbehaves as it is told."""

import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from typing import Literal, Self

Fault = Literal["reset", "503", "501", "403", "lost", "cut"]
"""What may happen to a request.

``reset``: the connection is reset before the server hears of it. ``lost``: the server does its work, and the connection
is reset before its answer. ``cut``: the answer ends in the middle. The others are refusals with that status.
"""

Rule = Callable[[str, dict[str, str]], Fault | None]
"""Given the request's first line and its headers (names in lower case), says what happens to it."""

_CODES = {"503": "SlowDown", "501": "NotImplemented", "403": "AccessDenied"}


def sometimes(share: float, faults: tuple[Fault, ...] = ("reset", "503", "lost", "cut"), seed: int = 0) -> Rule:
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


class Proxy:
    """Passes requests on, one connection each, unless ``rule`` has a fault for them; a context manager."""

    def __init__(self, upstream: str, rule: Rule) -> None:
        host, port = upstream.removeprefix("http://").split(":")
        self._upstream = (host, int(port))
        self._rule = rule
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.seen: Counter[str] = Counter()
        """How often each fault has happened; "" is none."""

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
        head, _, body = _received(client, b"", lambda data: b"\r\n\r\n" in data).partition(b"\r\n\r\n")
        if not head:
            return
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
        fault = self._rule(line, headers)
        self.seen[fault or ""] += 1
        if fault == "reset":
            _reset(client)
            return
        if headers.pop("expect", "") == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if headers.get("transfer-encoding") == "chunked":
            body = _received(client, body, lambda data: data.endswith(b"\r\n\r\n"))
        else:
            length = int(headers.get("content-length", "0"))
            body = _received(client, body, lambda data: len(data) >= length)
        if fault in _CODES:
            client.sendall(_refusal(fault))
            return
        headers["connection"] = "close"
        with socket.create_connection(self._upstream) as server:
            text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            server.sendall(f"{line}\r\n{text}\r\n".encode("latin-1"))
            server.sendall(body)
            answer = _received(server, b"", lambda _: False)
        if fault == "lost":
            _reset(client)
            return
        client.sendall(answer[: len(answer) // 2] if fault == "cut" else answer)
        if fault == "cut":
            _reset(client)


def _refusal(fault: str) -> bytes:
    body = f"<Error><Code>{_CODES[fault]}</Code><Message>not now</Message></Error>".encode()
    head = f"HTTP/1.1 {fault} No\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _reset(client: socket.socket) -> None:
    """Close with a reset in place of a polite end."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def _received(source: socket.socket, data: bytes, complete: Callable[[bytearray], bool]) -> bytes:
    """What comes until it is complete, or the other side has no more."""
    gathered = bytearray(data)
    while not complete(gathered) and (more := source.recv(1 << 20)):
        gathered += more
    return bytes(gathered)
