"""What obstore has to be told, given the options of s3fs: users know these, from pandas and from Lightning.

An option that obstore has nothing for is never dropped: it raises :class:`UntranslatableError`, and s3fs does the work.
What s3fs finds out by itself, from the environment and from the profiles of AWS, is found out here in the same way.
"""

import datetime
import difflib
import http.client
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shardckpt.errors import StorageAccessError, UsageError
from shardckpt.storage.retry import DEADLINE

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config, S3Credential


_log = logging.getLogger(__name__)

# They concern the files and caches of s3fs, or say what obstore does anyway.
_IGNORED = """
    asynchronous batch_size cache_regions default_block_size default_cache_type default_fill_cache fixed_upload_size
    listings_expiry_time local_expiry_check loop max_concurrency max_paths skip_instance_cache use_listings_cache
"""
_KNOWN = """
    anon client_kwargs config_kwargs endpoint_url key password profile requester_pays s3_additional_kwargs secret
    session token use_ssl username version_aware
"""
_CLIENT = """
    aws_access_key_id aws_secret_access_key aws_session_token endpoint_url region_name use_ssl verify
"""
_CONFIG_IGNORED = """
    max_pool_connections parameter_validation request_checksum_calculation response_checksum_validation tcp_keepalive
    user_agent user_agent_extra
"""
_ADDITIONAL: Final = {
    "ChecksumAlgorithm": "checksum_algorithm",
    "ServerSideEncryption": "server_side_encryption",
    "SSEKMSKeyId": "sse_kms_key_id",
    "BucketKeyEnabled": "sse_bucket_key_enabled",
}


class UntranslatableError(Exception):
    """An option for which obstore has no counterpart; the message names it, without its value."""


class Settings(NamedTuple):
    """Options in the words of obstore."""

    config: "S3Config"
    client: "ClientConfig"
    endpoint: str | None
    """None is Amazon's."""
    credentials: "Credentials"
    retries: int | None
    """What the user said of attempts beyond the first; None is nothing."""


@dataclass(frozen=True, repr=False)
class Credentials:
    """Where the signature of requests comes from. It has no telling ``repr``."""

    anonymous: bool
    key: str | None
    secret: str | None
    token: str | None
    profile: str | None


def check(url: str, options: Mapping[str, Any]) -> None:
    """Raise :class:`~shardckpt.errors.UsageError` for what s3fs does not take: options, or credentials in the URL."""
    place = url.partition("://")[2]
    if not place.startswith("arn:") and re.match("[^/]*[:@]", place):
        raise UsageError(
            "an s3:// URL takes no credentials, and no server: it must be s3://bucket/path, and what belongs to it goes"
            " into storage_options, as key, secret and endpoint_url. (The URL is not shown, for what may be in it.)"
        )
    known = {*_KNOWN.split(), *_IGNORED.split()}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
            raise UsageError(f"{name!r} is not a storage option for s3:// ({hint})")
    for name in ("client_kwargs", "config_kwargs", "s3_additional_kwargs"):
        if not isinstance(options.get(name) or {}, Mapping):
            raise UsageError(f"the storage option {name!r} must be a dict, not {type(options[name]).__name__}")
    client = options.get("client_kwargs") or {}
    key = options.get("key") or options.get("username") or client.get("aws_access_key_id")
    secret = options.get("secret") or options.get("password") or client.get("aws_secret_access_key")
    if bool(key) != bool(secret) and not options.get("anon"):
        raise UsageError("storage_options hold a key without a secret, or a secret without a key: give both or none")


def translated(options: Mapping[str, Any]) -> Settings:
    """Return what obstore is to be told.

    Raises:
        UntranslatableError: there is no way to tell it everything.
        UsageError: an option makes no sense.
    """
    client = {**(options.get("client_kwargs") or {})}
    _only(client, _CLIENT.split(), "client_kwargs")
    for name in ("session", "version_aware"):
        if options.get(name):
            raise UntranslatableError(name)
    endpoint = _endpoint(options.get("endpoint_url") or client.get("endpoint_url"), options.get("profile"))
    told: ClientConfig = {"timeout": "300s", "read_timeout": "60s", "connect_timeout": "10s"}
    config: S3Config = {"unsigned_payload": True}
    if endpoint is None:
        if not client.get("use_ssl", options.get("use_ssl", True)):
            raise UntranslatableError("use_ssl")
        config["virtual_hosted_style_request"] = True
    else:
        told["allow_http"] = endpoint.startswith("http://")
        config["endpoint"] = endpoint
        # Else a variable of the environment would have the last word.
        config["aws_endpoint_url_s3"] = endpoint
    if options.get("requester_pays"):
        config["request_payer"] = True
    region, retries = _configured(options.get("config_kwargs") or {}, told, endpoint)
    region = client.get("region_name") or region or _region(options.get("profile"))
    if region is not None:
        config["region"] = region
    _verify(client.get("verify"), told)
    # Amazon knows it, and it costs next to nothing; of others many take no checksums, or only some kinds.
    extra = {} if endpoint else {"ChecksumAlgorithm": "CRC64NVME"}
    extra |= options.get("s3_additional_kwargs") or {}
    _only(extra, _ADDITIONAL, "s3_additional_kwargs")
    if extra.get("ChecksumAlgorithm", "SHA256") not in ("SHA256", "CRC64NVME"):
        raise UntranslatableError("s3_additional_kwargs['ChecksumAlgorithm']")
    for name, value in extra.items():
        config[_ADDITIONAL[name]] = value  # type: ignore[literal-required]
    credentials = Credentials(
        bool(options.get("anon")),
        options.get("key") or options.get("username") or client.get("aws_access_key_id"),
        options.get("secret") or options.get("password") or client.get("aws_secret_access_key"),
        options.get("token") or client.get("aws_session_token"),
        options.get("profile"),
    )
    return Settings(config, told, endpoint, credentials, retries)


def without_payload_hashes(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options with which s3fs leaves out hashes of what it sends, unless the user has said otherwise.

    Over plain http its client signs a SHA-256 of every part, which takes four times as long as sending it; over https
    it makes checksums in Python, and sends them in a way that some stores take for data. Our own digests are in the
    checkpoint either way.
    """
    config = dict(options.get("config_kwargs") or {})
    config["s3"] = {"payload_signing_enabled": False, **(config.get("s3") or {})}
    config.setdefault("request_checksum_calculation", "when_required")
    config.setdefault("response_checksum_validation", "when_required")
    extra = dict(options.get("s3_additional_kwargs") or {})
    if extra.get("ChecksumAlgorithm") == "CRC64NVME":
        del extra["ChecksumAlgorithm"]  # its client cannot make that one without another package
    return {**options, "config_kwargs": config, "s3_additional_kwargs": extra}


def secrets_around(profile: str | None) -> tuple[str, ...]:
    """Return the keys and tokens that the environment and the profiles of AWS hold, for the client that is s3fs."""
    words = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token", "aws_security_token")
    found = {name: os.environ.get(name.upper()) for name in words}
    if importlib.util.find_spec("botocore") is not None:
        scoped = _session(profile).get_scoped_config()
        found |= {f"profile {name}": scoped.get(name) for name in words}
    return tuple(word for word in found.values() if word)


def store_factory(bucket: str, settings: Settings) -> "Callable[[int], tuple[Any, Collection[str]]]":
    """Return what makes a client of ``bucket``, given how often to try a request again, and the secrets it uses."""

    def make(retries: int) -> tuple[Any, Collection[str]]:
        from obstore.store import S3Store

        config: S3Config = {**settings.config}
        provider, secrets = _provider(settings.credentials, config)
        if settings.endpoint is None:
            config["region"] = region_of(bucket, config.get("region"))
            if "." in bucket:  # the certificate is for one label only
                config["virtual_hosted_style_request"] = False
        elif "region" not in config:
            config["region"] = "us-east-1"
        store = S3Store(
            bucket,
            config=config,
            client_options=settings.client,
            retry_config={
                "max_retries": retries if settings.retries is None else min(retries, settings.retries),
                "retry_timeout": datetime.timedelta(seconds=DEADLINE),
            },
            credential_provider=provider,
        )
        return store, secrets

    return make


def region_of(bucket: str, told: str | None, *, host: str = "s3.amazonaws.com") -> str:
    """Ask Amazon in which region a bucket lies: a client that is wrong about that is sent away.

    The answer needs no credentials. Without one, it is what the client was ``told``, or Amazon's first region.
    """
    if told is not None and told.startswith(("cn-", "us-gov-", "us-iso", "eusc-")):
        return told  # they have other hosts
    try:
        connection = http.client.HTTPSConnection(host, timeout=5)
        try:
            connection.request("HEAD", f"/{bucket}")
            found = connection.getresponse().getheader("x-amz-bucket-region")
        finally:
            connection.close()
    except (OSError, http.client.HTTPException):
        found = None
    if found and told and found != told:
        _log.info("the bucket %s lies in %s, not in %s", bucket, found, told)
    return found or told or "us-east-1"


def _only(given: Mapping[str, Any], known: Any, where: str) -> None:
    for name in given:
        if name not in known:
            raise UntranslatableError(f"{where}[{name!r}]")


def _endpoint(given: Any, profile: str | None) -> str | None:
    if given is None:
        given = _configured_endpoint(profile)
    if given is None:
        return None
    text = str(given).rstrip("/")
    if not text.startswith(("http://", "https://")):
        raise UsageError(f"the endpoint {text!r} must begin with http:// or https://")
    return text


def _configured_endpoint(profile: str | None) -> str | None:
    """The endpoint that the environment or a profile names, as botocore looks for it."""
    if importlib.util.find_spec("botocore") is None:
        return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    from botocore.configprovider import ConfiguredEndpointProvider

    session = _session(profile)
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    provider = ConfiguredEndpointProvider(
        full_config=session.full_config, scoped_config=session.get_scoped_config(), client_name="s3"
    )
    found = provider.provide()
    return None if found is None else str(found)


def _region(profile: str | None) -> str | None:
    if importlib.util.find_spec("botocore") is None:
        return os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
    found = _session(profile).get_config_variable("region") or os.environ.get("AWS_REGION")
    return None if found is None else str(found)


def _session(profile: str | None) -> Any:
    from botocore.exceptions import ProfileNotFound
    from botocore.session import Session

    session = Session(profile=profile)
    try:
        session.get_scoped_config()
    except ProfileNotFound as error:
        raise UsageError(f"{error}. Check storage_options and AWS_PROFILE") from error
    return session


def _configured(given: Mapping[str, Any], told: "ClientConfig", endpoint: str | None) -> tuple[str | None, int | None]:
    """Take over what concerns obstore from ``config_kwargs``; returns the region and the number of retries."""
    retries = None
    for name, value in given.items():
        if name == "connect_timeout":
            told["connect_timeout"] = f"{float(value)}s"
        elif name == "read_timeout":
            told["read_timeout"] = f"{float(value)}s"
        elif name == "retries":
            _only(value, {"max_attempts", "total_max_attempts", "mode"}, "config_kwargs['retries']")
            if "total_max_attempts" in value:
                retries = int(value["total_max_attempts"]) - 1
            elif "max_attempts" in value:
                retries = int(value["max_attempts"])
        elif name == "signature_version":
            if value != "s3v4":
                raise UntranslatableError("config_kwargs['signature_version']")
        elif name == "s3":
            _only(value, {"addressing_style", "payload_signing_enabled"}, "config_kwargs['s3']")
            style = value.get("addressing_style", "auto")
            if endpoint is not None and style == "virtual":
                raise UntranslatableError("config_kwargs['s3']['addressing_style']")
            if value.get("payload_signing_enabled"):
                raise UntranslatableError("config_kwargs['s3']['payload_signing_enabled']")
        elif name != "region_name" and name not in _CONFIG_IGNORED.split():
            raise UntranslatableError(f"config_kwargs[{name!r}]")
    return given.get("region_name"), retries


def _verify(value: Any, told: "ClientConfig") -> None:
    bundle = os.environ.get("AWS_CA_BUNDLE") if value is None else value
    if bundle is False:
        told["allow_invalid_certificates"] = True
    elif isinstance(bundle, str):
        try:
            with open(bundle, "rb") as file:
                told["root_certificate"] = file.read()
        except OSError as error:
            raise UsageError(f"cannot read the certificates to verify with, {bundle}: {error.strerror}") from error


def _provider(credentials: Credentials, config: "S3Config") -> tuple[Any, Collection[str]]:
    """Return what gives obstore the credentials, None where it finds them itself; and the secrets known so far."""
    if credentials.anonymous:
        config["skip_signature"] = True
        return None, ()
    if credentials.key and credentials.secret:
        key, secret, token = credentials.key, credentials.secret, credentials.token
        return (lambda: _said(key, secret, token, None)), tuple(word for word in (key, secret, token) if word)
    if importlib.util.find_spec("botocore") is None:
        return None, ()
    found = _session(credentials.profile).get_credentials()
    if found is None:
        raise StorageAccessError(
            "there are no credentials for S3: none in storage_options (key, secret, profile), in the environment"
            " (AWS_ACCESS_KEY_ID), in the profiles of AWS or from the machine's role. For a public bucket say anon=True"
        )

    secrets: set[str] = set()

    def provide() -> "S3Credential":
        now = found.get_frozen_credentials()
        secrets.update(word for word in (now.access_key, now.secret_key, now.token) if word)
        # They are renewed in time by botocore, which is asked again every few minutes.
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)
        return _said(now.access_key, now.secret_key, now.token, until)

    provide()
    return provide, secrets


def _said(key: str, secret: str, token: str | None, until: datetime.datetime | None) -> "S3Credential":
    return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": until}
