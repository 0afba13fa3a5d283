"""Credentials stay out of everything that is shown: messages, what foreign errors quote, and URLs."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

_SECRET_KEY = re.compile(r"key|secret|token|pass|cred|sas|connection", re.IGNORECASE)


def without_credentials(url: str) -> str:
    """Return ``url`` with user, password and, for http, the query (which may be a signature) taken out."""
    url = re.sub(r"://[^/@]*@", "://***@", url)
    return re.sub(r"\?.*", "?***", url) if re.search(r"(^|::)https?://", url) else url


def secrets_of(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words in ``storage_options`` that no message may show, the longest first."""
    found: set[str] = set()
    for key, value in options.items():
        if isinstance(value, Mapping):
            found.update(secrets_of(value))
        elif isinstance(value, str) and _SECRET_KEY.search(key):
            found.add(value)
    return longest_first(found)


def longest_first(words: Iterable[str]) -> tuple[str, ...]:
    """Words that are long enough to be secrets, so that what is part of another comes after it."""
    return tuple(sorted({word for word in words if len(word) >= 4}, key=len, reverse=True))


def conceal(text: str, secrets: Collection[str]) -> str:
    """Return ``text`` with every one of ``secrets`` blotted out."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def cleanse(error: BaseException, secrets: Collection[str]) -> None:
    """Blot ``secrets`` out of a foreign error, and of those that led to it: a traceback shows them all.

    Stores quote what they were sent: S3 the key in its answer to a wrong one, the token in that to an expired one.
    """
    for link in _chain(error):
        link.args = tuple(_without(value, secrets) for value in link.args)
        for name in ("strerror", "filename", "filename2"):
            if isinstance(value := getattr(link, name, None), str):
                setattr(link, name, conceal(value, secrets))
        if notes := getattr(link, "__notes__", None):
            notes[:] = [conceal(note, secrets) for note in notes]
        if isinstance(response := getattr(link, "response", None), dict):
            link.response = _without(response, secrets)  # type: ignore[attr-defined] # botocore's parsed answer


def _without(value: Any, secrets: Collection[str]) -> Any:
    if isinstance(value, str):
        return conceal(value, secrets)
    if isinstance(value, dict):
        return {key: _without(entry, secrets) for key, entry in value.items()}
    return value


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        link = ahead.pop()
        if link is None or any(link is other for other in seen):
            continue
        seen.append(link)
        yield link
        ahead += [link.__cause__, link.__context__]
