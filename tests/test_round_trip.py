"""One process saves and loads: every kind of tensor and container, through every way of saving."""

import argparse
import collections
import dataclasses
import io
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import shardckpt
from shardckpt import StateMismatchError, UnsafeLoadError, UnserialisableError, UsageError
from shardckpt.codecs import DTYPES
from states import bits

Save = Callable[[Any, Any], Any]


@pytest.fixture(params=["sync", "async", "zstd", "async zstd"])
def save(request) -> Save:
    compression = "zstd" if "zstd" in request.param else None
    if "async" in request.param:
        return lambda state, path: shardckpt.async_save(state, path, compression=compression).result(60)
    return lambda state, path: shardckpt.save(state, path, compression=compression)


def noise(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor of any dtype whose bytes are noise, nan's and denormals' among them; bools stay bools."""
    size = torch.empty((), dtype=dtype).element_size()
    octets = torch.randint(0, 2 if dtype is torch.bool else 256, (torch.Size(shape).numel() * size,), dtype=torch.uint8)
    return octets.view(dtype).view(shape)


def variants(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "flat": noise(dtype, 5),
        "scalar": noise(dtype),
        "one": noise(dtype, 1, 1),
        "empty": noise(dtype, 0),
        "hollow": noise(dtype, 3, 0, 2),
        "turned": noise(dtype, 4, 6).t(),
        "strided": noise(dtype, 9, 7)[1::3, ::2],
        "expanded": noise(dtype, 3, 1).expand(3, 4),
        "shifted": noise(dtype, 7)[3:],
        "permuted": noise(dtype, 2, 3, 4, 5).to(memory_format=torch.channels_last),
    }


def same_tensors(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype is b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert bits(a[name]) == bits(b[name]), name


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype_and_layout_bitwise(tmp_path, save):
    """Every dtype that torch saves, in every layout, comes back bit for bit: anew, in a list, and in place."""
    torch.manual_seed(0)
    state = {name: variants(dtype) for name, dtype in DTYPES.items()}
    state["list"] = [tensor for tensors in list(state.values()) for tensor in tensors.values()]
    state["alone"] = [noise(dtype, 2, 3) for dtype in DTYPES.values()]
    save(state, tmp_path / "ck")
    loaded = shardckpt.load(tmp_path / "ck")
    for name in DTYPES:
        same_tensors(loaded[name], state[name])
    for a, b in zip(loaded["list"] + loaded["alone"], state["list"] + state["alone"], strict=True):
        assert a.dtype is b.dtype
        assert bits(a) == bits(b)
    live = {
        dtype: {name: torch.empty_like(tensor) for name, tensor in variants(DTYPES[dtype]).items()} for dtype in DTYPES
    }
    pointers = {dtype: {name: tensor.data_ptr() for name, tensor in live[dtype].items()} for dtype in live}
    shardckpt.load(tmp_path / "ck", live)
    for name in DTYPES:
        same_tensors(live[name], state[name])
        assert pointers[name] == {key: tensor.data_ptr() for key, tensor in live[name].items()}


def test_conjugate_and_negative_views_are_resolved(tmp_path, save):
    """The raw bytes of a lazy conjugate or negative are not its value; nor are they when it is the one to be filled."""
    x = torch.randn(6, 5, dtype=torch.complex64)
    state = {
        "conj": x.conj(),
        "both": x.conj().t()[1:],
        "neg": x.conj().imag,
        "neg_strided": x.conj().imag[::2],
        "x": x,
    }
    save(state, tmp_path / "ck")
    expected = {name: tensor.resolve_conj().resolve_neg().clone() for name, tensor in state.items()}
    same_tensors(shardckpt.load(tmp_path / "ck"), expected)
    y = torch.zeros(6, 5, dtype=torch.complex64)
    live = {"conj": y.conj(), "neg": torch.zeros(6, 5, dtype=torch.complex64).conj().imag}
    shardckpt.load(tmp_path / "ck", live)
    assert torch.equal(y, x)
    assert torch.equal(live["neg"], expected["neg"])
    assert live["neg"].is_neg()


def test_big_tensors_cross_staging_blocks(tmp_path, save):
    """Tensors longer than a block, contiguous or not, and the ones that lie across two blocks."""
    state = {
        "odd": noise(torch.uint8, 3),
        "big": noise(torch.float32, 1031, 2111),
        "turned": noise(torch.int16, 1031, 2111).t(),
        "z": noise(torch.complex128, 5),
    }
    save(state, tmp_path / "ck")
    same_tensors(shardckpt.load(tmp_path / "ck"), state)
    live = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    live["big"] = torch.empty(2111, 1031).t()
    shardckpt.load(tmp_path / "ck", live)
    same_tensors(live, state)


def shard_bytes(path: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def test_shared_tensors_are_stored_once_and_shared_again(tmp_path):
    """Tied weights cost their bytes once, and are one memory again when the checkpoint is loaded anew."""
    shared = torch.randn(1 << 18)
    state = {"a": shared, "b": [shared, shared.view(512, 512)], "c": {"d": shared.detach()}}
    shardckpt.save(state, tmp_path / "ck")
    assert shard_bytes(tmp_path / "ck") < 2 * shared.nbytes + 10_000
    loaded = shardckpt.load(tmp_path / "ck")
    assert loaded["a"].data_ptr() == loaded["b"][0].data_ptr() == loaded["c"]["d"].data_ptr()
    loaded["a"].fill_(7)
    assert loaded["c"]["d"].sum() == 7 * (1 << 18)
    assert torch.equal(loaded["b"][1].flatten(), shared)


def test_overlapping_views_are_not_confused(tmp_path):
    """Views of one memory that are not the same view are different tensors, equal starts and sizes notwithstanding."""
    x = torch.arange(12.0)
    square = torch.arange(9.0).view(3, 3)
    state = {
        "all": x, "head": x[:6], "tail": x[6:], "grid": x.view(3, 4), "ints": x.view(torch.int32),
        "square": square, "turned": square.t(), "row": square[0], "column": square[:, 0],
        "z": (z := torch.randn(3, dtype=torch.complex64)), "conj": z.conj(), "none": x[:0], "none2": x[:0],
    }  # fmt: skip
    shardckpt.save(state, tmp_path / "ck")
    same_tensors(shardckpt.load(tmp_path / "ck"), {k: v.resolve_conj() for k, v in state.items()})


def test_tied_at_save_untied_at_load_and_the_reverse(tmp_path):
    """Each live tensor gets its value; that one memory can keep only one of two is never passed over in silence."""
    shared = torch.randn(5)
    shardckpt.save({"a": shared, "b": shared}, tmp_path / "tied")
    live = {"a": torch.zeros(5), "b": torch.ones(5)}
    shardckpt.load(tmp_path / "tied", live)
    assert torch.equal(live["a"], shared)
    assert torch.equal(live["b"], shared)
    assert live["a"].data_ptr() != live["b"].data_ptr()
    shardckpt.save({"a": torch.zeros(5), "b": torch.ones(5)}, tmp_path / "untied")
    before = shared.clone()
    with pytest.raises(StateMismatchError, match="b: one memory with 'a' here, another tensor in the checkpoint"):
        shardckpt.load(tmp_path / "untied", {"a": shared, "b": shared})
    assert torch.equal(shared, before)
    report = shardckpt.load(tmp_path / "untied", {"a": shared, "b": shared}, strict=False)
    assert (report.restored, len(report.mismatched)) == (["a"], 1)
    assert torch.equal(shared, torch.zeros(5))


PLAIN = {
    "t": torch.arange(6.0).view(2, 3),
    "nested": {1: torch.ones(2), "1": torch.zeros(2), "a.b": torch.full((2,), 3.0), "a": {"b": torch.full((2,), 4.0)}},
    ("k", 1): [torch.tensor(5), (1, torch.tensor(6.0), None)],
    "ordered": collections.OrderedDict([("z", torch.tensor(1)), ("a", 2)]),
    "default": collections.defaultdict(list, {"x": [torch.tensor(2)]}),
    "counter": collections.Counter("hello"),
    "set": {1, 2, 3},
    "size": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "big": 7**300,
    "floats": [float("inf"), -0.0, 1e-320],
    "bytes": b"\x00\xff",
    "complex": 1 - 2j,
    "none": None,
    "rng": torch.get_rng_state(),
    "tuple": (),
    "empty": {},
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype is b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, numpy.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


def test_load_without_a_template_is_what_torch_load_gives(tmp_path, save):
    """A plain state comes back as torch.save and torch.load would bring it: same types, order, keys and bits."""
    save(PLAIN, tmp_path / "ck")
    buffer = io.BytesIO()
    torch.save(PLAIN, buffer)
    buffer.seek(0)
    loaded = shardckpt.load(tmp_path / "ck")
    assert equal(loaded, torch.load(buffer, weights_only=False))
    assert equal(loaded, PLAIN)


TENSORS = st.tuples(
    st.sampled_from(sorted(DTYPES.keys() - {"complex32", "float4_e2m1fn_x2"})),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 9),
).map(lambda drawn: noise(DTYPES[drawn[0]], *drawn[1]))
NESTED = st.recursive(
    TENSORS | st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.integers(0, 3), inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "a.b", "", "~2"]), inner, max_size=3).map(collections.OrderedDict)
    ),
    max_leaves=10,
)


def blank(value: Any) -> Any:
    """The state with its tensors emptied and its plain values forgotten."""
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return type(value)((key, blank(item)) for key, item in value.items())
    return type(value)(blank(item) for item in value) if isinstance(value, (list, tuple)) else "forgotten"


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=2), NESTED, max_size=4))
def test_any_nested_state(tmp_path_factory, state):
    """Whatever its shape and its keys: it comes back anew, and into a live state of the same shape."""
    path = tmp_path_factory.getbasetemp() / "nested"
    shardckpt.save(state, path)
    assert equal(shardckpt.load(path), state)
    live = blank(state)
    report = shardckpt.load(path, live)
    assert equal(live, state)
    assert not report.skipped


def test_names_that_clash_or_are_odd(tmp_path):
    """Keys that make one name, reserved and unprintable names: each tensor is itself."""
    keys = ["", "a.b", "a", "__metadata__", "\ud800", "é", "\n", "x[0:1]", "$tensor", "a~2", "a.b~2", 1, "1", 1.5, None]
    state: dict[Any, Any] = {key: torch.full((2,), float(i)) for i, key in enumerate(keys)}
    state["a"] = {"b": torch.full((2,), 50.0), "b~2": torch.full((2,), 51.0), "": {"": torch.full((2,), 52.0)}}
    state["x"] = torch.full((2,), 60.0)
    shardckpt.save(state, tmp_path / "ck")
    assert equal(shardckpt.load(tmp_path / "ck"), state)
    live = {key: torch.zeros(2) for key in keys if key != "a"}
    shardckpt.load(tmp_path / "ck", live)
    assert equal(live, {key: state[key] for key in live})


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Config:
    rate: float
    weight: Tensor


def test_objects_are_refused_by_path_unless_trusted(tmp_path):
    """Pickles run code: weights_only names the path of the first, and only a caller's word lets it through."""
    state = {"deep": [{"point": Point(1, torch.ones(2))}], "config": Config(0.1, torch.zeros(3))}
    shardckpt.save(state, tmp_path / "ck")
    for weights_only in (None, True):
        with pytest.raises(UnsafeLoadError, match=r"deep\.0\.point"):
            shardckpt.load(tmp_path / "ck", weights_only=weights_only)
    live = {"deep": None, "config": None}
    with pytest.raises(UnsafeLoadError):
        shardckpt.load(tmp_path / "ck", live)
    assert live == {"deep": None, "config": None}
    shardckpt.load(tmp_path / "ck", live, weights_only=False)
    assert live["deep"][0]["point"] == Point(1, live["deep"][0]["point"].y)
    assert live["config"].rate == 0.1
    assert torch.equal(live["config"].weight, torch.zeros(3))


def test_only_what_is_asked_for_must_be_safe(tmp_path):
    """An object elsewhere in the checkpoint does not stand in the way of the model."""
    shardckpt.save({"model": torch.ones(3), "odd": Point(1, 2)}, tmp_path / "ck")
    live = {"model": torch.zeros(3)}
    assert shardckpt.load(tmp_path / "ck", live).skipped == ["odd"]
    assert torch.equal(live["model"], torch.ones(3))


def test_torchs_allow_list_is_ours(tmp_path):
    """What a user has told torch to trust is trusted here too, inside the context and not after it."""
    shardckpt.save({"point": Point(1, 2), "config": Config(0.5, torch.ones(1))}, tmp_path / "ck")
    with torch.serialization.safe_globals([Point, Config]):
        loaded = shardckpt.load(tmp_path / "ck")
    assert loaded["point"] == Point(1, 2)
    assert loaded["config"].rate == 0.5
    with pytest.raises(UnsafeLoadError, match="point"):
        shardckpt.load(tmp_path / "ck")


def test_objects_whose_paths_are_one_name(tmp_path):
    """Two objects never overwrite each other, whatever their keys are."""
    state = {"a": {"b": Point(1, 1)}, "a.b": Point(2, 2), "n": {1: Point(3, 3), "1": Point(4, 4)}}
    shardckpt.save(state, tmp_path / "ck")
    assert shardckpt.load(tmp_path / "ck", weights_only=False) == state


def test_what_cannot_be_stored_is_named(tmp_path):
    """A lambda, a cycle, an odd key, endless depth, a lazy or data-less tensor: the path, and nothing on disk."""
    cycle: dict[str, Any] = {}
    cycle["again"] = [cycle]
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    states = {
        r"state\.fn": {"state": {"fn": lambda: 1}},
        r"state\.again\.0": {"state": cycle},
        r"0\.0\.0": {"deep": deep},
        "key of type Point": {"d": {Point(1, 2): 1}},
        "model.weight": {"model": nn.LazyLinear(3)},
        "'m' is on the meta": {"m": torch.empty(3, device="meta")},
        "'s'": {"s": {torch.ones(1)}},
    }
    for message, state in states.items():
        with pytest.raises(UnserialisableError, match=message):
            shardckpt.save(state, tmp_path / "ck")
    assert not (tmp_path / "ck").exists()


@pytest.mark.parametrize("state", [[1], (1,), 5, "x", torch.ones(1), {1}, argparse.Namespace(a=1)], ids=repr)
def test_a_state_is_a_dict_or_stateful(tmp_path, state):
    """Anything else would have no place to restore into, so neither save nor load takes it."""
    with pytest.raises(UsageError, match="a state is a dict"):
        shardckpt.save(state, tmp_path / "ck")
    shardckpt.save({"a": 1}, tmp_path / "ok")
    with pytest.raises(UsageError, match="a state is a dict"):
        shardckpt.load(tmp_path / "ok", state)


class Box(dict):
    """A dict subclass, as configuration libraries have them."""


def test_a_dict_subclass_is_a_state_at_the_root(tmp_path):
    """A state in an EasyDict or its like is saved as tensors, not as one pickle."""
    shardckpt.save(Box(w=torch.ones(3), n=1), tmp_path / "ck")
    assert not list((tmp_path / "ck").glob("*.pkl"))
    live = Box(w=torch.zeros(3), n=0)
    shardckpt.load(tmp_path / "ck", live)
    assert live["n"] == 1
    assert torch.equal(live["w"], torch.ones(3))


def arrays() -> dict[str, numpy.ndarray]:
    frozen = numpy.arange(4)
    frozen.flags.writeable = False
    return {
        "f": numpy.random.default_rng(0).normal(size=(3, 4)),
        "i": numpy.arange(5, dtype=numpy.uint16),
        "b": numpy.array([True, False]),
        "c": numpy.array([1j, 2], dtype=numpy.complex64),
        "h": numpy.array([1.5], dtype=numpy.float16),
        "scalar": numpy.array(3.0),
        "empty": numpy.zeros((0, 3)),
        "backwards": numpy.arange(6)[::-1],
        "turned": numpy.arange(6).reshape(2, 3).T,
        "frozen": frozen,
    }


def test_numpy_arrays_need_no_pickle(tmp_path, save):
    """Arrays of numbers are stored like tensors and come back as arrays, read-only and backward ones too."""
    save(arrays(), tmp_path / "ck")
    assert equal(shardckpt.load(tmp_path / "ck"), arrays())
    assert equal(shardckpt.load(tmp_path / "ck", map_location="meta"), arrays())


def test_numpy_arrays_that_torch_does_not_know_are_objects(tmp_path):
    """Strings, dates, structures and foreign byte orders are pickled, as torch.save has them."""
    state = {
        "text": numpy.array(["a", "bc"]),
        "date": numpy.array(["2020-01-01"], dtype="datetime64[D]"),
        "record": numpy.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    }
    swapped = numpy.arange(3, dtype=">i4")
    shardckpt.save(state | {"swapped": swapped}, tmp_path / "ck")
    loaded = shardckpt.load(tmp_path / "ck", weights_only=False)
    assert numpy.array_equal(loaded.pop("swapped"), swapped)  # numpy's own pickle turns the bytes
    assert equal(loaded, state)


def test_the_snapshot_is_the_call(tmp_path):
    """Whatever changes after async_save returned is not in the checkpoint: tensors, arrays, plain values, objects."""
    state = {
        "t": torch.zeros(1 << 20),
        "array": numpy.zeros(1 << 16),
        "list": [1, [2]],
        "dict": {"a": 1},
        "object": Config(1.0, torch.zeros(2)),
        "sparse": torch.eye(3).to_sparse(),
        "turned": torch.zeros(700, 900).t(),
    }
    pending = shardckpt.async_save(state, tmp_path / "ck")
    state["t"].fill_(1)
    state["array"][:] = 1
    state["list"][1].append(3)
    state["dict"]["b"] = 2
    state["object"].rate = 2.0
    state["object"].weight.fill_(1)
    state["sparse"]._values().fill_(9)
    state["turned"].fill_(1)
    pending.result(60)
    loaded = shardckpt.load(tmp_path / "ck", weights_only=False)
    assert loaded["t"].sum() == loaded["turned"].sum() == loaded["array"].sum() == 0
    assert loaded["list"] == [1, [2]]
    assert loaded["dict"] == {"a": 1}
    assert loaded["object"].rate == 1.0
    assert loaded["object"].weight.sum() == 0
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(3))


def test_prng_state_continues_the_stream(tmp_path):
    """A generator's state is a uint8 tensor like any other, and torch takes it back."""
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(5)
    shardckpt.save({"torch": torch.get_rng_state(), "mine": generator.get_state()}, tmp_path / "ck")
    expected = torch.rand(3), torch.rand(3, generator=generator)
    loaded = shardckpt.load(tmp_path / "ck")
    torch.set_rng_state(loaded["torch"])
    generator.set_state(loaded["mine"])
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(torch.rand(3, generator=generator), expected[1])


def test_map_location_is_that_of_torch_load(tmp_path):
    """None, a string, a device, a dict of tags, a callable: what torch.load documents, called once per tensor."""
    x = torch.arange(4.0)
    shardckpt.save({"x": x, "same": x, "n": 1}, tmp_path / "ck")

    def load(map_location: Any) -> Any:
        return shardckpt.load(tmp_path / "ck", map_location=map_location)

    for where in (None, "cpu", torch.device("cpu"), {"cuda:1": "cuda:0"}, {"cpu": "cpu"}, lambda storage, tag: storage):
        loaded = load(where)
        assert torch.equal(loaded["x"], x)
        assert loaded["x"].data_ptr() == loaded["same"].data_ptr()
    seen = []

    def remember(storage: Any, tag: str) -> None:
        seen.append((type(storage), storage.device.type, tag))

    assert torch.equal(load(remember)["x"], x)
    assert seen == [(torch.UntypedStorage, "cpu", "cpu")]
    assert torch.equal(load(lambda storage, _: storage.clone())["x"], x)
    for where in ("meta", torch.device("meta"), {"cpu": "meta"}):
        loaded = load(where)
        assert loaded["x"].is_meta
        assert loaded["x"].shape == (4,)
        assert loaded["n"] == 1
    with pytest.raises(UsageError, match="map_location"):
        load(5)


def test_map_location_leaves_live_tensors_where_they_are(tmp_path):
    """Loading in place it decides only for what has no live tensor."""
    shardckpt.save({"live": torch.ones(2), "new": torch.ones(3)}, tmp_path / "ck")
    live = {"live": torch.zeros(2), "new": None}
    shardckpt.load(tmp_path / "ck", live, map_location="meta")
    assert torch.equal(live["live"], torch.ones(2))
    assert live["new"].is_meta


def coordinates() -> dict[str, Tensor]:
    def coo(indices: Any, values: Tensor, size: tuple[int, ...]) -> Tensor:
        return torch.sparse_coo_tensor(torch.as_tensor(indices), values, size, check_invariants=True)

    return {
        "coo": torch.tensor([[0, 1.5, 0], [2.0, 0, 0]]).to_sparse(),
        "uncoalesced": coo([[0, 0], [1, 1]], torch.tensor([1.0, 2.0]), (2, 3)),
        "hybrid": coo([[1, 0]], torch.randn(2, 4), (3, 4)),
        "hollow": coo(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), (2, 3)),
    }


def compressed() -> dict[str, Tensor]:
    dense = torch.tensor([[0, 1.5, 0, 0], [2.0, 0, 0, 3]])
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls these layouts a beta
        return {
            "csr": dense.to_sparse_csr(),
            "csc": dense.to_sparse_csc(),
            "bsr": dense.to_sparse_bsr((1, 2)),
            "bsc": dense.to_sparse_bsc((2, 1)),
        }


def test_sparse_tensors_are_stored_as_their_parts(tmp_path, save):
    """Every sparse layout comes back with its parts, coalesced or not; as a live value it is replaced."""
    state = coordinates() | compressed()
    save(state, tmp_path / "ck")
    assert not list((tmp_path / "ck").glob("*.pkl"))
    live: dict[str, Any] = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in live.values():
        (tensor._values() if tensor.is_sparse else tensor.values()).zero_()
    shardckpt.load(tmp_path / "ck", live)
    for loaded in (shardckpt.load(tmp_path / "ck"), live):
        for name, tensor in state.items():
            assert loaded[name].layout is tensor.layout
            assert loaded[name].shape == tensor.shape
            assert torch.equal(loaded[name].to_dense(), tensor.to_dense()), name
    assert not loaded["uncoalesced"].is_coalesced()
    assert loaded["coo"].is_coalesced()


class Tagged(Tensor):
    pass


@pytest.mark.filterwarnings("ignore")  # torch calls quantized tensors obsolete and nested ones a prototype
def test_other_kinds_of_tensor_go_through_torch_or_are_refused(tmp_path):
    """Quantized and nested tensors and subclasses are never stored as something else."""
    state = {
        "quantized": torch.quantize_per_tensor(torch.tensor([0.5, 1.0]), 0.1, 2, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "tagged": torch.ones(3).as_subclass(Tagged),
    }
    shardckpt.save(state, tmp_path / "ck")
    loaded = shardckpt.load(tmp_path / "ck", weights_only=False)
    assert loaded["quantized"].is_quantized
    assert torch.equal(loaded["quantized"].dequantize(), state["quantized"].dequantize())
    assert loaded["nested"].is_nested
    assert torch.equal(loaded["nested"].values(), state["nested"].values())
    assert type(loaded["tagged"]) is Tagged
    assert torch.equal(loaded["tagged"].as_subclass(Tensor), torch.ones(3))
    with pytest.raises(UnsafeLoadError, match="tagged"):
        shardckpt.load(tmp_path / "ck")


def test_read_tensor_reads_one(tmp_path, save):
    """One tensor by name, an alias too; a wrong name says what is near."""
    x = torch.randn(4, 3)
    save({"model": {"head": {"weight": x}, "tied": x}}, tmp_path / "ck")
    assert torch.equal(shardckpt.read_tensor(tmp_path / "ck", "model.head.weight"), x)
    assert torch.equal(shardckpt.read_tensor(tmp_path / "ck", "model.tied"), x)
    with pytest.raises(KeyError, match=r"model\.head\.weight"):
        shardckpt.read_tensor(tmp_path / "ck", "model.head.wieght")


def test_an_expanded_live_tensor_cannot_be_written(tmp_path):
    """Elements that share memory cannot differ: said before anything has changed."""
    shardckpt.save({"a": torch.ones(2), "x": torch.arange(6.0).view(2, 3)}, tmp_path / "ck")
    live = {"a": torch.zeros(2), "x": torch.zeros(2, 1).expand(2, 3)}
    with pytest.raises(StateMismatchError, match="x: elements share memory"):
        shardckpt.load(tmp_path / "ck", live)
    assert live["a"].sum() == 0


def test_inference_tensors_are_saved_and_filled(tmp_path):
    """Tensors made under inference_mode are tensors like others."""
    with torch.inference_mode():
        state = {"x": torch.arange(3.0)}
        live = {"x": torch.zeros(3)}
    shardckpt.save(state, tmp_path / "ck")
    shardckpt.load(tmp_path / "ck", live)
    assert torch.equal(live["x"], torch.arange(3.0))
