"""Google's and Microsoft's stores: the options of gcsfs and adlfs in the words of obstore, and what cannot be said."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s3_server import S3Place
from shardckpt.errors import ObjectExistsError, ObjectNotFoundError, UsageError
from shardckpt.storage import BLOCK, cloud_opening, cloud_options, open_storage
from shardckpt.storage.objects import ObjectStorage
from shardckpt.storage.s3_options import UntranslatableError
from storage.conformance import noise, store
from storage.proxy import Proxy

ACCOUNT = {
    "type": "service_account",
    "client_email": "",
    "private_key": "",
    "private_key_id": "",
    "disable_oauth": True,
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's own configuration."""
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST", "AZURE_STORAGE_CONNECTION_STRING"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the client of obstore is made with, in place of one."""
    seen: dict[str, Any] = {}

    def make(bucket: str, **arguments: Any) -> None:
        seen.update(arguments, bucket=bucket)

    monkeypatch.setattr("obstore.store.GCSStore", make)
    monkeypatch.setattr("obstore.store.AzureStore", make)
    return seen


def test_google(made: dict[str, Any], tmp_path: Path) -> None:
    """Each way of gcsfs to name credentials and a server is the same to obstore."""
    for kind, word in (("service_account", "service_account"), ("authorized_user", "application_credentials")):
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps({"type": kind}))
        cloud_options.gcs_factory("bucket", {"token": str(path), "project": "p", "block_size": 5})(2)
        assert made["config"] == {word: str(path)}
        assert made["retry_config"]["max_retries"] == 2
    cloud_options.gcs_factory("bucket", {"token": ACCOUNT, "endpoint_url": "http://host:1/"})(0)
    assert json.loads(made["config"]["service_account_key"]) == ACCOUNT
    assert made["config"]["base_url"] == "http://host:1"
    assert made["client_options"]["allow_http"]
    cloud_options.gcs_factory("bucket", {"token": "anon", "requests_timeout": 7})(0)
    assert made["config"] == {"skip_signature": True}
    assert made["client_options"]["read_timeout"] == "7.0s"
    cloud_options.gcs_factory("bucket", {"token": "google_default"})(0)
    assert made["config"] == {}


def test_azure(made: dict[str, Any]) -> None:
    """Each way of adlfs to name an account and its keys is the same to obstore, and none of the keys is shown."""
    _, secrets = cloud_options.azure_factory("box", {"account_name": "a", "account_key": "hush"})(1)
    assert (made["bucket"], made["config"], secrets) == ("box", {"account_name": "a", "account_key": "hush"}, ("hush",))
    text = "DefaultEndpointsProtocol=http;AccountName=a;AccountKey=aa==;EndpointSuffix=host"
    cloud_options.azure_factory("box", {"connection_string": text})(1)
    assert made["config"] == {"account_name": "a", "account_key": "aa==", "endpoint": "http://a.blob.host"}
    assert made["client_options"]["allow_http"]
    cloud_options.azure_factory("box@b.dfs.core.windows.net", {"sas_token": "?sv=1", "location_mode": "primary"})(1)
    assert (made["bucket"], made["config"]) == ("box", {"account_name": "b", "sas_key": "?sv=1"})
    cloud_options.azure_factory("box@b.dfs.core.chinacloudapi.cn", {"anon": True})(1)
    assert made["config"]["endpoint"] == "https://b.blob.core.chinacloudapi.cn"
    assert made["config"]["skip_signature"]


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("gs", {"token": object()}),
        ("gs", {"token": "cloud"}),
        ("gs", {"requester_pays": True}),
        ("gs", {"version_aware": True}),
        ("az", {"account_name": "a", "credential": object()}),
        ("az", {"account_name": "a", "location_mode": "secondary"}),
    ],
    ids=str,
)
def test_untranslatable(url: str, options: dict[str, Any]) -> None:
    """An option that obstore has no word for is never dropped: the message says which, and what to install."""
    factory = cloud_options.gcs_factory if url == "gs" else cloud_options.azure_factory
    with pytest.raises(UntranslatableError):
        factory("bucket", options)
    with pytest.raises(UsageError, match=rf"storage option {[*options][-1]}, and (gcsfs|adlfs) is not installed"):
        open_storage(f"{url}://bucket/x", options)


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("gs://bucket/x", {"token": "/no/such/file"}, "'token'.*/no/such/file"),
        ("gs://bucket/x", {"token": {"type": "service_account"}}, "cannot open gs://bucket"),
        ("gs://", {}, "names no bucket"),
        ("gs://bucket/x", {"token": "anon", "endpoint_url": "host"}, "must begin with http"),
        ("az://box/x", {}, "account_name"),
        ("abfs://", {"account_name": "a"}, "names no bucket"),
    ],
)
def test_bad_options(url: str, options: dict[str, Any], words: str) -> None:
    """Options that make no sense are errors at once, before anything is looked for."""
    with pytest.raises(UsageError, match=words):
        open_storage(url, options)


@pytest.mark.s3
def test_google_speaks_to_a_server(s3_place: S3Place) -> None:
    """Save, list, read and remove work by the requests that Google shares with S3, which the tests' server knows."""

    def translated(line: str, headers: dict[str, str]) -> None:
        """Google's words in those of S3."""
        signed = "Credential=testkey/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
        headers["authorization"] = f"AWS4-HMAC-SHA256 {signed}"
        if headers.pop("x-goog-if-generation-match", None) == "0":
            headers["if-none-match"] = "*"

    bucket = uuid.uuid4().hex  # obstore quotes a hyphen, which moto does not understand
    s3_place.client.create_bucket(Bucket=bucket)
    with Proxy(s3_place.storage_options["client_kwargs"]["endpoint_url"], translated) as proxy:
        options = {"token": ACCOUNT | {"gcs_base_url": proxy.endpoint}, "endpoint_url": proxy.endpoint}
        storage = open_storage(f"gs://{bucket}/run", options)
        assert isinstance(storage, ObjectStorage)
        storage.prepare()
        data = noise(2 * BLOCK + 9)
        store(storage, "rank", data)
        into = bytearray(len(data))
        storage.read_into("rank", 0, memoryview(into))
        assert into == data
        storage.put("manifest.json", b"1", replace=False)
        with pytest.raises(ObjectExistsError):
            storage.put("manifest.json", b"2", replace=False)
        with pytest.raises(ObjectExistsError):
            storage.put("manifest.json", b"2", replace=b"0")
        storage.put("manifest.json", b"3", replace=True)
        assert storage.get("manifest.json") == b"3"
        assert [stat.name for stat in storage.list()] == ["manifest.json", "rank"]
        with pytest.raises(ObjectNotFoundError):
            storage.get("none")


def test_schemes_are_known() -> None:
    """What opens these URLs and what says which packages serve them agree."""
    for scheme in cloud_opening.PACKAGES:
        with pytest.raises(UsageError, match="names no bucket"):
            open_storage(f"{scheme}://", {"account_name": "a"})
