"""A real S3 server on the loopback interface, for tests: ``moto_server`` as a process of its own."""

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

START_SECONDS = 30.0


class S3Server(NamedTuple):
    """A running server and how to reach it."""

    endpoint: str
    pid: int

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
    """A fresh bucket."""

    url: str
    """``s3://bucket/run``; the bucket is there and empty."""
    storage_options: dict[str, Any]
    """What ``open_storage`` and fsspec need; the environment says the same, so they may be left out."""
    client: Any
    """A boto3 client, to look at the server past the code under test."""

    @property
    def bucket(self) -> str:
        return self.url.split("/")[2]


@contextmanager
def running() -> Iterator[S3Server]:
    """Start a server on a free port of 127.0.0.1, wait until it answers, and stop it at the end."""
    with tempfile.TemporaryFile() as log:
        process, endpoint = _started(log)
        try:
            yield S3Server(endpoint, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _started(log: IO[bytes]) -> tuple[subprocess.Popen[bytes], str]:
    for _ in range(3):
        port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        endpoint = f"http://127.0.0.1:{port}"
        if _answers(process, f"{endpoint}/moto-api/"):
            return process, endpoint
        # Somebody else may have taken the port between the probe and the start.
        process.kill()
        process.wait()
    log.seek(0)
    raise RuntimeError(f"moto_server does not start: {log.read().decode(errors='replace')[-2000:]}")


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
