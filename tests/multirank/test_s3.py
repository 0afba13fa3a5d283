"""The life of checkpoints on an S3 server, with two processes that share nothing else."""

import pytest

import ranks
from multirank import s3_cases
from s3_server import S3Place, S3Server
from storage.proxy import Proxy, sometimes

pytestmark = [pytest.mark.multiprocess, pytest.mark.s3]


def keys(place: S3Place) -> list[str]:
    """What is in the bucket."""
    return [item["Key"] for item in place.client.list_objects_v2(Bucket=place.bucket).get("Contents", [])]


@pytest.mark.parametrize("compression", (None, "zstd"))
@pytest.mark.parametrize("told", ("storage_options", "environment"))
def test_whole_life_on_s3(s3_server: S3Server, s3_place: S3Place, told: str, compression: str | None) -> None:
    """Two ranks save, overwrite, share shards, restore bitwise, read one tensor and remove, told either way where."""
    options = s3_place.storage_options if told == "storage_options" else None
    environment = s3_server.environment if told == "environment" else {}
    args = (s3_place.url, options, environment, compression)
    for said in ranks.world(2).run(s3_cases.whole_life, *args):
        (first, nbytes), (second, shared) = said["reports"]
        assert (first, second) == (False, True)
        assert nbytes == shared
        assert said["latest"] == f"{s3_place.url}/b"
        assert said["left"] == [False, True]
        assert said["restored"] == said["digest"]
        assert said["step"] == 3
        assert said["skipped"] == ["big"]
        assert said["big"] == (5 << 20, 0.0)
    names = [key.removeprefix("run/") for key in keys(s3_place)]
    assert {name.partition("/")[0] for name in names} == {"b"}
    assert sorted(name.rpartition(".")[2] for name in names) == ["json", "json", "json", "safetensors", "safetensors"]
    uploads = s3_place.client.list_multipart_uploads(Bucket=s3_place.bucket)
    assert not uploads.get("Uploads")


def test_replicas_are_read_once_or_by_each(s3_place: S3Place) -> None:
    """What both ranks want comes from the store once if they share and twice if not; so little is not worth a trial."""
    by_rank = ranks.world(2).run(s3_cases.replicas, s3_place.url, s3_place.storage_options)
    assert all(right for said in by_rank for right, _, _ in said)
    nbytes = 12 << 20
    (shared, received), (alone, none), (little, too) = (
        tuple(map(sum, zip(*(said[way][1:] for said in by_rank), strict=True))) for way in range(3)
    )
    assert nbytes <= shared < 1.2 * nbytes
    assert received >= 0.8 * nbytes
    assert min(alone, little) >= 2 * nbytes
    assert none == too == 0


def test_one_ranks_failed_upload_is_every_ranks(s3_place: S3Place) -> None:
    """An upload that fails on one rank fails the save on all, leaves nothing of it, and the old checkpoint loads."""
    for rank, said in enumerate(ranks.world(2).run(s3_cases.failing_upload, s3_place.url, s3_place.storage_options)):
        assert said.startswith("9.0: ")
        assert "NoSuchBucket" in said
        assert rank == 1 or "rank 1" in said
    assert len(keys(s3_place)) == 5


@pytest.mark.parametrize("engine", ("obstore", "s3fs"))
def test_one_request_in_ten_fails(s3_place: S3Place, engine: str) -> None:
    """Whatever happens to a tenth of all requests, saves and loads of two ranks finish and are bitwise right."""
    server = s3_place.storage_options["client_kwargs"]["endpoint_url"]
    with Proxy(server, sometimes(0.1, seed=5)) as proxy:
        options = {**s3_place.storage_options, "client_kwargs": {"endpoint_url": proxy.endpoint}}
        if engine == "s3fs":
            options["s3_additional_kwargs"] = {"ContentType": "x"}  # nothing that obstore could be told
        for said in ranks.world(2).run(s3_cases.whole_life, s3_place.url, options, {}, None):
            assert said["restored"] == said["digest"]
            assert said["latest"] == f"{s3_place.url}/b"
            assert said["left"] == [False, True]
            assert said["big"] == (5 << 20, 0.0)
        assert sum(proxy.seen.values()) - proxy.seen[""] >= 10
    assert len(keys(s3_place)) == 5
    assert not s3_place.client.list_multipart_uploads(Bucket=s3_place.bucket).get("Uploads")
