"""Fixtures for every test: a loopback S3 server, and fresh places on it."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

import ranks
from lowest import pytest_configure, pytest_runtest_makereport  # noqa: F401 - hooks, which pytest finds by name
from s3_server import S3Place, S3Server, running, running_weed
from shardckpt.commit import clearing


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with running() as server:
        yield server


@pytest.fixture(scope="session")
def s3_client(s3_server: S3Server) -> Any:
    return s3_server.client()


@pytest.fixture
def s3_place(s3_server: S3Server, s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> S3Place:
    """A fresh bucket, reachable with the options given and, through the environment, with none."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex}"
    s3_client.create_bucket(Bucket=bucket)
    return S3Place(f"s3://{bucket}/run", s3_server.storage_options, s3_client)


@pytest.fixture(scope="session")
def weed_server() -> Iterator[S3Server]:
    with running_weed() as server:
        yield server


@pytest.fixture
def weed_place(weed_server: S3Server) -> S3Place:
    """A fresh prefix in the one bucket of SeaweedFS that there is: each bucket takes volumes of its own from it."""
    return S3Place(f"s3://{weed_server.bucket}/{uuid.uuid4().hex}", weed_server.storage_options, weed_server.client())


@pytest.fixture
def s3_url(s3_place: S3Place) -> str:
    """The URL alone, for code that reads its credentials from the environment."""
    return s3_place.url


@pytest.fixture(scope="session", autouse=True)
def _stop_ranks() -> Iterator[None]:
    """The ranks' processes live until the session's end, and no longer."""
    yield
    ranks.stop_all()


@pytest.fixture
def no_lease_left() -> Iterator[None]:
    """Afterwards no save that the test cut off renews its marker."""
    yield
    for lease in clearing._leases.values():
        lease.release()
    clearing._leases.clear()
