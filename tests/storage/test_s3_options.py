"""The options of s3fs in the words of obstore: nothing is lost on the way, and nothing secret is shown."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardckpt.errors import StorageAccessError, UsageError
from shardckpt.storage import open_storage
from shardckpt.storage.objects import ObjectStorage
from shardckpt.storage.s3 import S3Storage
from shardckpt.storage.s3_options import (
    UntranslatableError,
    region_of,
    store_factory,
    translated,
    without_payload_hashes,
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's own configuration."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize(
    "options",
    [
        {"endpoint_url": "http://host:9000"},
        {"client_kwargs": {"endpoint_url": "http://host:9000"}},
        {"endpoint_url": "http://host:9000/", "client_kwargs": {"endpoint_url": "http://other"}},
    ],
)
def test_endpoint(options: dict[str, Any]) -> None:
    """An endpoint is found wherever s3fs takes it from, and plain http is allowed where it was asked for."""
    settings = translated(options)
    assert settings.endpoint == settings.config["endpoint"] == settings.config["aws_endpoint_url_s3"]
    assert settings.endpoint == "http://host:9000"
    assert settings.client["allow_http"] is True
    assert translated({"endpoint_url": "https://host"}).client["allow_http"] is False


def test_endpoint_and_region_of_the_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What s3fs reads from the environment and from a profile counts here too; without any of it the store is AWS."""
    assert translated({}).endpoint is None
    config = tmp_path / "config"
    config.write_text("[profile lab]\nregion = eu-west-1\nendpoint_url = https://lab\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    assert translated({"profile": "lab"}).endpoint == "https://lab"
    assert translated({"profile": "lab"}).config["region"] == "eu-west-1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://all")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert translated({}).endpoint == "https://all"
    assert translated({}).config["region"] == "us-west-2"
    assert translated({"client_kwargs": {"region_name": "x"}}).config["region"] == "x"
    with pytest.raises(UsageError, match="nobody"):
        translated({"profile": "nobody"})


def test_translated_options() -> None:
    """Each option that obstore has a word for arrives under that word."""
    settings = translated(
        {
            "requester_pays": True,
            "client_kwargs": {"verify": False},
            "config_kwargs": {
                "connect_timeout": 3,
                "read_timeout": 4,
                "retries": {"max_attempts": 5, "mode": "standard"},
                "signature_version": "s3v4",
                "s3": {"addressing_style": "path", "payload_signing_enabled": False},
                "max_pool_connections": 50,
                "region_name": "eu-north-1",
            },
            "s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "id"},
            "default_block_size": 1,
        }
    )
    assert settings.config["request_payer"] is True
    assert settings.config["server_side_encryption"] == "aws:kms"
    assert settings.config["sse_kms_key_id"] == "id"
    assert settings.config["region"] == "eu-north-1"
    assert settings.client["allow_invalid_certificates"] is True
    assert (settings.client["connect_timeout"], settings.client["read_timeout"]) == ("3.0s", "4.0s")
    assert settings.retries == 5


def test_s3fs_signs_no_payloads() -> None:
    """Over plain http s3fs hashes nothing it sends, unless the user wants that; over https it does not anyway."""
    plain = {"endpoint_url": "http://host", "config_kwargs": {"read_timeout": 5}}
    config = without_payload_hashes(plain)["config_kwargs"]
    assert config["s3"] == {"payload_signing_enabled": False}
    assert config["request_checksum_calculation"] == config["response_checksum_validation"] == "when_required"
    assert config["read_timeout"] == 5
    told = {"s3": {"payload_signing_enabled": True}, "request_checksum_calculation": "when_supported"}
    config = without_payload_hashes(plain | {"config_kwargs": told})["config_kwargs"]
    assert config == told | {"response_checksum_validation": "when_required"}
    assert without_payload_hashes({})["config_kwargs"]["s3"] == {"payload_signing_enabled": False}


UNTRANSLATABLE: list[dict[str, Any]] = [
    {"session": object()},
    {"version_aware": True},
    {"use_ssl": False},
    {"s3_additional_kwargs": {"ACL": "private"}},
    {"client_kwargs": {"api_version": "x"}},
    {"config_kwargs": {"proxies": {}}},
    {"config_kwargs": {"signature_version": "s3"}},
    {"config_kwargs": {"s3": {"use_accelerate_endpoint": True}}},
    {"config_kwargs": {"s3": {"payload_signing_enabled": True}}},
    {"endpoint_url": "http://host", "config_kwargs": {"s3": {"addressing_style": "virtual"}}},
]


@pytest.mark.parametrize("options", UNTRANSLATABLE, ids=str)
def test_untranslatable(options: dict[str, Any]) -> None:
    """An option without a counterpart is never dropped in silence, and is named without its value."""
    with pytest.raises(UntranslatableError) as caught:
        translated(options)
    assert str(caught.value).split("[")[0] in options


def test_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """What obstore cannot be told or refuses goes to s3fs, and the log says why, once."""
    caplog.set_level(logging.INFO)
    assert isinstance(open_storage("s3://bucket/a"), ObjectStorage)
    for _ in range(2):
        assert isinstance(open_storage("s3://bucket/a", {"s3_additional_kwargs": {"Tagging": "x"}}), S3Storage)
    assert caplog.text.count("Tagging") == 1
    for url in ("s3://bucket/a//b", "s3://bucket/a/../b", "s3://bucket/tab\t", "s3://bucket/a?versionId=1"):
        assert isinstance(open_storage(url), S3Storage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"secrte": "x"}, "'secrte' is not a storage option.*'secret'"),
        ({"endpoint": "http://host"}, "'endpoint' is not a storage option.*'endpoint_url'"),
        ({"client_kwargs": "x"}, "client_kwargs.*must be a dict"),
        ({"endpoint_url": "host:9000"}, "must begin with http"),
        ({"client_kwargs": {"verify": "/no/such/bundle"}}, "/no/such/bundle"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    """A misspelt or senseless option is an error about the call at once, and not an attempt with other credentials."""
    with pytest.raises(UsageError, match=message) as caught:
        open_storage("s3://bucket/a", options)
    assert "'x'" not in str(caught.value)


def provider(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[], Any] | None, Any, Any]:
    """What obstore's store is made with: where its credentials come from, and its configuration; and the secrets."""
    import obstore.store

    made: dict[str, Any] = {}
    monkeypatch.setattr(obstore.store, "S3Store", lambda bucket, **words: made.update(words))
    _, secrets = store_factory("bucket", translated({"endpoint_url": "http://host", **options}))(0)
    return made["credential_provider"], made["config"], secrets


def test_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options come before the environment and that before a profile, none mixes with another, and all are secrets."""
    with pytest.raises(StorageAccessError, match="no credentials"):
        provider({}, monkeypatch)
    files = tmp_path / "credentials"
    files.write_text("[lab]\naws_access_key_id = labkey\naws_secret_access_key = labsecret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(files))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "envkey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "envsecret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "envtoken")
    for options, expected in (
        ({"key": "mykey", "secret": "mysecret"}, ("mykey", "mysecret", None)),
        ({"username": "mykey", "password": "mysecret", "token": "t0ken"}, ("mykey", "mysecret", "t0ken")),
        ({"client_kwargs": {"aws_access_key_id": "a", "aws_secret_access_key": "b"}}, ("a", "b", None)),
        ({}, ("envkey", "envsecret", "envtoken")),
        ({"profile": "lab"}, ("labkey", "labsecret", None)),
    ):
        provide, config, secrets = provider(options, monkeypatch)
        assert provide is not None
        said = provide()
        assert (said["access_key_id"], said["secret_access_key"], said["token"]) == expected
        assert set(secrets) == {word for word in expected if word}
        assert "skip_signature" not in config
    provide, config, _ = provider({"anon": True}, monkeypatch)
    assert provide is None
    assert config["skip_signature"] is True
    for half in ({"key": "mykey"}, {"client_kwargs": {"aws_secret_access_key": "x"}}):
        with pytest.raises(UsageError, match="without a secret"):
            open_storage("s3://bucket/a", half)


def test_region_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong region is put right by asking AWS; where it does not answer, what the user said must do."""
    import http.client

    class Answer:
        def __init__(self, host: str, timeout: float) -> None:
            self.host = host

        def request(self, method: str, path: str) -> None:
            if self.host == "down":
                raise ConnectionRefusedError
            assert (method, path) == ("HEAD", "/bucket")

        def getresponse(self) -> "Answer":
            return self

        def getheader(self, name: str) -> str:
            return "eu-west-1"

        def close(self) -> None:
            pass

    monkeypatch.setattr(http.client, "HTTPSConnection", Answer)
    assert region_of("bucket", None) == region_of("bucket", "us-east-1") == "eu-west-1"
    assert region_of("bucket", None, host="down") == "us-east-1"
    assert region_of("bucket", "eu-west-3", host="down") == "eu-west-3"
    assert region_of("bucket", "cn-north-1") == "cn-north-1"
