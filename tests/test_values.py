"""Plain values as JSON: every kind comes back as it was, and a hostile node is a clear error."""
# ruff: noqa: DTZ001 - naive times are values too

import collections
import datetime
import enum
import math
import pathlib
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt
from shardckpt import manifest as mf
from shardckpt.errors import CorruptCheckpointError
from shardckpt.state import Maker, flatten, values

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(1 << 70), max_value=1 << 70)
    | st.floats(allow_subnormal=True)
    | st.text(st.characters())
    | st.text(st.characters(categories=("Cs", "Lu")))
    | st.binary()
    | st.complex_numbers(allow_nan=True, allow_infinity=True)
    | st.datetimes(allow_imaginary=False).map(lambda value: value.replace(fold=0))
    | st.datetimes(timezones=st.sampled_from([datetime.UTC, datetime.timezone(datetime.timedelta(hours=-7))])).map(
        lambda value: value.replace(fold=0)
    )
    | st.dates()
    | st.times().map(lambda value: value.replace(fold=0))
    | st.timedeltas()
    | st.sampled_from([torch.float32, torch.bfloat16, torch.qint8, torch.device("cpu"), torch.device("cuda:3")])
    | st.lists(st.integers(0, 9)).map(torch.Size)
    | st.text(st.characters(exclude_characters="\0/")).map(pathlib.Path)
    | st.floats(width=32).map(numpy.float32)
    | st.integers(-128, 127).map(numpy.int8)
    | st.booleans().map(numpy.bool_)
    | st.text().map(numpy.str_)
    | st.binary().map(numpy.bytes_)
)
KEYS = SCALARS.filter(lambda key: key == key) | st.tuples(st.integers(), st.text())  # nan is no key to find anything by
STATES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.sampled_from(["$tuple", "$tensor", "$", "a.b", ""]), inner, max_size=2)
        | st.dictionaries(KEYS, inner, max_size=4).map(collections.OrderedDict)
        | st.dictionaries(st.text(), st.integers(), max_size=4).map(collections.Counter)
        | st.dictionaries(st.text(), inner, max_size=3).map(lambda items: collections.defaultdict(list, items))
        | st.sets(KEYS, max_size=4)
        | st.frozensets(KEYS, max_size=4)
    ),
    max_leaves=12,
)


def through_json(state: Any) -> Any:
    """The state, flattened, encoded as a manifest is, decoded, and made anew."""
    flat = flatten(state, replicated=False, include=None, exclude=None, rank=0)
    assert not flat.tensors
    assert not flat.objects
    manifest = mf.Manifest(
        save_id="0" * 12, created="", world_size=1, writer={}, files=[], state=flat.skeleton, tensors={}
    )
    manifest = mf.decode_manifest(mf.encode(manifest), "here")
    return new(manifest.state)


def new(node: Any) -> Any:
    manifest = mf.Manifest(save_id="0" * 12, created="", world_size=1, writer={}, files=[], state=node, tensors={})
    return Maker(manifest, lambda tensor, _: tensor).new(node, "")()


def same(a: Any, b: Any) -> bool:
    """Equal in type, value, order and sign of zero; nan equals nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and not isinstance(a, numpy.generic):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, numpy.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        if isinstance(a, collections.defaultdict) and a.default_factory is not b.default_factory:
            return False
        return len(a) == len(b) and all(
            same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)) and not isinstance(a, torch.Size):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (datetime.datetime, datetime.time)):
        return a == b and str(a.tzinfo) == str(b.tzinfo)
    return bool(a == b)


@settings(max_examples=100, deadline=None)
@given(STATES)
def test_every_plain_value_comes_back_as_it_was(value):
    """What is plain needs no pickle and loses nothing: type, order, sign of zero, digits, broken Unicode."""
    assert same(through_json({"value": value})["value"], value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, complex(-0.0, math.nan),
        (1 << 53) + 1, -(1 << 64), 7**9000, -(7**9000), True, 1, 1.0, "", "$tensor", "\ud800", "\0", b"", b"\0",
        "\ud800\udc00", pathlib.Path("\ud800\udc00"),
        numpy.str_(""), numpy.bytes_(b"a\0"), numpy.str_("a\0"), numpy.datetime64("2020-01-01"),
        numpy.timedelta64(3, "s"), numpy.float64(-0.0), numpy.longdouble(1) / 3, numpy.uint64((1 << 64) - 1),
        numpy.complex64(1j), numpy.float16(0.1), pathlib.Path("a/\udce4b"), pathlib.PurePosixPath("/x"),
        pathlib.PureWindowsPath("C:\\x"), torch.Size([]), torch.complex32, torch.device("meta"),
        datetime.datetime(2024, 2, 29, 1, 2, 3, 4), datetime.datetime.max.replace(tzinfo=datetime.UTC),
        datetime.time(1, 2, tzinfo=datetime.timezone(datetime.timedelta(seconds=1))),
        datetime.timedelta(-1, 2, 3), {1: 1, "1": 2, (1, "1"): 3, None: 4, True.__class__.__name__: 5},
        {"$dict": [], "x": 1}, {"$dict": []}, set(), frozenset({(1, (2,))}), [[], {}, ()], {b"k": [1]},
        collections.OrderedDict([("b", 1), ("a", 2)]), collections.Counter("abca"),
        collections.defaultdict(int, {"x": 1}), collections.defaultdict(None, {"x": 1}), {"": {"": 1}},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_hard_values(value):
    """The values that JSON, numpy or Python's own parsers are known to lose."""
    assert same(through_json({"value": value})["value"], value)


class Color(enum.IntEnum):
    RED = 1


class Name(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        Color.RED,
        Name("x"),
        datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=1), "CET")),
        datetime.datetime(2024, 10, 27, 2, 30, fold=1),
        range(3),
        bytearray(b"x"),
        collections.deque([1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_quite_plain_is_pickled_not_flattened(value):
    """A subclass, a named zone, a fold: JSON would bring back something else, so it is an object."""
    flat = flatten({"value": value}, replicated=False, include=None, exclude=None, rank=0)
    assert flat.skeleton == {"value": {"$object": "value"}}


@pytest.mark.parametrize(
    "node",
    [
        {"$what": 1}, {"$int": 5}, {"$int": "x"}, {"$int": "9" * 5000}, {"$float": []}, {"$float": 1.0},
        {"$complex": ["1"]}, {"$complex": 5}, {"$bytes": "?"}, {"$bytes": 7}, {"$str": "AAA"}, {"$size": ["a"]},
        {"$size": 3}, {"$dtype": "compile"}, {"$dtype": "nn"}, {"$dtype": ["float32"]},
        {"$device": "nowhere"}, {"$device": {}}, {"$path": 1}, {"$path": {"$str": "!"}}, {"$purepath": ["os", "x"]},
        {"$purepath": "x"}, {"$numpy": ["O", ""]}, {"$numpy": ["|O", "AAAAAAAAAAA="]}, {"$numpy": ["i4,i4", ""]},
        {"$numpy": ["<f4", "AA=="]}, {"$numpy": ["<f4", "AAAAAAAAAAA="]}, {"$numpy": ["(", ""]},
        {"$numpy": ["|V99999999999999999999", ""]}, {"$numpy": "<f4"}, {"$numpy": [{}, ""]},
        {"$datetime": 5}, {"$datetime": "yesterday"}, {"$date": None}, {"$time": "25:00"}, {"$timedelta": [1 << 80]},
        {"$timedelta": ["x", 1, 1]}, {"$timedelta": 5}, {"$defaultdict": ["eval", []]},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_node_is_a_corrupt_checkpoint(node):
    """A damaged or hostile manifest raises our own error, whatever is in it, and runs nothing."""
    with pytest.raises(CorruptCheckpointError):
        new({"value": node})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 53), 1 << 53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(), inner, max_size=2)
        | st.dictionaries(st.sampled_from(sorted(values._DECODERS)), inner, min_size=1, max_size=1)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(values._DECODERS)), JSON)
def test_no_argument_of_a_tag_raises_anything_else(tag, argument):
    """Whatever stands beside a tag: a value, or the error that says the manifest is damaged."""
    try:
        values.decode_scalar({tag: argument}, "x")
    except CorruptCheckpointError:
        pass


def test_plain_values_need_no_pickle_on_disk(tmp_path):
    """A checkpoint of plain values has no pickle file, and loads under weights_only."""
    state = {
        "when": datetime.datetime(2024, 1, 1),
        "n": 7**9000,
        "path": pathlib.Path("\udce4"),
        "\ud800": {1: "\udfff"},
    }
    shardckpt.save(state, tmp_path / "ck")
    assert not list((tmp_path / "ck").glob("*.pkl"))
    assert shardckpt.load(tmp_path / "ck") == state
