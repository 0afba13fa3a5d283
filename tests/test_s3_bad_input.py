"""S3 that is not there, not S3, not ours, or not all of it: clear errors before a shard is sent, without secrets."""

import gc
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

import shardckpt
from s3_server import S3Place
from shardckpt import Checkpointer
from shardckpt.storage import BLOCK, opening, retry, s3_opening
from storage.proxy import Fault, Proxy

pytestmark = pytest.mark.s3

OLD = {"w": torch.arange(12.0), "step": 1}
KEY, SECRET, TOKEN = "AKIACANARYCANARY", "canary/secret+word", "canaryTokenToken=="
NO_SERVER = "http://127.0.0.1:9"


@pytest.fixture(params=["obstore", "s3fs"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs over both clients."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    if request.param == "s3fs":
        monkeypatch.setattr(s3_opening, "_reason_for_s3fs", lambda *_: "the test says so")
    return str(request.param)


def options(endpoint: str, **more: Any) -> dict[str, Any]:
    return {
        "key": KEY,
        "secret": SECRET,
        "token": TOKEN,
        "client_kwargs": {"endpoint_url": endpoint, "region_name": "us-east-1"},
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 2, "read_timeout": 2},
        **more,
    }


@contextmanager
def answering(answer: Callable[[str, dict[str, str]], tuple[int, dict[str, str], str]]) -> Iterator[str]:
    """A server of which ``answer``, given method and headers, is all that it says; yields its endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, text = answer(self.command, dict(self.headers))
            self.send_response(status)
            for name, value in {"Content-Type": "application/xml", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text.encode())

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815 - the names are http.server's

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def error_text(code: str, more: str = "") -> str:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>said the store</Message>{more}</Error>"


def attempts(url: str, given: dict[str, Any] | None) -> dict[str, Callable[[], Any]]:
    """What a user may do first of all."""
    return {
        "save": lambda: shardckpt.save(OLD, url, storage_options=given),
        "load": lambda: shardckpt.load(url, storage_options=given),
        "in place": lambda: shardckpt.load(url, dict(OLD), storage_options=given),
        "is_checkpoint": lambda: shardckpt.is_checkpoint(url, given),
        "latest": lambda: shardckpt.latest(url, given),
        "remove": lambda: Checkpointer(storage_options=given).remove(url),
    }


def names(place: S3Place) -> list[str]:
    return [item["Key"] for item in place.client.list_objects_v2(Bucket=place.bucket).get("Contents", [])]


@pytest.mark.parametrize("kind", ["page", "page not found", "no method", "empty"])
def test_a_server_that_is_no_store(client: str, kind: str) -> None:
    """An endpoint that is some other server is an error of the storage, whatever it says, never an empty place."""
    page, html = "<html><body>Welcome!</body></html>", {"Content-Type": "text/html"}
    answer = {
        "page": (200, html, page),
        "page not found": (404, html, page),
        "no method": (405, html, page),
        "empty": (200, {}, ""),
    }[kind]
    with answering(lambda *_: answer) as endpoint:
        told = attempts("s3://bucket/run/ck", options(endpoint))
        for what in ("save", "load", "in place"):
            with pytest.raises(shardckpt.ShardckptError, match="s3://bucket/run/ck"):
                told[what]()


def test_an_endpoint_that_nobody_knows(client: str) -> None:
    """A host name that is misspelt, and a server without TLS under https, are named as unreachable."""
    with answering(lambda *_: (200, {}, "")) as endpoint:
        for wrong in ("http://no-such-host.invalid:9000", endpoint.replace("http://", "https://")):
            with pytest.raises(shardckpt.StorageError, match="s3://bucket/run/ck.*reachable"):
                shardckpt.save(OLD, "s3://bucket/run/ck", storage_options=options(wrong))


@pytest.mark.parametrize(
    ("status", "code"), [(301, "PermanentRedirect"), (400, "AuthorizationHeaderMalformed"), (307, "TemporaryRedirect")]
)
def test_wrong_region(client: str, status: int, code: str) -> None:
    """A bucket of another region is an error that says where to name the region."""
    with answering(lambda *_: (status, {"x-amz-bucket-region": "eu-west-1"}, error_text(code))) as endpoint:
        told = attempts("s3://bucket/run/ck", options(endpoint))
        for what in ("save", "load", "in place", "latest"):
            with pytest.raises(shardckpt.ShardckptError, match="s3://bucket/run/ck.*region_name"):
                told[what]()


@pytest.mark.parametrize("word", ["list-type=2", "PUT /"], ids=["no list", "read-only"])
def test_missing_permission(client: str, s3_place: S3Place, word: str) -> None:
    """Keys that may not list, or not write, fail a save before it has changed anything; what is there still loads."""
    url = f"{s3_place.url}/ck"
    shardckpt.save(OLD, url, storage_options=s3_place.storage_options)
    before = names(s3_place)

    def rule(line: str, headers: dict[str, str]) -> Fault | None:
        return "403" if word in line else None

    with Proxy(s3_place.storage_options["client_kwargs"]["endpoint_url"], rule) as proxy:
        given = {**s3_place.storage_options, "client_kwargs": {"endpoint_url": proxy.endpoint}}
        for where in (url, f"{s3_place.url}/new"):
            with pytest.raises(shardckpt.StorageAccessError, match=rf"{where}.*AccessDenied.*permissions"):
                shardckpt.save(OLD, where, storage_options=given)
        assert names(s3_place) == before
        assert shardckpt.is_checkpoint(url, given)
        assert shardckpt.load(url, storage_options=given)["step"] == 1


def test_a_store_that_takes_no_parts(client: str, s3_place: S3Place) -> None:
    """Where there are no uploads in parts, a save of more than a block fails, says why, and leaves nothing."""
    url = f"{s3_place.url}/ck"

    def rule(line: str, headers: dict[str, str]) -> Fault | None:
        return "501" if "?uploads" in line else None

    with Proxy(s3_place.storage_options["client_kwargs"]["endpoint_url"], rule) as proxy:
        given = {**s3_place.storage_options, "client_kwargs": {"endpoint_url": proxy.endpoint}}
        shardckpt.save(OLD, url, storage_options=given)
        before = names(s3_place)
        large = {"w": torch.ones(BLOCK // 2), "step": 2}
        with pytest.raises(shardckpt.SaveFailedError, match=r"\(NotImplemented\).*in parts"):
            shardckpt.save(large, url, storage_options=given)
        assert names(s3_place) == before
        assert shardckpt.load(url, storage_options=given)["step"] == 1


@pytest.mark.parametrize("path", ["", "/", "/a b/ü+é%20=1/x#y?z", "/日本 語/step=1.ckpt"])
def test_odd_places(client: str, s3_place: S3Place, path: str) -> None:
    """A bucket without a key, blanks and any script work from the save to the removal."""
    root = f"s3://{s3_place.bucket}{path}"
    given = s3_place.storage_options
    shardckpt.save(OLD, root, storage_options=given)
    assert shardckpt.is_checkpoint(root, given)
    assert shardckpt.load(root, storage_options=given)["step"] == 1
    below = root.rstrip("/") + "/be low"
    shardckpt.save(OLD, below, storage_options=given)
    assert shardckpt.latest(root, given) == below
    for place in (below, root):
        Checkpointer(storage_options=given).remove(place)
    assert names(s3_place) == []


def test_no_credentials(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any credentials, half of some, or a profile that nobody has, each call says so and asks nobody."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    nothing = {"endpoint_url": NO_SERVER, "skip_instance_cache": True}
    for attempt in attempts("s3://bucket/run/ck", nothing).values():
        with pytest.raises(shardckpt.StorageAccessError, match="credentials"):
            attempt()
    for given, words in (({"profile": "nobody"}, "nobody"), ({"key": "k"}, "without a secret")):
        with pytest.raises(shardckpt.UsageError, match=words):
            shardckpt.save(OLD, "s3://bucket/run/ck", storage_options={**nothing, **given})


# -- the canary -----------------------------------------------------------------------------------------------------


def shown(error: BaseException) -> str:
    """All that a traceback, a debugger or a pickle would show of an error and of those that led to it."""
    texts = ["".join(traceback.format_exception(error))]
    ahead: list[BaseException | None] = [error]
    while ahead:
        link = ahead.pop()
        if link is not None and len(texts) < 50:
            texts += [str(link), repr(link), repr(vars(link)), repr(link.args)]
            ahead += [link.__cause__, link.__context__]
    return "\n".join(texts)


QUOTES = f"<AWSAccessKeyId>{KEY}</AWSAccessKeyId><Token-0>{TOKEN}</Token-0><StringToSign>{SECRET}</StringToSign>"


@pytest.mark.parametrize("told", ["options", "environment", "profile"])
@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "InvalidAccessKeyId"), (400, "ExpiredToken"), (503, "SlowDown"), (404, "NoSuchBucket"), (418, "Teapot")],
)
def test_no_error_holds_a_secret(
    client: str,
    told: str,
    status: int,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Any,
) -> None:
    """A store that quotes keys and tokens in its answers gets them into no message, chain of errors, log or repr."""
    caplog.set_level(logging.DEBUG, "shardckpt")
    text = error_text(code, QUOTES).replace("said the store", f"{KEY} {SECRET} {TOKEN} said the store")
    with answering(lambda *_: (status, {}, text)) as endpoint:
        url, given = "s3://bucket/run/ck", options(endpoint)
        if told != "options":
            for name in ("key", "secret", "token"):
                del given[name]
        if told == "profile":
            text_of = f"[lab]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\naws_session_token={TOKEN}\n"
            (tmp_path / "credentials").write_text(text_of)
            monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
            given["profile"] = "lab"
        elif told == "environment":
            for name, word in (("ACCESS_KEY_ID", KEY), ("SECRET_ACCESS_KEY", SECRET), ("SESSION_TOKEN", TOKEN)):
                monkeypatch.setenv(f"AWS_{name}", word)
        storage = opening.open_storage(url, given)
        writer = storage.create("rank", 3 * BLOCK)
        calls = {
            **attempts(url, given),
            "put": lambda: storage.put("a", b"1", replace=True),
            "create": lambda: storage.put("a", b"1", replace=False),
            "swap": lambda: storage.put("a", b"1", replace=b"0"),
            "read": lambda: storage.read_into("a", 0, memoryview(bytearray(9))),
            "size": lambda: storage.size("a"),
            "delete": lambda: storage.delete(["a"]),
            "uploads": lambda: storage.uploads() or pytest.skip("there is no s3fs"),  # type: ignore[attr-defined]
            "write": lambda: [writer.write(at, memoryview(bytearray(BLOCK))) for at in range(0, 3 * BLOCK, BLOCK)],
        }
        failed = set()
        for what, call in calls.items():
            try:
                call()
            except shardckpt.ShardckptError as error:
                failed.add(what)
                told_of_it = shown(error)
                assert not any(word in told_of_it for word in (KEY, SECRET, TOKEN)), what
        assert failed >= calls.keys() - {"is_checkpoint", "delete", "remove"}  # for these what is missing is no error
        writer.abort()
    said = [f"{record.getMessage()} {record.args!r}" for record in caplog.records if "shardckpt" in record.name]
    for word in (KEY, SECRET, TOKEN):
        assert word not in f"{said} {storage!r} {storage.url}"


@pytest.mark.parametrize("url", [f"s3://{KEY}:{SECRET}@bucket/x", f"s3://{KEY}@bucket", "s3://host:9000/bucket/x"])
def test_no_credentials_in_a_url(client: str, url: str) -> None:
    """A URL with credentials or a server in it is an error that shows neither, and says where they belong."""
    for attempt in attempts(url, None).values():
        with pytest.raises(shardckpt.UsageError, match="no credentials, and no server.*storage_options") as caught:
            attempt()
        text = shown(caught.value)
        assert not any(word in text for word in (KEY, SECRET))


def test_no_checkpoint_holds_a_secret(client: str, s3_place: S3Place, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that a save stores, logs or reports has the keys in it, and nothing that stays in memory shows them."""
    caplog.set_level(logging.DEBUG)
    for name in ("botocore", "aiobotocore"):  # they log their own work, with what they sign
        caplog.set_level(logging.INFO, name)
    given = {**s3_place.storage_options, "key": KEY, "secret": SECRET, "token": TOKEN}
    engine = Checkpointer(storage_options=given)
    report = engine.save(OLD, f"{s3_place.url}/ck")
    loaded = engine.load(f"{s3_place.url}/ck", dict(OLD))
    stored = [s3_place.client.get_object(Bucket=s3_place.bucket, Key=key)["Body"].read() for key in names(s3_place)]
    ours = [repr(thing) for thing in gc.get_objects() if str(type(thing).__module__).startswith("shardckpt.storage")]
    everything = f"{report!r} {loaded!r} {engine!r} {stored!r} {ours!r} {caplog.text}"
    assert len(stored) == 3
    for word in (KEY, SECRET, TOKEN):
        assert word not in everything
