"""A stand-in for an object store that is faster than its clients: S3's requests over sockets, objects in memory.

It checks no signature, makes no digest and keeps nothing; no real store on one machine takes uploads faster than the
MD5 of its ETags allows. Memory of removed objects is used again, since touching new memory would be what is measured.
"""

import itertools
import re
import socket
import sys
import threading
import time
from collections import defaultdict
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

Parts = list[memoryview]

STRIDE = 256 << 10
"""Bytes between two looks at the clock where a link is slow."""

_NUMBER = re.compile(rb"<PartNumber>(\d+)</PartNumber>")
_KEY = re.compile(rb"<Key>([^<]+)</Key>")


class Store:
    """Buckets of objects, each a list of parts."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.buckets: set[str] = set()
        self.objects: dict[str, tuple[str, Parts]] = {}
        self.uploads: dict[str, tuple[str, dict[int, memoryview]]] = {}
        self.numbers = itertools.count(1)
        self._free: defaultdict[int, list[bytearray]] = defaultdict(list)

    def memory(self, nbytes: int) -> memoryview:
        """Room for a body."""
        with self.lock:
            free = self._free[nbytes]
            buffer = free.pop() if free else None
        return memoryview(buffer if buffer is not None else bytearray(nbytes))

    def put(self, key: str, parts: Parts) -> str:
        tag = f'"{next(self.numbers)}"'
        with self.lock:
            self._forget(key)
            self.objects[key] = (tag, parts)
        return tag

    def delete(self, key: str) -> None:
        with self.lock:
            self._forget(key)

    def _forget(self, key: str) -> None:
        for part in self.objects.pop(key, ("", []))[1]:
            if isinstance(part.obj, bytearray):
                self._free[len(part.obj)].append(part.obj)


class Link(NamedTuple):
    """What stands between the clients and the server; 0 is nothing."""

    latency: float = 0.0
    """Seconds from a request's head to its answer."""
    cap: float = 0.0
    """Bytes a second of each connection, in each direction."""


class Pace:
    """Keeps what goes over a connection to so many bytes a second, from the first of a body on."""

    def __init__(self, cap: float) -> None:
        self._cap = cap
        self._due = time.perf_counter()

    def take(self, nbytes: int) -> None:
        if self._cap:
            self._due += nbytes / self._cap
            time.sleep(max(0.0, self._due - time.perf_counter()))


class Connection:
    """One client's requests, one after the other."""

    def __init__(self, client: socket.socket, store: Store, link: Link) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if link.cap:  # what the kernel takes in at once is not kept to any pace
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STRIDE)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STRIDE)
        self.client, self.store, self.link = client, store, link
        self.seen = b""

    def serve(self) -> None:
        with self.client:
            try:
                while self._one():
                    pass
            except OSError:
                pass  # the client has gone

    def _one(self) -> bool:
        while b"\r\n\r\n" not in self.seen:
            more = self.client.recv(1 << 16)
            if not more:
                return False
            self.seen += more
        head, _, self.seen = self.seen.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
        method, target, _ = line.split(" ")
        if headers.get("expect") == "100-continue":
            self.client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self._body(int(headers.get("content-length", "0")))
        if self.link.latency:
            time.sleep(self.link.latency)
        url = urlsplit(target)
        self._answer(method, unquote(url.path).lstrip("/"), parse_qs(url.query, keep_blank_values=True), headers, body)
        return True

    def _body(self, nbytes: int) -> memoryview:
        body = self.store.memory(nbytes)
        at = min(len(self.seen), nbytes)
        body[:at], self.seen = self.seen[:at], self.seen[at:]
        pace, most = Pace(self.link.cap), STRIDE if self.link.cap else nbytes
        while at < nbytes:
            got = self.client.recv_into(body[at:], min(most, nbytes - at))
            if not got:
                raise OSError("the client has gone in the middle of a body")
            at += got
            pace.take(got)
        return body

    def _answer(
        self, method: str, key: str, query: dict[str, list[str]], headers: dict[str, str], body: memoryview
    ) -> None:
        store = self.store
        if method == "PUT" and "partNumber" in query:
            store.uploads[query["uploadId"][0]][1][int(query["partNumber"][0])] = body
            self._say(200, tag=f'"{query["partNumber"][0]}"')
        elif method == "PUT" and "x-amz-copy-source" in headers:
            store.put(
                key, [memoryview(bytes(part)) for part in store.objects[unquote(headers["x-amz-copy-source"])][1]]
            )
            self._say(200, "<CopyObjectResult><ETag>1</ETag></CopyObjectResult>")
        elif method == "PUT" and "/" not in key.rstrip("/"):
            store.buckets.add(key.rstrip("/"))
            self._say(200)
        elif method == "PUT":
            self._put(key, headers, body)
        elif method == "POST" and "uploads" in query:
            upload = str(next(store.numbers))
            store.uploads[upload] = (key, {})
            self._say(
                200, f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            )
        elif method == "POST" and "uploadId" in query:
            parts = store.uploads.pop(query["uploadId"][0])[1]
            tag = store.put(key, [parts[int(number)] for number in _NUMBER.findall(body)])
            named = f"<Key>{escape(key)}</Key><ETag>{escape(tag)}</ETag>"
            self._say(200, f"<CompleteMultipartUploadResult>{named}</CompleteMultipartUploadResult>")
        elif method == "POST":
            keys = [found.decode() for found in _KEY.findall(body)]
            for found in keys:
                store.delete(f"{key.rstrip('/')}/{unescape(found)}")
            gone = "".join(f"<Deleted><Key>{found}</Key></Deleted>" for found in keys)
            self._say(200, f"<DeleteResult>{gone}</DeleteResult>")
        elif method == "DELETE":
            if "uploadId" in query:
                store.uploads.pop(query["uploadId"][0], None)
            store.delete(key)
            store.buckets.discard(key.rstrip("/"))
            self._say(204)
        elif "/" not in key.rstrip("/") and key.rstrip("/") not in store.buckets:
            self._say(
                404, "<Error><Code>NoSuchBucket</Code><Message>none</Message></Error>", with_body=method != "HEAD"
            )
        elif "/" not in key.rstrip("/"):
            self._list(key.rstrip("/"), query)
        elif key not in store.objects:
            self._say(404, "<Error><Code>NoSuchKey</Code><Message>none</Message></Error>", with_body=method != "HEAD")
        else:
            self._get(method, key, headers)

    def _put(self, key: str, headers: dict[str, str], body: memoryview) -> None:
        tag = self.store.objects.get(key, ("", []))[0]
        if ("if-none-match" in headers and tag) or headers.get("if-match", tag) != tag:
            self._say(412, "<Error><Code>PreconditionFailed</Code><Message>another</Message></Error>")
        else:
            self._say(200, tag=self.store.put(key, [body]))

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        before = f"{bucket}/{query.get('prefix', [''])[0]}"
        names = sorted(key[len(bucket) + 1 :] for key in list(self.store.objects) if key.startswith(before))
        below = len(before) - len(bucket) - 1
        is_flat = query.get("delimiter", [""])[0] == "/"
        found = [name for name in names if not (is_flat and "/" in name[below:])]
        folders = {name[: name.index("/", below) + 1] for name in names if is_flat and "/" in name[below:]}
        text = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>1</ETag>"
            f"<Size>{sum(map(len, self.store.objects[f'{bucket}/{name}'][1]))}</Size></Contents>"
            for name in found
        )
        text += "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders))
        head = f"<Name>{bucket}</Name><KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>"
        self._say(200, f"<ListBucketResult>{head}{text}</ListBucketResult>")

    def _get(self, method: str, key: str, headers: dict[str, str]) -> None:
        tag, parts = self.store.objects[key]
        size = sum(map(len, parts))
        first, last = 0, size - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        if asked:
            first, last = int(asked[1]), min(last, int(asked[2] or last))
            if first >= size:
                self._say(416, "<Error><Code>InvalidRange</Code><Message>beyond</Message></Error>")
                return
        extra = f"Content-Range: bytes {first}-{last}/{size}\r\n" if asked else ""
        extra += "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nAccept-Ranges: bytes\r\n"
        self._head(206 if asked else 200, last - first + 1, tag, extra)
        at, pace = 0, Pace(self.link.cap)
        for part in parts if method == "GET" else ():
            if at + len(part) > first and at <= last:
                self._send(part[max(0, first - at) : last + 1 - at], pace)
            at += len(part)

    def _send(self, data: memoryview, pace: Pace) -> None:
        stride = STRIDE if self.link.cap else len(data)
        for start in range(0, len(data), stride):
            pace.take(len(data[start : start + stride]))
            self.client.sendall(data[start : start + stride])

    def _say(self, status: int, text: str = "", *, tag: str = "", with_body: bool = True) -> None:
        body = text.encode()
        self._head(status, len(body), tag, "Content-Type: application/xml\r\n" if body else "")
        if body and with_body:
            self.client.sendall(body)

    def _head(self, status: int, nbytes: int, tag: str, extra: str) -> None:
        named = f"ETag: {tag}\r\n" if tag else ""
        self.client.sendall(f"HTTP/1.1 {status} Said\r\nContent-Length: {nbytes}\r\n{named}{extra}\r\n".encode())


def main() -> None:
    """Serve on the port of 127.0.0.1 that the command line names; the link's latency and cap may follow."""
    store, link = Store(), Link(*map(float, sys.argv[2:]))
    with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=256) as listener:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=Connection(client, store, link).serve, daemon=True).start()


if __name__ == "__main__":
    main()
