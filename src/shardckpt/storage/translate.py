"""The one place where errors of operating systems, S3 clients and fsspec backends become ours.

Classes are recognised by name, so that nothing of botocore, aiohttp, s3fs or obstore is imported here. s3fs turns the
answers of S3 into builtin errors and keeps the original as the cause: where there is one its error code decides.
obstore gives the store's answer as a part of its message, and only there.
"""

import errno
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from shardckpt.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    ShardckptError,
    StorageAccessError,
    StorageError,
    StorageFullError,
    UsageError,
)
from shardckpt.storage.concealment import cleanse

_Ours = type[ShardckptError]

ERRNOS: Mapping[int, _Ours] = {
    errno.ENOSPC: StorageFullError,
    errno.EDQUOT: StorageFullError,
    errno.EFBIG: StorageFullError,
    errno.EACCES: StorageAccessError,
    errno.EPERM: StorageAccessError,
    errno.EROFS: StorageAccessError,
    errno.ENOENT: ObjectNotFoundError,
    errno.EEXIST: ObjectExistsError,
}

_ACCESS = """
    AccessDenied AccountProblem AllAccessDisabled AuthorizationHeaderMalformed CredentialsNotSupported
    CrossLocationLoggingProhibited ExpiredToken InvalidAccessKeyId InvalidObjectState InvalidPayer InvalidSecurity
    InvalidToken MissingSecurityElement MissingSecurityHeader NotSignedUp RequestTimeTooSkewed SignatureDoesNotMatch
    TokenRefreshRequired Unauthorized UnauthorizedAccess Forbidden 401 403
"""
_MISSING = """
    NoSuchBucket NoSuchBucketPolicy NoSuchKey NoSuchLifecycleConfiguration NoSuchUpload NoSuchVersion NotFound 404
"""
_EXISTS = "BucketAlreadyExists BucketAlreadyOwnedByYou PreconditionFailed ConditionalRequestConflict 412"
_FULL = "QuotaExceeded XMinioStorageFull InsufficientCapacity 507"
_REFUSED = """
    AmbiguousGrantByEmailAddress BadDigest BucketNotEmpty EntityTooSmall EntityTooLarge
    IllegalLocationConstraintException IllegalVersioningConfigurationException IncompleteBody
    IncorrectNumberOfFilesInPostRequest InlineDataTooLarge InternalError InvalidAddressingHeader InvalidArgument
    InvalidBucketName InvalidBucketState InvalidDigest InvalidEncryptionAlgorithmError InvalidLocationConstraint
    InvalidPart InvalidPartOrder InvalidPolicyDocument InvalidRange InvalidRequest InvalidSOAPRequest
    InvalidStorageClass InvalidTargetBucketForLogging InvalidURI KeyTooLongError MalformedACLError
    MalformedPOSTRequest MalformedXML MaxMessageLengthExceeded MaxPostPreDataLengthExceededError MetadataTooLarge
    MethodNotAllowed MissingAttachment MissingContentLength MissingRequestBodyError NoLoggingStatusForKey
    NotImplemented OperationAborted PermanentRedirect Redirect RequestIsNotMultiPartContent RequestTimeout
    RequestTorrentOfBucketError RestoreAlreadyInProgress ServiceUnavailable SlowDown TemporaryRedirect TooManyBuckets
    UnexpectedContent UnresolvableGrantByEmailAddress UserKeyMustBeSpecified
    301 307 400 405 409 416 429 500 501 502 503 504
"""

S3_CODES: Mapping[str, _Ours] = {
    code: ours
    for codes, ours in (
        (_ACCESS, StorageAccessError),
        (_MISSING, ObjectNotFoundError),
        (_EXISTS, ObjectExistsError),
        (_FULL, StorageFullError),
        (_REFUSED, StorageError),
    )
    for code in codes.split()
}
"""Error codes of S3 and its imitations, and the HTTP statuses that stand in for them where an answer has no body."""

_CREDENTIALS = """
    CredentialRetrievalError LoginError MetadataRetrievalError NoAuthTokenError NoCredentialsError
    PartialCredentialsError RefreshWithMFAUnsupportedError SSOError TokenRetrievalError UnknownCredentialError
    UnknownTokenProviderError
"""
_CONFIGURATION = """
    ApiVersionNotFoundError BaseEndpointResolverError ConfigNotFound ConfigParseError DataNotFoundError
    EndpointProviderError InvalidChecksumConfigError InvalidConfigError InvalidDNSNameError InvalidDefaultsMode
    InvalidEndpointConfigurationError InvalidEndpointDiscoveryConfigurationError InvalidExpressionError
    InvalidHostLabelError InvalidIMDSEndpointError InvalidIMDSEndpointModeError InvalidProxiesConfigError
    InvalidRetryConfigurationError InvalidS3AddressingStyleError InvalidS3UsEast1RegionalEndpointConfigError
    InvalidSTSRegionalEndpointsConfigError MD5UnavailableError MissingDependencyException MissingParametersError
    ParamValidationError ProfileNotFound ServiceNotInRegionError UnknownRegionError UnknownServiceStyle
    UnknownSignatureVersionError UnsupportedOutpostResourceError UnsupportedS3AccesspointConfigurationError
    UnsupportedS3ArnError UnsupportedS3ConfigurationError UnsupportedS3ControlArnError
    UnsupportedS3ControlConfigurationError UnsupportedServiceProtocolsError UnsupportedSignatureVersionError
    ValidationError
"""
_FAILURES = """
    AwsChunkedWrapperError CapacityNotAvailableError ChecksumError ClientError ConnectionError FlexibleChecksumError
    HTTPClientError IncompleteReadError OperationNotPageableError PaginationError StubResponseError
    UnknownClientMethodError UnseekableStreamError WaiterConfigError WaiterError
"""

CLASSES: Mapping[str, _Ours] = {
    **{f"botocore.exceptions.{name}": StorageAccessError for name in _CREDENTIALS.split()},
    **{f"botocore.exceptions.{name}": UsageError for name in _CONFIGURATION.split()},
    **{f"botocore.exceptions.{name}": StorageError for name in _FAILURES.split()},
    "obstore.exceptions.AlreadyExistsError": ObjectExistsError,
    "obstore.exceptions.PreconditionError": ObjectExistsError,
    "obstore.exceptions.PermissionDeniedError": StorageAccessError,
    "obstore.exceptions.UnauthenticatedError": StorageAccessError,
    "obstore.exceptions.InvalidPathError": UsageError,
    "obstore.exceptions.NotSupportedError": UsageError,
    "obstore.exceptions.UnknownConfigurationKeyError": UsageError,
    "obstore.exceptions.BaseError": StorageError,
    "builtins.FileNotFoundError": ObjectNotFoundError,
    "builtins.FileExistsError": ObjectExistsError,
    "builtins.PermissionError": StorageAccessError,
    "builtins.NotImplementedError": UsageError,
}
"""Classes of foreign errors; a subclass goes with the nearest of its bases that stands here."""

_ADVICE: tuple[tuple[_Ours, str], ...] = (
    (StorageFullError, "Free space or raise the quota, or choose another place"),
    (StorageAccessError, "Check the credentials, the permissions and whether the place may be written at all"),
    (ObjectNotFoundError, "Check the path, and whether another process is removing or replacing it"),
    (ObjectExistsError, "Another process got there first, or it is left from before"),
    (UsageError, "Check the URL, storage_options and the configuration of the storage's client"),
    (StorageError, "Check that the storage is up and reachable, then try again"),
)

_REGION = "Check client_kwargs={'region_name': ...} and the endpoint: the bucket lies elsewhere"
_LACKING = "The store does not know this request; objects of more than 8 MiB need uploads in parts (multipart)"
_CODE_ADVICE: Mapping[str, str] = {
    "NoSuchBucket": "Check the bucket's name and the endpoint; buckets are never made, so make it first",
    "ContainerNotFound": "Check the container's name and the account; containers are never made, so make it first",
    "RequestTimeTooSkewed": "The clock of this machine is wrong: set it by a time server",
    "ExpiredToken": "The credentials have expired: renew them, or let a profile or a role do it",
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "301": _REGION,
    "307": _REGION,
    "NotImplemented": _LACKING,
    "501": _LACKING,
}
"""Where the error code of an answer says more than its class."""

_ATTEMPTS = "_shardckpt_attempts"

_TRANSIENT_CODES = {
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
}
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
# A refused connection is not here: botocore has tried for seconds already when it says so.
_TRANSIENT_CLASSES = {
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.ConnectTimeoutError",
    "botocore.exceptions.IncompleteReadError",
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "asyncio.exceptions.TimeoutError",
    "builtins.TimeoutError",
    "builtins.ConnectionResetError",
    "builtins.ConnectionAbortedError",
    "builtins.BrokenPipeError",
}


# How obstore words a failed request, and what of the store's answer it quotes.
_REQUEST = re.compile(r"Error performing [A-Z]+ (?:\S+ )?in [\d.]+\S*")
_RETRIES = re.compile(r"after (\d+) retries")
_STATUS = re.compile(r"status code: (\d{3})")
_REDIRECT = re.compile(r"redirect without LOCATION", re.IGNORECASE)
_CODE = re.compile(r"<Code>([^<]+)</Code>")
# What it does not try again by itself: the answer came, and broke off.
_BROKEN_OFF = re.compile(
    r"HTTP error: .*body|error (?:decoding|reading) (?:a )?(?:response )?body|error reading a body"
)
_MESSAGE = re.compile(r"<Message>([^<]+)</Message>")


@contextmanager
def translating(doing: str, where: str, secrets: Collection[str] = ()) -> Iterator[None]:
    """Turn any foreign error raised inside into one of ours, with the foreign one as its cause.

    Args:
        doing: a verb that fits "cannot ... <where>".
        where: the path or URL concerned, without credentials.
        secrets: words to keep out of the message and of the foreign error, which may quote them.
    """
    try:
        yield
    except ShardckptError as error:
        cleanse(error, secrets)  # it may have come up in the handling of a foreign one
        raise
    except MemoryError:
        raise
    except Exception as error:
        cleanse(error, secrets)
        raise translate(error, doing, where) from error


def translate(error: Exception, doing: str, where: str) -> ShardckptError:
    """Return the error of ours that stands for ``error``; see :func:`translating`."""
    ours = classify(error)
    advice = _CODE_ADVICE.get(s3_code(error)) or next(text for base, text in _ADVICE if issubclass(ours, base))
    attempts = getattr(error, _ATTEMPTS, 1)
    tried = f", tried {attempts} times" if attempts > 1 else ""
    translated = ours(f"cannot {doing} {where}: {_reason(error)}{tried}. {advice}")
    if isinstance(translated, OSError) and isinstance(error, OSError):
        translated.errno = error.errno
    return translated


def classify(error: BaseException) -> _Ours:
    """Return the class of ours for a foreign error; what nobody has heard of is a :class:`StorageError`."""
    code = s3_code(error)
    if code in S3_CODES:
        return S3_CODES[code]
    if isinstance(error, OSError) and error.errno is not None and error.errno in ERRNOS:
        return ERRNOS[error.errno]
    return next((CLASSES[name] for name in _names(error) if name in CLASSES), StorageError)


def s3_code(error: BaseException) -> str:
    """Return the error code of the S3 answer behind ``error``, or ``""``."""
    details = _response(error).get("Error")
    if isinstance(details, dict):
        return str(details.get("Code", ""))
    said = _said_by_obstore(error)
    if _REDIRECT.search(said):
        return "PermanentRedirect"
    found = said and (_CODE.search(said) or _STATUS.search(said))
    return found[1] if found else ""


def count_attempts(error: BaseException, attempts: int) -> None:
    """Note on an error how often its request has been made, for its translation."""
    setattr(error, _ATTEMPTS, attempts)


def is_transient(error: BaseException) -> bool:
    """Tell whether the same request may well succeed if it is sent again soon."""
    metadata = _response(error).get("ResponseMetadata")
    status = metadata.get("HTTPStatusCode") if isinstance(metadata, dict) else None
    if said := _said_by_obstore(error):
        # What it has tried again in vain it has tried for long enough.
        found = _STATUS.search(said)
        status = int(found[1]) if found else None
        return not _RETRIES.search(said) and (status is None or status in _TRANSIENT_STATUS or _conflicts(error))
    if type(error).__module__.startswith("obstore") and _BROKEN_OFF.search(str(error).partition("\n\n")[0]):
        return True
    if s3_code(error) in _TRANSIENT_CODES or status in _TRANSIENT_STATUS:
        return True
    return any(name in _TRANSIENT_CLASSES for name in _names(error))


def lacks_conditions(error: BaseException) -> bool:
    """Tell whether a store refused a conditional write since it does not know such a thing."""
    return s3_code(error) in ("NotImplemented", "501")


def is_missing_bucket(error: BaseException) -> bool:
    """Tell whether it is the bucket that does not exist, and not only the object."""
    return s3_code(error) in ("NoSuchBucket", "ContainerNotFound")


def _response(error: BaseException) -> Mapping[str, Any]:
    """The parsed answer that botocore attached to ``error``, or to its cause if s3fs has translated it."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _conflicts(error: BaseException) -> bool:
    """Whether two conditional writes met, which says nothing of the condition."""
    return s3_code(error) in _TRANSIENT_CODES


def _said_by_obstore(error: BaseException) -> str:
    """What obstore says of a failed request, without its inner workings; "" if the error is not of that kind."""
    said = str(error).partition("\n\nDebug source:")[0]
    return said if _REQUEST.search(said) else ""


def _names(error: BaseException) -> Iterator[str]:
    return (f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)


def _reason(error: Exception) -> str:
    if said := _said_by_obstore(error):
        return _request_reason(said)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(str(text).partition("\n\nDebug source:")[0].split()).rstrip(".")
    code = s3_code(error)
    if not text:
        return code or type(error).__name__
    return f"{text} ({code})" if code and code not in text else text


def _request_reason(said: str) -> str:
    """The store's own words where it had some, else the client's; and how often they were heard."""
    message, code, status, retries = (pattern.search(said) for pattern in (_MESSAGE, _CODE, _STATUS, _RETRIES))
    text = message[1] if message else " ".join(_REQUEST.split(said, maxsplit=1)[1].partition(" - ")[2].split())
    text = text.rstrip(". ")
    if code and code[1] not in text:
        text = f"{text} ({code[1]})"
    elif status and not code and status[1] not in text:
        text = f"{text} ({status[1]})"
    return f"{text}, tried {int(retries[1]) + 1} times" if retries else text
