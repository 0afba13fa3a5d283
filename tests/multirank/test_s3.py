"""The life of checkpoints on S3 servers, with two processes that share nothing else."""

import pytest

import ranks
from multirank import s3_cases
from s3_server import S3Place, S3Server
from storage.proxy import Proxy, sometimes

pytestmark = [pytest.mark.multiprocess, pytest.mark.s3]


def keys(place: S3Place) -> list[str]:
    """What is at a place, named from there."""
    listed = place.client.list_objects_v2(Bucket=place.bucket, Prefix=place.prefix).get("Contents", [])
    return [item["Key"].removeprefix(place.prefix) for item in listed]


def unfinished(place: S3Place) -> list[str]:
    """Uploads that nobody has ended."""
    listed = place.client.list_multipart_uploads(Bucket=place.bucket, Prefix=place.prefix).get("Uploads", [])
    return [item["Key"] for item in listed]


@pytest.fixture(params=["moto", "weed"])
def server(request: pytest.FixtureRequest) -> S3Server:
    """Each of two servers that agree in little but the protocol."""
    found: S3Server = request.getfixturevalue({"moto": "s3_server", "weed": "weed_server"}[request.param])
    return found


@pytest.fixture
def place(request: pytest.FixtureRequest, server: S3Server) -> S3Place:
    """A fresh place on that server."""
    found: S3Place = request.getfixturevalue("weed_place" if server.bucket else "s3_place")
    return found


@pytest.mark.parametrize("compression", (None, "zstd"))
@pytest.mark.parametrize("told", ("storage_options", "environment"))
def test_whole_life_on_s3(server: S3Server, place: S3Place, told: str, compression: str | None) -> None:
    """Two ranks save, overwrite, share shards, restore bitwise, read one tensor and remove, told either way where."""
    options = place.storage_options if told == "storage_options" else None
    environment = server.environment if told == "environment" else {}
    args = (place.url, options, environment, compression)
    for said in ranks.world(2).run(s3_cases.whole_life, *args):
        (first, nbytes), (second, shared) = said["reports"]
        assert (first, second) == (False, True)
        assert nbytes == shared
        assert said["latest"] == f"{place.url}/b"
        assert said["left"] == [False, True]
        assert said["restored"] == said["digest"]
        assert said["step"] == 3
        assert said["skipped"] == ["big"]
        assert said["big"] == (5 << 20, 0.0)
    names = keys(place)
    assert {name.partition("/")[0] for name in names} == {"b"}
    assert sorted(name.rpartition(".")[2] for name in names) == ["json", "json", "json", "safetensors", "safetensors"]
    assert not unfinished(place)


def test_replicas_are_read_once_or_by_each(place: S3Place) -> None:
    """What both ranks want comes from the store once if they share and twice if not; so little is not worth a trial."""
    by_rank = ranks.world(2).run(s3_cases.replicas, place.url, place.storage_options)
    assert all(right for said in by_rank for right, _, _ in said)
    nbytes = 12 << 20
    (shared, received), (alone, none), (little, too) = (
        tuple(map(sum, zip(*(said[way][1:] for said in by_rank), strict=True))) for way in range(3)
    )
    assert nbytes <= shared < 1.2 * nbytes
    assert received >= 0.8 * nbytes
    assert min(alone, little) >= 2 * nbytes
    assert none == too == 0


def test_one_ranks_failed_upload_is_every_ranks(place: S3Place) -> None:
    """An upload that fails on one rank fails the save on all, leaves nothing of it, and the old checkpoint loads."""
    for rank, said in enumerate(ranks.world(2).run(s3_cases.failing_upload, place.url, place.storage_options)):
        assert said.startswith("9.0: ")
        assert "NoSuchBucket" in said
        assert rank == 1 or "rank 1" in said
    assert len(keys(place)) == 5


@pytest.mark.parametrize("engine", ("obstore", "s3fs"))
def test_one_request_in_ten_fails(place: S3Place, engine: str) -> None:
    """Whatever happens to a tenth of all requests, saves and loads of two ranks finish and are bitwise right."""
    with Proxy(place.storage_options["client_kwargs"]["endpoint_url"], sometimes(0.1, seed=5)) as proxy:
        options = {**place.storage_options, "client_kwargs": {"endpoint_url": proxy.endpoint}}
        if engine == "s3fs":
            options["s3_additional_kwargs"] = {"ContentType": "x"}  # nothing that obstore could be told
        for said in ranks.world(2).run(s3_cases.whole_life, place.url, options, {}, None):
            assert said["restored"] == said["digest"]
            assert said["latest"] == f"{place.url}/b"
            assert said["left"] == [False, True]
            assert said["big"] == (5 << 20, 0.0)
        assert sum(proxy.seen.values()) - proxy.seen[""] >= 10
    assert len(keys(place)) == 5
    assert not unfinished(place)
