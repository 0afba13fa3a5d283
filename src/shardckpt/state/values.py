"""Plain Python values as JSON, and back, without pickle.

JSON says str, bool, None, lists, dicts with string keys, finite floats and small ints by itself. What it cannot say
stands as an object with a single key that starts with ``$``:

.. code-block:: text

    {"$tensor": name}     {"$object": path}                        references into the manifest
    {"$tuple": [...]}     {"$set": [...]}     {"$frozenset": [...]}
    {"$dict": [[k, v]]}   {"$ordered": [[k, v]]}   {"$counter": [[k, v]]}   {"$defaultdict": [factory, [[k, v]]]}
    {"$int": "..."}       {"$float": "nan"}   {"$complex": ["re", "im"]}   {"$bytes": base64}   {"$str": base64}
    {"$utf32": base64}
    {"$size": [...]}      {"$dtype": "..."}   {"$device": "..."}   {"$numpy": [dtype, base64]}
    {"$path": "..."}      {"$purepath": ["PurePosixPath", "..."]}
    {"$datetime": iso}    {"$date": iso}      {"$time": iso}       {"$timedelta": [days, seconds, microseconds]}

`shardckpt.state.flatten` adds the tags of tensors' companions: ``$module``, ``$optimizer``, ``$sparse``, ``$ndarray``.
Types are matched exactly: a subclass (an enum, a namedtuple) is not its base, and is pickled instead. The same goes for
a time in a named zone, which its offset alone would not bring back.
"""

import base64
import collections
import datetime
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any, Final

import torch

from shardckpt.errors import CorruptCheckpointError, UnserialisableError, UsageError

Json = Any

_SAFE_INT: Final = 1 << 53
"""Past this, JSON readers in other languages lose digits."""

SIMPLE: Final = frozenset({bool, int, float, str, type(None)})
"""The types that JSON mostly says by itself, and of which states have long lists."""

FACTORIES: Final[dict[str, type]] = {t.__name__: t for t in (list, dict, set, tuple, int, float, str, bool, bytes)}
"""The default factories of a defaultdict that need no pickle; torch's own ``weights_only`` admits these builtins."""

_DECIMAL_BITS: Final = 4096
"""Past this, an int is written in hexadecimal: Python refuses to convert very long decimals, and to be made to."""

_PURE_PATHS: Final[dict[str, type[pathlib.PurePath]]] = {
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}

_NUMPY_DTYPE: Final = re.compile(r"[<>|=][?a-zA-Z]\d*(?:\[\d*[a-zA-Z]+\])?")
"""What ``numpy.dtype.str`` looks like where it is no structure; `numpy.dtype` itself understands far more."""

NOT_PLAIN: Final = object()
"""What `encode_scalar` returns for a value that is none of ours."""


def _encode_str(value: str) -> Json:
    try:
        value.encode()
    except UnicodeEncodeError:
        units = value.encode("utf-16-le", "surrogatepass")
        if units.decode("utf-16-le", "surrogatepass") == value:
            return {"$str": base64.b64encode(units).decode()}
        # Two surrogates that stand side by side by chance would come back as the one character that they make.
        return {"$utf32": base64.b64encode(value.encode("utf-32-le", "surrogatepass")).decode()}
    return value


def _encode_int(value: int) -> Json:
    if abs(value) <= _SAFE_INT:
        return value
    return {"$int": str(value) if value.bit_length() <= _DECIMAL_BITS else hex(value)}


def _encode_float(value: float) -> Json:
    return value if math.isfinite(value) else {"$float": repr(value)}


def _encode_time(value: datetime.datetime | datetime.time) -> Json:
    zone = value.tzinfo
    is_offset = zone is None or (
        type(zone) is datetime.timezone
        and zone.tzname(None) == datetime.timezone(zone.utcoffset(None)).tzname(None)  # no name of its own
    )
    if value.fold or not is_offset:
        return NOT_PLAIN
    return {"$datetime" if isinstance(value, datetime.datetime) else "$time": value.isoformat()}


_ENCODERS: Final[dict[type, Callable[[Any], Json]]] = {
    type(None): lambda _: None,
    bool: lambda value: value,
    str: _encode_str,
    int: _encode_int,
    float: _encode_float,
    complex: lambda value: {"$complex": [repr(value.real), repr(value.imag)]},
    bytes: lambda value: {"$bytes": base64.b64encode(value).decode()},
    torch.Size: lambda value: {"$size": list(value)},
    torch.dtype: lambda value: {"$dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"$device": str(value)},
    type(pathlib.Path()): lambda value: {"$path": _encode_str(str(value))},
    pathlib.PurePosixPath: lambda value: {"$purepath": ["PurePosixPath", _encode_str(str(value))]},
    pathlib.PureWindowsPath: lambda value: {"$purepath": ["PureWindowsPath", _encode_str(str(value))]},
    datetime.datetime: _encode_time,
    datetime.date: lambda value: {"$date": value.isoformat()},
    datetime.time: _encode_time,
    datetime.timedelta: lambda value: {"$timedelta": [value.days, value.seconds, value.microseconds]},
}


def encode_scalar(value: Any) -> Json:
    """The JSON of a value that holds no other values, or `NOT_PLAIN`."""
    encoder = _ENCODERS.get(type(value))
    return _encode_numpy(value) if encoder is None else encoder(value)


def _encode_numpy(value: Any) -> Json:
    # Asking the type's module first keeps numpy, which torch can do without, an optional import.
    if type(value).__module__ != "numpy":
        return NOT_PLAIN
    import numpy

    if not isinstance(value, numpy.generic) or value.dtype.hasobject or value.dtype.names is not None:
        return NOT_PLAIN
    if isinstance(value, numpy.str_):  # numpy's own bytes of a string without characters are not none
        data = value.encode("utf-32-le", "surrogatepass")
    else:
        data = bytes(value) if isinstance(value, numpy.bytes_) else value.tobytes()
    return {"$numpy": [value.dtype.str, base64.b64encode(data).decode()]}


def _decode_numpy(argument: list[str]) -> Any:
    try:
        import numpy
    except ImportError as error:
        raise UsageError("the state has a value of numpy, which is not installed here: pip install numpy") from error

    name, text = argument
    if not _NUMPY_DTYPE.fullmatch(name) or (dtype := numpy.dtype(name)).hasobject:
        raise ValueError(f"{name!r} is no dtype of a plain numpy scalar")
    data = base64.b64decode(text, validate=True)
    # Arrays drop the zeros at a string's end, and have no strings without characters.
    if dtype.kind == "S":
        return numpy.bytes_(data)
    if dtype.kind == "U":
        return numpy.str_(data.decode("utf-32-le", "surrogatepass"))
    if len(data) != dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for a numpy scalar of {dtype.itemsize}")
    return numpy.frombuffer(data, dtype=dtype)[0] if data else numpy.zeros((), dtype)[()]


def _decode_str(node: Json) -> str:
    """A string, or the node of one that is no UTF-8."""
    if isinstance(node, str):
        return node
    tag = tag_of(node)
    if tag not in ("$str", "$utf32"):
        raise ValueError(f"{node!r} is no text")
    return str(_DECODERS[tag](node[tag]))


def _decode_int(argument: str) -> int:
    return int(argument, 0)


def _decode_float(argument: str) -> float:
    if not isinstance(argument, str):
        raise TypeError(f"{type(argument).__name__} in place of a float's repr")
    return float(argument)


def _decode_pure_path(argument: list[Json]) -> pathlib.PurePath:
    kind, text = argument
    return _PURE_PATHS[kind](_decode_str(text))


def _decode_complex(argument: list[str]) -> complex:
    real, imaginary = argument
    return complex(_decode_float(real), _decode_float(imaginary))


def _decode_dtype(argument: str) -> torch.dtype:
    dtype = vars(torch).get(argument)  # not getattr: for some names it imports modules
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this torch has no dtype {argument!r}")
    return dtype


_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "$int": _decode_int,
    "$float": _decode_float,
    "$complex": _decode_complex,
    "$bytes": lambda argument: base64.b64decode(argument, validate=True),
    "$str": lambda argument: base64.b64decode(argument, validate=True).decode("utf-16-le", "surrogatepass"),
    "$utf32": lambda argument: base64.b64decode(argument, validate=True).decode("utf-32-le", "surrogatepass"),
    "$size": torch.Size,
    "$dtype": _decode_dtype,
    "$device": torch.device,
    "$path": lambda argument: pathlib.Path(_decode_str(argument)),
    "$purepath": _decode_pure_path,
    "$numpy": _decode_numpy,
    "$datetime": datetime.datetime.fromisoformat,
    "$date": datetime.date.fromisoformat,
    "$time": datetime.time.fromisoformat,
    "$timedelta": lambda argument: datetime.timedelta(*argument),
}


def tag_of(node: Json) -> str | None:
    """The ``$`` tag of a node of the skeleton; None where the node speaks plain JSON."""
    if isinstance(node, dict) and len(node) == 1:
        (tag,) = node
        if tag.startswith("$"):
            return str(tag)
    return None


def decode_scalar(node: Json, path: str) -> Any:
    """The value of a scalar node. Raises CorruptCheckpointError for an unknown tag or an impossible argument."""
    tag = tag_of(node)
    try:
        if tag is None:
            if isinstance(node, (dict, list)):
                raise TypeError("it is no single value")
            return node
        return _DECODERS[tag](node[tag])
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError, AttributeError, ArithmeticError) as error:
        raise CorruptCheckpointError(
            f"the value at {path or 'the root'!r} has tag {tag!r} and cannot be read: {error}. The manifest is damaged."
        ) from error


def encode_key(key: Any, path: str) -> Json:
    """The node of a key of the dict at ``path``; raises UnserialisableError for one that is no plain value."""
    if type(key) is str and key.isascii():
        return key
    if type(key) is tuple:
        return {"$tuple": [encode_key(item, path) for item in key]}
    encoded = encode_scalar(key)
    if encoded is NOT_PLAIN:
        raise UnserialisableError(
            f"the dict at {path or 'the root'!r} has a key of type {type(key).__name__}: {key!r}. Keys are plain"
            " values."
        )
    return encoded


def decode_key(node: Json, path: str) -> Any:
    """The key of a dict that a node stands for; raises as `decode_scalar` does."""
    if tag_of(node) == "$tuple":
        return tuple(decode_key(item, path) for item in node["$tuple"])
    return decode_scalar(node, path)


def encode_pairs(value: dict[Any, Any], pairs: list[list[Json]]) -> Json:
    """The JSON of a dict of one of the known dict types, given its encoded items in order."""
    if type(value) is collections.OrderedDict:
        return {"$ordered": pairs}
    if type(value) is collections.Counter:
        return {"$counter": pairs}
    if type(value) is collections.defaultdict:
        factory = value.default_factory
        return {"$defaultdict": [None if factory is None else getattr(factory, "__name__", None), pairs]}
    return _plain_dict(pairs)


def with_pairs(node: Json, pairs: list[list[Json]]) -> Json:
    """A dict node of the same kind as ``node``, with other (key node, value node) items."""
    tag = tag_of(node)
    if tag == "$defaultdict":
        return {tag: [node[tag][0], pairs]}
    return {tag: pairs} if tag in ("$ordered", "$counter") else _plain_dict(pairs)


def _plain_dict(pairs: list[list[Json]]) -> Json:
    if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
        return dict(pairs)
    return {"$dict": pairs}


def is_plain_dict(value: Any) -> bool:
    """Whether a value is a dict that `encode_pairs` can say."""
    if type(value) is collections.defaultdict:
        factory = value.default_factory
        return factory is None or FACTORIES.get(getattr(factory, "__name__", "")) is factory
    return type(value) in (dict, collections.OrderedDict, collections.Counter)


def pairs_of(node: Json) -> list[tuple[Json, Json]] | None:
    """The (key node, value node) items of a dict node in order; None where the node is no dict."""
    tag = tag_of(node)
    if tag is None:
        return list(node.items()) if isinstance(node, dict) else None
    if tag in ("$dict", "$ordered", "$counter"):
        return [(key, value) for key, value in node[tag]]
    if tag == "$defaultdict":
        return [(key, value) for key, value in node[tag][1]]
    return None


def empty_dict_of(node: Json) -> dict[Any, Any]:
    """An empty dict of the type that a dict node stands for."""
    match tag_of(node):
        case "$ordered":
            return collections.OrderedDict()
        case "$counter":
            return collections.Counter()
        case "$defaultdict":
            name = node["$defaultdict"][0]
            if name is not None and name not in FACTORIES:
                raise CorruptCheckpointError(
                    f"a defaultdict has the unknown factory {name!r}; the manifest is damaged."
                )
            return collections.defaultdict(FACTORIES[name] if name is not None else None)
        case _:
            return {}
