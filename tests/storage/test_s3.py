"""S3 through s3fs, against a real HTTP server on the loopback interface."""

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

from s3_server import S3Place, free_port
from shardckpt.errors import (
    ObjectNotFoundError,
    ShardckptError,
    StorageAccessError,
    StorageError,
    UsageError,
)
from shardckpt.storage import BLOCK, Storage, open_storage, retry
from storage.conformance import StorageConformance, noise, pieces, store

pytestmark = pytest.mark.s3


class TestS3(StorageConformance):
    @pytest.fixture(autouse=True)
    def root(self, s3_place: S3Place) -> None:
        self.place = s3_place

    def key(self, name: str, place: str) -> str:
        return f"run/{place}/{name}"

    def open(self, place: str = "step=10.ckpt") -> Storage:
        return open_storage(f"{self.place.url}/{place}", self.place.storage_options)

    def peek(self, name: str, place: str = "step=10.ckpt") -> bytes | None:
        client = self.place.client
        try:
            return bytes(client.get_object(Bucket=self.place.bucket, Key=self.key(name, place))["Body"].read())
        except client.exceptions.NoSuchKey:
            return None

    def poke(self, name: str, data: bytes, place: str = "step=10.ckpt") -> None:
        self.place.client.put_object(Bucket=self.place.bucket, Key=self.key(name, place), Body=data)

    def names(self, place: str = "step=10.ckpt") -> set[str]:
        prefix = self.key("", place)
        answer = self.place.client.list_objects_v2(Bucket=self.place.bucket, Prefix=prefix)
        return {item["Key"][len(prefix) :] for item in answer.get("Contents", ())}

    @pytest.fixture(autouse=True)
    def no_uploads_left(self, root: None) -> Iterator[None]:
        """No test, failed saves included, leaves an unfinished upload: its parts would be paid for, unseen."""
        yield
        assert "Uploads" not in self.place.client.list_multipart_uploads(Bucket=self.place.bucket)


def keys(place: S3Place) -> list[str]:
    answer = place.client.list_objects_v2(Bucket=place.bucket)
    return [item["Key"] for item in answer.get("Contents", ())]


def test_options_from_environment(s3_url: str, s3_place: S3Place) -> None:
    """No storage_options are needed where the environment says everything, as on a cluster."""
    open_storage(s3_url).put("manifest.json", b"{}", replace=True)
    assert keys(s3_place) == ["run/manifest.json"]


def test_bucket_root(s3_place: S3Place) -> None:
    """A whole bucket is a place too, with or without a slash; and a URL without a bucket is none."""
    for url in (f"s3://{s3_place.bucket}", f"s3://{s3_place.bucket}/", f"s3a://{s3_place.bucket}"):
        storage = open_storage(url, s3_place.storage_options)
        storage.prepare()
        storage.put("a", b"1", replace=True)
        storage.remove_place()
        assert [stat.name for stat in storage.list()] == ["a"]
    assert keys(s3_place) == ["a"]
    with pytest.raises(UsageError, match="bucket"):
        open_storage("s3://", s3_place.storage_options)


def test_small_object_is_one_put(s3_place: S3Place) -> None:
    """An object of one block costs one request; only larger ones are uploads of several parts."""
    storage = open_storage(s3_place.url, s3_place.storage_options)
    store(storage, "small", noise(BLOCK))
    store(storage, "large", noise(BLOCK + 1))
    etags = {
        name: s3_place.client.head_object(Bucket=s3_place.bucket, Key=f"run/{name}")["ETag"]
        for name in ("small", "large")
    }
    assert "-" not in etags["small"]
    assert etags["large"].strip('"').endswith("-2")


def test_parts_are_merged(s3_place: S3Place) -> None:
    """An object of more than 10,000 blocks is uploaded in parts of several blocks each, in whatever order they come."""
    storage = open_storage(s3_place.url, s3_place.storage_options)
    data = noise(4 * BLOCK + 10)
    writer: Any = storage.create("rank", 2 * 10_000 * BLOCK)
    work = pieces(data)
    for index in (3, 4, 0, 2, 1):
        writer.write(*work[index])
    assert set(writer._held) == {2}
    writer.commit()
    head = s3_place.client.head_object(Bucket=s3_place.bucket, Key="run/rank")
    assert head["ETag"].strip('"').endswith("-3")
    assert s3_place.client.get_object(Bucket=s3_place.bucket, Key="run/rank")["Body"].read() == data


def test_more_parts_than_s3_takes(s3_place: S3Place) -> None:
    """An object that outgrows 10,000 parts since nobody said how large it would be is an error that explains it."""
    writer = open_storage(s3_place.url, s3_place.storage_options).create("rank", 0)
    with pytest.raises(StorageError, match="larger than it was announced"):
        writer.write(10_000 * BLOCK, memoryview(b"x"))
    writer.abort()


def test_invisible_until_commit(s3_place: S3Place) -> None:
    """Readers see nothing of an object while it is being uploaded."""
    storage = open_storage(s3_place.url, s3_place.storage_options)
    writer = storage.create("rank", 2 * BLOCK)
    writer.write(0, memoryview(bytearray(BLOCK)))
    assert storage.list() == []
    with pytest.raises(ObjectNotFoundError):
        storage.size("rank")
    writer.abort()


def test_other_instances_forget(s3_place: S3Place) -> None:
    """A file system that Lightning holds, made with other options than ours, sees our saves and removals at once."""
    storage = open_storage(f"{s3_place.url}/step=1.ckpt", s3_place.storage_options)
    theirs = fsspec.filesystem("s3")
    for _ in range(2):
        assert not theirs.exists(f"{s3_place.bucket}/run/step=1.ckpt")
        theirs.find(s3_place.bucket)
        storage.put("manifest.json", b"{}", replace=True)
        assert theirs.ls(f"{s3_place.bucket}/run") == [f"{s3_place.bucket}/run/step=1.ckpt"]
        assert theirs.exists(f"{s3_place.bucket}/run/step=1.ckpt")
        store(storage, "rank", noise(10))
        assert len(theirs.ls(f"{s3_place.bucket}/run/step=1.ckpt")) == 2
        storage.delete(["manifest.json", "rank"])


def test_directory_markers(s3_place: S3Place) -> None:
    """The empty objects with which consoles mark a directory are no objects of ours, and go with the place."""
    s3_place.client.put_object(Bucket=s3_place.bucket, Key="run/step=1.ckpt/", Body=b"")
    root = open_storage(s3_place.url, s3_place.storage_options)
    storage = open_storage(f"{s3_place.url}/step=1.ckpt", s3_place.storage_options)
    assert storage.list() == []
    assert root.children() == ["step=1.ckpt"]
    storage.remove_place()
    assert root.children() == []


def test_many_objects(s3_place: S3Place) -> None:
    """Listing and removal go on beyond the thousand names of one request."""
    names = [f"rank-{number:05}" for number in range(1005)]
    storage = open_storage(s3_place.url, s3_place.storage_options)
    for name in names:
        s3_place.client.put_object(Bucket=s3_place.bucket, Key=f"run/{name}", Body=b"")
    assert [stat.name for stat in storage.list()] == names
    storage.delete(names)
    assert keys(s3_place) == []


def test_copy_on_the_server(s3_place: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An alias on the same store moves no bytes through this process."""
    source = open_storage(f"{s3_place.url}/a", s3_place.storage_options)
    target = open_storage(f"{s3_place.url}/b", s3_place.storage_options)
    store(source, "rank", noise(1000))
    monkeypatch.setattr(type(source), "read_into", None)
    target.copy_from(source, ["rank"])
    assert target.get("rank") == noise(1000)


def test_no_bucket(s3_place: S3Place) -> None:
    """A misspelt bucket is an error when a save or a search begins, and not an empty place."""
    storage = open_storage("s3://no-such-bucket-here/run", s3_place.storage_options)
    for attempt in (storage.prepare, storage.list, lambda: storage.get("manifest.json")):
        with pytest.raises(ObjectNotFoundError, match="bucket"):
            attempt()


def test_bad_bucket_name(s3_place: S3Place) -> None:
    """A bucket name that no request can carry is an error about the call."""
    with pytest.raises(UsageError, match="Not A Bucket"):
        open_storage("s3://Not A Bucket!/run", s3_place.storage_options).prepare()


def test_no_credentials(s3_place: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing credentials are a StorageAccessError that says so, before anything is saved."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    storage = open_storage(s3_place.url, {"skip_instance_cache": True, "default_block_size": 5_000_001})
    with pytest.raises(StorageAccessError, match="credentials"):
        storage.prepare()


def test_messages_hold_no_credentials(s3_place: S3Place) -> None:
    """No message of ours shows a key, however the backend words its error, nor does a storage's URL."""
    options = {**s3_place.storage_options, "key": "AKIAVERYSECRET", "secret": "hush-hush-hush"}
    storage = open_storage("s3://no-such-bucket-here/run", options)
    with pytest.raises(ShardckptError) as caught:
        storage.prepare()
    for text in (str(caught.value), repr(storage), storage.url):
        assert "AKIAVERYSECRET" not in text
        assert "hush" not in text


def test_nobody_there(s3_place: S3Place) -> None:
    """An endpoint that does not answer is a StorageError in bounded time, not an endless wait."""
    options = {
        "key": "k",
        "secret": "s",
        "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{free_port()}"},
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 2},
    }
    with pytest.raises(StorageError, match="reachable"):
        open_storage("s3://bucket/run", options).prepare()


class Grumpy(threading.Thread):
    """A proxy before the real server that resets or turns away the first ``count`` requests that contain ``word``."""

    def __init__(self, upstream: str, word: bytes, count: int, answer: bytes | None) -> None:
        super().__init__(daemon=True)
        host, port = upstream.removeprefix("http://").split(":")
        self.upstream = (host, int(port))
        self.word = word
        self.left = count
        self.answer = answer
        self.hits = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.upstream) as server:
            replies = threading.Thread(target=self.pump, args=(server, client), daemon=True)
            replies.start()
            while data := self.received(client):
                if self.word in data.split(b"\r\n", 1)[0] and self.left > 0:
                    self.left -= 1
                    self.hits += 1
                    if self.answer:
                        client.sendall(self.answer)
                    break
                server.sendall(data)
            for end in (client, server):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
            replies.join(timeout=5)

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := self.received(source):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def received(self, source: socket.socket) -> bytes:
        try:
            return source.recv(1 << 20)
        except OSError:
            return b""


_BODY = b"<Error><Code>ServiceUnavailable</Code><Message>not now</Message></Error>"
UNAVAILABLE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


@pytest.mark.parametrize("answer", [None, UNAVAILABLE], ids=["reset", "503"])
@pytest.mark.parametrize("word", [b"partNumber=2", b"GET /"], ids=["upload", "download"])
def test_retries(s3_place: S3Place, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, word: bytes) -> None:
    """A part or a range whose request is reset or turned away a few times gets through."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    proxy = Grumpy(s3_place.storage_options["client_kwargs"]["endpoint_url"], word, 3, answer)
    proxy.start()
    try:
        options = {
            **s3_place.storage_options,
            "client_kwargs": {"endpoint_url": proxy.endpoint},
            "config_kwargs": {"retries": {"max_attempts": 0}},
        }
        storage = open_storage(s3_place.url, options)
        data = noise(2 * BLOCK + 5)
        store(storage, "rank", data)
        into = bytearray(len(data))
        storage.read_into("rank", 0, memoryview(into))
        assert into == data
        assert proxy.hits == 3
    finally:
        proxy.listener.close()


def test_unfinished_upload_is_cancelled(s3_place: S3Place) -> None:
    """A save that fails in the middle cancels its upload on the server, where it would cost money for ever."""
    writer = open_storage(s3_place.url, s3_place.storage_options).create("rank", 3 * BLOCK)
    for piece in pieces(noise(3 * BLOCK))[:2]:
        writer.write(*piece)
    assert len(s3_place.client.list_multipart_uploads(Bucket=s3_place.bucket)["Uploads"]) == 1
    writer.abort()
    assert "Uploads" not in s3_place.client.list_multipart_uploads(Bucket=s3_place.bucket)


def test_abort_never_raises(s3_place: S3Place, caplog: pytest.LogCaptureFixture) -> None:
    """An abort that fails, as after the network has gone, warns of the parts left behind and raises nothing."""
    writer: Any = open_storage(s3_place.url, s3_place.storage_options).create("rank", 3 * BLOCK)
    writer.write(*pieces(noise(3 * BLOCK))[0])
    s3_place.client.abort_multipart_upload(Bucket=s3_place.bucket, Key="run/rank", UploadId=writer._upload)
    writer.abort()
    assert "could not be cancelled" in caplog.text
    assert "cost money" in caplog.text


def test_lost_answer_to_complete(s3_place: S3Place) -> None:
    """An upload that was completed by a request whose answer got lost counts as completed the second time."""
    writer: Any = open_storage(s3_place.url, s3_place.storage_options).create("rank", 2 * BLOCK)
    data = noise(2 * BLOCK)
    for piece in pieces(data):
        writer.write(*piece)
    parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(writer._etags.items())]
    s3_place.client.complete_multipart_upload(
        Bucket=s3_place.bucket, Key="run/rank", UploadId=writer._upload, MultipartUpload={"Parts": parts}
    )
    writer.commit()
    assert s3_place.client.get_object(Bucket=s3_place.bucket, Key="run/rank")["Body"].read() == data


def test_upload_lost(s3_place: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that the server has dropped, as a lifecycle rule may, is an error and not an empty success."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    options = {**s3_place.storage_options, "config_kwargs": {"retries": {"max_attempts": 0}}}
    writer: Any = open_storage(s3_place.url, options).create("rank", 2 * BLOCK)
    for piece in pieces(noise(2 * BLOCK)):
        writer.write(*piece)
    s3_place.client.abort_multipart_upload(Bucket=s3_place.bucket, Key="run/rank", UploadId=writer._upload)
    # S3 says NoSuchUpload, the server of the tests has an internal error.
    with pytest.raises(StorageError, match=r"cannot commit .*rank"):
        writer.commit()
    writer.abort()


def _child(storage: Storage, url: str, options: dict[str, Any], answers: Any) -> None:
    try:
        storage.get("manifest.json")
        answers.send("no error")
    except UsageError as error:
        answers.send(str(error))
    answers.send(open_storage(url, options).get("manifest.json"))
    os._exit(0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork(s3_place: S3Place) -> None:
    """In a forked child the parent's connection is refused with a word on what to do; a new one works."""
    storage = open_storage(s3_place.url, s3_place.storage_options)
    storage.put("manifest.json", b"{}", replace=True)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(storage, s3_place.url, s3_place.storage_options, theirs)
    )
    process.start()
    try:
        assert ours.poll(30)
        assert "spawn" in ours.recv()
        assert ours.poll(30)
        assert ours.recv() == b"{}"
    finally:
        process.kill()
        process.join()


def test_missing_s3fs() -> None:
    """Without s3fs an S3 URL says which extra to install."""
    program = """
import sys
sys.modules["s3fs"] = None
from shardckpt.errors import UsageError
from shardckpt.storage import open_storage
try:
    open_storage("s3://bucket/x")
except UsageError as error:
    assert 'pip install "shardckpt[s3]"' in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
