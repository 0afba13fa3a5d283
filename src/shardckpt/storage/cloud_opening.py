"""Which client talks to Google's and Microsoft's stores: obstore where that can be done, else gcsfs or adlfs."""

import importlib.util
import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from shardckpt.errors import ShardckptError, UsageError
from shardckpt.storage.base import Storage
from shardckpt.storage.concealment import cleanse, secrets_of, without_credentials
from shardckpt.storage.s3_opening import unfit_key
from shardckpt.storage.s3_options import UntranslatableError

if TYPE_CHECKING:
    from shardckpt.storage.connection import Connection, Factory

PACKAGES: Final = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
"""Of the schemes that obstore serves, the packages that serve them for fsspec."""

_log = logging.getLogger(__name__)


def open_cloud(url: str, options: Mapping[str, Any]) -> Storage:
    """Return the storage at a URL of one of `PACKAGES`; see :func:`shardckpt.storage.open_storage`.

    Raises:
        UsageError: the URL names no bucket, options make no sense, or neither client can serve it.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise UsageError(f"{url} names no bucket: it must be {scheme}://bucket/path")
    package = PACKAGES[scheme]
    spare = partial(_open_with_fsspec, url, options) if importlib.util.find_spec(package) else None
    try:
        connection = _connection(scheme, bucket, options)
        reason = unfit_key(key.rstrip("/"))
    except UntranslatableError as option:
        connection, reason = None, f"obstore has nothing like the storage option {option}"
    except ModuleNotFoundError:
        connection, reason = None, 'obstore is not installed (pip install "shardckpt[s3]")'
    if connection is not None and reason is None:
        from shardckpt.storage.objects import ObjectStorage

        return ObjectStorage(connection, key.rstrip("/"), without_credentials(url), spare)
    if spare is None:
        raise UsageError(f"cannot open {without_credentials(url)}: {reason}, and {package} is not installed")
    _log.info("%s is used for %s, which is slower than obstore: %s", package, without_credentials(url), reason)
    return spare()


def _connection(scheme: str, bucket: str, options: Mapping[str, Any]) -> "Connection":
    from shardckpt.storage.cloud_options import azure_factory, gcs_factory
    from shardckpt.storage.connection import connection_to

    def checked() -> "Factory":
        factory = (gcs_factory if PACKAGES[scheme] == "gcsfs" else azure_factory)(bucket, options)
        try:
            factory(0)
        except (ModuleNotFoundError, ShardckptError):
            raise
        except Exception as error:
            cleanse(error, secrets_of(options))
            said = str(error).partition("\n\nDebug source:")[0]
            raise UsageError(f"cannot open {scheme}://{bucket}: {said}. Check storage_options") from error
        return factory

    return connection_to(f"{scheme}://{bucket}", options, ("GOOGLE_", "STORAGE_EMULATOR_HOST", "AZURE_"), checked)


def _open_with_fsspec(url: str, options: Mapping[str, Any]) -> Storage:
    from shardckpt.storage.remote import RemoteStorage, filesystem_of

    filesystem, path = filesystem_of(url, options)
    return RemoteStorage(filesystem, path, without_credentials(url), secrets_of(options))
