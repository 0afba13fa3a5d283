"""An S3 server for the length of a benchmark: a process of its own on a free port of 127.0.0.1."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 60.0
"""Until it has to listen."""


@contextmanager
def s3_server(latency: float = 0.0, cap: float = 0.0) -> Iterator[dict[str, str]]:
    """Yields the variables of the environment under which every AWS client uses it.

    ``latency`` is in seconds before each answer, ``cap`` in bytes a second of each connection; 0 is none.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.memory_server", str(port), str(latency), str(cap)]
    quiet = subprocess.DEVNULL
    root = Path(__file__).parent.parent
    server = subprocess.Popen(command, cwd=root, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        _wait_for(server, port)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.terminate()
        server.wait()


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the stand-in for S3 does not start")
