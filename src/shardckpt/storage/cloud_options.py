"""What obstore has to be told of Google's and Microsoft's stores, given the options of gcsfs and of adlfs.

As with S3, an option that obstore has nothing for raises :class:`UntranslatableError`, and gcsfs or adlfs do the work.
"""

import datetime
import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from shardckpt.errors import UsageError
from shardckpt.storage.concealment import secrets_of
from shardckpt.storage.retry import DEADLINE
from shardckpt.storage.s3_options import UntranslatableError

if TYPE_CHECKING:
    from obstore.store import AzureConfig, ClientConfig, GCSConfig

    from shardckpt.storage.connection import Factory

# They concern files, caches, listings and the making of buckets, or say what obstore does anyway.
_IGNORED: Final = """
    access asynchronous assume_container_exists block_size blocksize cache_timeout check_connection consistency
    default_block_size default_cache_type default_fill_cache default_location listings_expiry_time loop max_concurrency
    max_paths project protocol secure_serialize skip_instance_cache socket_timeout use_listings_cache
"""
_SUFFIXES: Final = re.compile(r"(?P<container>[^@/]+)@(?P<account>[^./]+)\.(?:dfs|blob)\.(?P<suffix>[^/]+)")


def gcs_factory(bucket: str, options: Mapping[str, Any]) -> "Factory":
    """Return what makes clients of a bucket of Google, given the options of gcsfs.

    Raises:
        UntranslatableError: there is no way to tell obstore everything.
        UsageError: an option makes no sense.
    """
    config: GCSConfig = {}
    client = _client(options, "requests_timeout")
    token = options.get("token")
    if token == "anon":
        config["skip_signature"] = True
    elif isinstance(token, Mapping) and token.get("type") == "service_account":
        config["service_account_key"] = json.dumps(dict(token))
    elif isinstance(token, str) and token not in ("google_default", "cloud", "cache", "browser"):
        _tell_token_file(token, config)
    elif token not in (None, "google_default"):
        raise UntranslatableError("token")
    # As gcsfs has it: a server of the user's own, which wants no credentials.
    endpoint = options.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST")
    if endpoint:
        config["base_url"] = _with_scheme(endpoint, client)
    _refuse_others(options, {"token", "endpoint_url", "requests_timeout"})

    def make(retries: int) -> tuple[Any, tuple[str, ...]]:
        from obstore.store import GCSStore

        limits = {"max_retries": retries, "retry_timeout": datetime.timedelta(seconds=DEADLINE)}
        return GCSStore(bucket, config=config, client_options=client, retry_config=limits), secrets_of(options)  # type: ignore[arg-type] # a dict made for two calls

    return make


def azure_factory(container: str, options: Mapping[str, Any]) -> "Factory":
    """Return what makes clients of a container of Azure, given the options of adlfs.

    ``container`` is as in the URL: alone, or with the account, ``container@account.dfs.core.windows.net``.

    Raises:
        UntranslatableError: there is no way to tell obstore everything.
        UsageError: an option makes no sense, or nobody says which account is meant.
    """
    given = {**_connection(options.get("connection_string") or os.environ.get("AZURE_STORAGE_CONNECTION_STRING"))}
    named = _SUFFIXES.fullmatch(container)
    if named:
        given["account_name"] = named["account"]
        if not named["suffix"].startswith("core.windows.net"):
            given["endpoint"] = f"https://{named['account']}.blob.{named['suffix']}"
    for theirs, ours in _AZURE_NAMES.items():
        if options.get(theirs) is not None:
            given[ours] = str(options[theirs])
    client = _client(options, "read_timeout")
    if host := options.get("account_host"):
        given["endpoint"] = f"https://{host}"
    config: AzureConfig = {**given}  # type: ignore[typeddict-item] # names from the table below
    if "endpoint" in given:
        config["endpoint"] = _with_scheme(given["endpoint"], client)
    if options.get("anon"):
        config["skip_signature"] = True
    if "account_name" not in given and not os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
        raise UsageError("storage_options must say which Azure account is meant: account_name, or a connection_string")
    _refuse_others(
        options, {"connection_string", "anon", "account_host", "read_timeout", "connection_timeout", *_AZURE_NAMES}
    )
    secrets = tuple(value for name, value in given.items() if name not in ("account_name", "endpoint"))

    def make(retries: int) -> tuple[Any, tuple[str, ...]]:
        from obstore.store import AzureStore

        limits = {"max_retries": retries, "retry_timeout": datetime.timedelta(seconds=DEADLINE)}
        store = AzureStore(
            named["container"] if named else container,
            config=config,
            client_options=client,
            retry_config=limits,  # type: ignore[arg-type] # a dict made for two calls
        )
        return store, secrets

    return make


_AZURE_NAMES: Final = {
    "account_name": "account_name",
    "account_key": "account_key",
    "sas_token": "sas_key",
    "client_id": "client_id",
    "client_secret": "client_secret",
    "tenant_id": "tenant_id",
}
_CONNECTION_NAMES: Final = {
    "accountname": "account_name",
    "accountkey": "account_key",
    "sharedaccesssignature": "sas_key",
    "blobendpoint": "endpoint",
}


def _connection(text: str | None) -> dict[str, str]:
    """The parts of a connection string, in the words of obstore."""
    parts = dict(part.split("=", 1) for part in (text or "").split(";") if "=" in part)
    parts = {name.strip().lower(): value for name, value in parts.items()}
    found = {ours: parts[theirs] for theirs, ours in _CONNECTION_NAMES.items() if theirs in parts}
    if "endpoint" not in found and "endpointsuffix" in parts and "account_name" in found:
        scheme = parts.get("defaultendpointsprotocol", "https")
        found["endpoint"] = f"{scheme}://{found['account_name']}.blob.{parts['endpointsuffix']}"
    return found


def _tell_token_file(path: str, config: "GCSConfig") -> None:
    try:
        with open(path, encoding="utf-8") as file:
            kind = json.load(file).get("type")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"the storage option 'token' must be a file with credentials, but {path!r} cannot be read as one"
        ) from error
    if kind == "service_account":
        config["service_account"] = path
    elif kind == "authorized_user":
        config["application_credentials"] = path
    else:
        raise UntranslatableError("token")


def _client(options: Mapping[str, Any], timeout: str) -> "ClientConfig":
    told: ClientConfig = {"timeout": "300s", "read_timeout": "60s", "connect_timeout": "10s"}
    if options.get(timeout):
        told["read_timeout"] = f"{float(options[timeout])}s"
    if options.get("connection_timeout"):
        told["connect_timeout"] = f"{float(options['connection_timeout'])}s"
    return told


def _with_scheme(endpoint: str, client: "ClientConfig") -> str:
    text = str(endpoint).rstrip("/")
    if not text.startswith(("http://", "https://")):
        raise UsageError(f"the endpoint {text!r} must begin with http:// or https://")
    if text.startswith("http://"):
        client["allow_http"] = True
    return text


def _refuse_others(options: Mapping[str, Any], known: set[str]) -> None:
    for name, value in options.items():
        is_default = value in (None, False) or (name, value) == ("location_mode", "primary")
        if name not in known and name not in _IGNORED.split() and not is_default:
            raise UntranslatableError(name)
