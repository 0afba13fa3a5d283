"""Foreign errors become ours: every class and code that upstream can raise is known, and no secret gets out."""

import errno
import inspect
import pickle
import re
import time
from typing import Any

import pytest

from shardckpt.errors import (
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    ShardckptError,
    StorageAccessError,
    StorageError,
    StorageFullError,
    UsageError,
)
from shardckpt.storage import retry
from shardckpt.storage.concealment import conceal, secrets_of, without_credentials
from shardckpt.storage.retry import retrying
from shardckpt.storage.translate import (
    CLASSES,
    S3_CODES,
    classify,
    is_transient,
    translate,
    translating,
)

botocore_exceptions = pytest.importorskip("botocore.exceptions")


def client_error(code: str, status: int = 400, **error: str) -> Exception:
    response = {"Error": {"Code": code, **error}, "ResponseMetadata": {"HTTPStatusCode": status}}
    answer: Exception = botocore_exceptions.ClientError(response, "PutObject")
    return answer


def by_s3fs(error: Exception) -> Exception:
    """What s3fs makes of an answer of S3."""
    from s3fs.errors import translate_boto_error

    translated: Exception = translate_boto_error(error)
    return translated


@pytest.mark.parametrize(
    ("number", "ours"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EFBIG, StorageFullError),
        (errno.EACCES, StorageAccessError),
        (errno.EPERM, StorageAccessError),
        (errno.EROFS, StorageAccessError),
        (errno.ENOENT, ObjectNotFoundError),
        (errno.EEXIST, ObjectExistsError),
        (errno.EIO, StorageError),
        (errno.ESTALE, StorageError),
        (errno.EMFILE, StorageError),
        (errno.ENAMETOOLONG, StorageError),
        (errno.ETIMEDOUT, StorageError),
    ],
)
def test_errno(number: int, ours: type[Exception]) -> None:
    """Each errno that a caller reacts to has its own class, keeps its number, and says what, where and what next."""
    translated = translate(OSError(number, "reason given"), "write", "/data/step=1.ckpt/rank")
    assert type(translated) is ours
    assert isinstance(translated, OSError)
    assert translated.errno == number
    assert str(translated).startswith("cannot write /data/step=1.ckpt/rank: reason given. ")
    assert len(str(translated).split(". ", 1)[1]) > 20


def test_every_botocore_class_is_known() -> None:
    """A class that a newer botocore adds must be given a meaning here, not fall through as just any failure."""
    root = botocore_exceptions.BotoCoreError
    for name, kind in inspect.getmembers(botocore_exceptions, inspect.isclass):
        if kind.__module__ != "botocore.exceptions" or issubclass(kind, Warning) or kind is root:
            continue
        if not issubclass(kind, root | botocore_exceptions.ClientError):
            continue
        assert any(f"botocore.exceptions.{base.__qualname__}" in CLASSES for base in kind.__mro__), name


def test_no_class_of_botocore_is_made_up() -> None:
    """A name in the table that does not exist upstream never matches: a misspelling, or a class that has gone."""
    made_up = [
        name
        for name in CLASSES
        if name.startswith("botocore.") and not hasattr(botocore_exceptions, name.split(".")[2])
    ]
    assert made_up == []


def test_every_obstore_class_is_known() -> None:
    """The same goes for obstore, whose classes are found by name too."""
    exceptions = pytest.importorskip("obstore.exceptions")
    root = exceptions.BaseError
    classes = inspect.getmembers(exceptions, inspect.isclass)
    known = {kind.__qualname__ for _, kind in classes if issubclass(kind, root)}
    # It raises FileNotFoundError in place of one, and two more can only be bugs or unasked-for conditions.
    assert known - {"NotFoundError", "JoinError", "NotModifiedError", "GenericError"} == {
        name.rpartition(".")[2] for name in CLASSES if name.startswith("obstore.")
    }


def by_obstore(kind: str, status: str, body: str = "", retries: int = 0) -> Exception:
    """What obstore raises when a store has answered so."""
    exceptions = pytest.importorskip("obstore.exceptions")
    tried = f", after {retries} retries, max_retries: 9, retry_timeout: 180s " if retries else ""
    error: Exception = getattr(exceptions, kind)(
        f"Generic S3 error: Error performing PUT http://host/b/k in 5.1ms{tried} - Server returned non-2xx status "
        f"code: {status}: {body}\n\nDebug source:\nGeneric {{ secret: inner workings }}"
    )
    return error


@pytest.mark.parametrize(
    ("error", "ours", "transient", "words"),
    [
        (("GenericError", "503 Slow", "", 3), StorageError, False, r"503 Slow.*, tried 4 times\."),
        (("GenericError", "429 Too Many"), StorageError, True, "429 Too Many"),
        (("GenericError", "400 Bad", "<Code>ExpiredToken</Code>"), StorageAccessError, False, "(ExpiredToken)"),
        (("PermissionDeniedError", "403 No", "<Code>X</Code><Message>go.</Message>"), StorageAccessError, False, "go"),
        (("AlreadyExistsError", "412 No", "<Code>PreconditionFailed</Code>"), ObjectExistsError, False, "412"),
        (("AlreadyExistsError", "409 No", "<Code>ConditionalRequestConflict</Code>"), ObjectExistsError, True, "409"),
        (("GenericError", "404 No", "<Code>NoSuchBucket</Code>"), ObjectNotFoundError, False, "NoSuchBucket"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_obstore(error: tuple[Any, ...], ours: type[Exception], transient: bool, words: str) -> None:
    """What the store said decides, is quoted, and comes with the number of attempts; what was tried enough is final."""
    found = by_obstore(*error)
    assert classify(found) is ours
    assert is_transient(found) is transient
    text = str(translate(found, "write", "s3://b/k"))
    assert re.search(words, text)
    assert "inner workings" not in text


def test_every_code_of_s3fs_is_known() -> None:
    """Every error code that s3fs translates has a meaning of ours; one it adds must be given one."""
    errors = pytest.importorskip("s3fs.errors")
    assert set(errors.ERROR_CODE_TO_EXCEPTION) - set(S3_CODES) == set()


@pytest.mark.parametrize("code", sorted(S3_CODES))
def test_codes_survive_s3fs(code: str) -> None:
    """A code means the same to us whether s3fs has turned the answer into a builtin error or not."""
    plain = client_error(code, Message="words")
    assert classify(plain) is classify(by_s3fs(plain)) is S3_CODES[code]


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (botocore_exceptions.NoCredentialsError(), StorageAccessError),
        (botocore_exceptions.PartialCredentialsError(provider="env", cred_var="x"), StorageAccessError),
        (botocore_exceptions.UnauthorizedSSOTokenError(), StorageAccessError),
        (botocore_exceptions.EndpointConnectionError(endpoint_url="http://x"), StorageError),
        (botocore_exceptions.ConnectTimeoutError(endpoint_url="http://x"), StorageError),
        (botocore_exceptions.ReadTimeoutError(endpoint_url="http://x"), StorageError),
        (botocore_exceptions.SSLError(endpoint_url="https://x", error="expired"), StorageError),
        (botocore_exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2), StorageError),
        (botocore_exceptions.ParamValidationError(report="bucket"), UsageError),
        (botocore_exceptions.ProfileNotFound(profile="x"), UsageError),
        (botocore_exceptions.NoRegionError(), UsageError),
        (client_error("AccessDenied", 403), StorageAccessError),
        (client_error("ExpiredToken", 400), StorageAccessError),
        (client_error("NoSuchKey", 404), ObjectNotFoundError),
        (client_error("PreconditionFailed", 412, Condition="If-None-Match"), ObjectExistsError),
        (client_error("PreconditionFailed", 412), ObjectExistsError),
        (client_error("NobodyKnowsThisCode", 400), StorageError),
        (FileNotFoundError("key"), ObjectNotFoundError),
        (FileExistsError(), ObjectExistsError),
        (PermissionError("Forbidden"), StorageAccessError),
        (TimeoutError(), StorageError),
        (ConnectionResetError(), StorageError),
        (NotImplementedError(), UsageError),
        (RuntimeError("of a backend that nobody has heard of"), StorageError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_classes(error: Exception, ours: type[Exception]) -> None:
    """Each kind of trouble, as botocore, s3fs or a builtin words it, comes out as what the caller does about it."""
    assert classify(error) is ours
    assert classify(by_s3fs(error)) is ours


def test_translating() -> None:
    """The foreign error stays the cause, ours pass unchanged, and what is no error of the storage is left alone."""
    with pytest.raises(StorageAccessError) as caught, translating("list", "s3://b"):
        raise PermissionError("no")
    assert isinstance(caught.value.__cause__, PermissionError)
    for passing in (CorruptCheckpointError("mine"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(passing)) as left, translating("list", "s3://b"):
            raise passing
        assert left.value is passing


def test_wordless_errors_say_something() -> None:
    """An error without a message is named by its class or its code."""
    assert "TimeoutError" in str(translate(TimeoutError(), "read", "x"))
    assert "FileExistsError" in str(translate(FileExistsError(), "read", "x"))
    assert "(SlowDown)" in str(translate(by_s3fs(client_error("SlowDown", 503, Message="easy")), "read", "x"))


def test_survives_pickling() -> None:
    """Errors cross process boundaries: the rank that failed sends its own."""
    translated = translate(OSError(errno.ENOSPC, "full"), "write", "x")
    again = pickle.loads(pickle.dumps(translated))
    assert type(again) is StorageFullError
    assert str(again) == str(translated)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (client_error("SlowDown", 503), True),
        (client_error("InternalError", 500), True),
        (client_error("502", 502), True),
        (client_error("ConditionalRequestConflict", 409), True),
        (client_error("AccessDenied", 403), False),
        (client_error("NoSuchKey", 404), False),
        (client_error("PreconditionFailed", 412), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (botocore_exceptions.ReadTimeoutError(endpoint_url="x"), True),
        (botocore_exceptions.ConnectionClosedError(endpoint_url="x"), True),
        (botocore_exceptions.EndpointConnectionError(endpoint_url="x"), False),
        (botocore_exceptions.NoCredentialsError(), False),
        (FileNotFoundError(), False),
        (OSError(errno.ENOSPC, "full"), False),
        (ValueError(), False),
    ],
    ids=str,
)
def test_transient(error: Exception, transient: bool) -> None:
    """Only what may pass by itself is tried again, also when s3fs has translated it."""
    assert is_transient(error) is transient
    assert is_transient(by_s3fs(error)) is transient


def test_retrying(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is tried a bounded number of times, and the last error is the one that counts."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    calls: list[int] = []

    def failing(times: int, error: Exception) -> Any:
        def request() -> str:
            calls.append(1)
            if len(calls) <= times:
                raise error
            return "answer"

        calls.clear()
        pauses.clear()
        return request

    assert retrying(failing(retry.ATTEMPTS - 1, ConnectionResetError())) == "answer"
    assert len(calls) == retry.ATTEMPTS
    assert all(0.1 < pause < 15 for pause in pauses)
    with pytest.raises(ConnectionResetError):
        retrying(failing(99, ConnectionResetError()))
    assert len(calls) == retry.ATTEMPTS
    assert sum(pauses) < 60
    with pytest.raises(PermissionError):
        retrying(failing(99, PermissionError()))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/epoch=0?x", "s3://bucket/epoch=0?x"),
        ("s3://KEY:SECRET@bucket/a", "s3://***@bucket/a"),
        ("sftp://me:password@host/a@b", "sftp://***@host/a@b"),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("https://host/a?X-Amz-Signature=abc", "https://host/a?***"),
        ("simplecache::https://me:pw@host/a?sig=1", "simplecache::https://***@host/a?***"),
    ],
)
def test_urls_without_credentials(url: str, shown: str) -> None:
    """A URL in a message shows where, never with what password or signature."""
    assert without_credentials(url) == shown


def test_secrets_are_concealed() -> None:
    """Words given as keys and passwords are blotted out wherever a backend quotes them; an address is not."""
    options = {
        "key": "AKIA1234",
        "secret": "AKIA1234-and-more",
        "client_kwargs": {"endpoint_url": "http://host", "aws_session_token": "session"},
        "anon": False,
    }
    secrets = secrets_of(options)
    assert set(secrets) == {"AKIA1234", "AKIA1234-and-more", "session"}
    assert conceal("AKIA1234-and-more at http://host for session", secrets) == "*** at http://host for ***"
    with pytest.raises(ShardckptError) as caught, translating("read", "s3://b", secrets):
        raise ValueError("bad AKIA1234")
    assert "AKIA1234" not in f"{caught.value!r} {caught.value.__cause__!r}"
