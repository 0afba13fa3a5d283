"""What the command line is made of: listing, inspecting, measuring, comparing, copying and pruning checkpoints."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shardckpt
from golden.make import ROOT
from s3_server import S3Place
from shardckpt import CorruptCheckpointError, UsageError, commit, filenames, tools
from shardckpt.box import Box, covers_exactly, intersect
from shardckpt.commit import clearing
from shardckpt.manifest import Manifest, TensorEntry
from shardckpt.storage import open_storage
from shardckpt.tools import copying, numbers, streaming
from shardckpt.tools.comparison import TensorDifference

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
]

GOLDEN = sorted(path.name for path in ROOT.iterdir() if path.is_dir())


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> Any:
        return os._exit, (99,)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def damage(path: Path, pattern: str, at: int) -> None:
    """Flip a bit of the one file that a pattern finds."""
    (file,) = path.glob(pattern)
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


# -- ls ---------------------------------------------------------------------------------------------------------------


def test_ls_shows_the_newest_first_and_what_is_wrong(tmp_path):
    """Whoever looks for a checkpoint to resume from sees which are whole, and why the others are not."""
    for step in (1, 2, 3, 4, 5):
        shardckpt.save({"step": 10 * step, "w": torch.ones(3)}, tmp_path / f"step={step}.ckpt")
    shardckpt.save({"global_step": 7, "w": torch.ones(3)}, tmp_path / "last.ckpt")
    (tmp_path / "step=2.ckpt/manifest.json").unlink()
    (tmp_path / "step=3.ckpt/manifest.json").write_bytes(b"{")
    newer = json.loads((tmp_path / "step=4.ckpt/manifest.json").read_bytes()) | {"version": 2}
    (tmp_path / "step=4.ckpt/manifest.json").write_text(json.dumps(newer))
    next((tmp_path / "step=5.ckpt").glob("*.safetensors")).unlink()
    next((tmp_path / "step=5.ckpt").glob("rank-*.json")).write_bytes(b"")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/train.log").write_text("")
    (tmp_path / "notes.txt").write_text("")
    saving = tmp_path / "now.ckpt"
    saving.mkdir()
    marker = {"machine": clearing._machine(), "pid": os.getppid(), "shares": None}
    (saving / filenames.marker_name("aaaaaaaaaaaaaa1")).write_text(json.dumps(marker))
    found = {item.name: item for item in tools.ls(tmp_path)}
    assert {name: item.status for name, item in found.items()} == {
        "step=1.ckpt": "complete",
        "step=2.ckpt": "unfinished",
        "step=3.ckpt": "damaged",
        "step=4.ckpt": "newer",
        "step=5.ckpt": "incomplete",
        "last.ckpt": "complete",
        "now.ckpt": "saving",
    }
    assert [item.problem is None for item in found.values()] == [item.status == "complete" for item in found.values()]
    assert found["step=5.ckpt"].problem is not None
    assert "is missing, and 1 more" in found["step=5.ckpt"].problem
    # The state's own word, else the name's.
    assert [found[name].step for name in ("step=1.ckpt", "step=2.ckpt", "last.ckpt", "now.ckpt")] == [10, 2, 7, None]
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "silent/step=8")
    assert tools.inspect(tmp_path / "silent/step=8").step == tools.ls(tmp_path / "silent")[0].step == 8
    times = [item.time for item in found.values()]
    assert times == sorted(times, key=lambda time: -time)
    whole = found["step=1.ckpt"]
    assert whole.nbytes == sum(map(len, files(tmp_path / "step=1.ckpt").values()))
    assert whole.world_size == 1
    assert tools.ls(tmp_path / "step=1.ckpt") == [whole]
    assert tools.ls(tmp_path / "logs") == []
    with pytest.raises(shardckpt.CheckpointNotFoundError, match="nothing at"):
        tools.ls(tmp_path / "none")


# -- inspect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_inspect_knows_every_kind_of_value(name):
    """What the format can say, the tree can show: every tensor of the manifest stands in it, under its name."""
    found = tools.inspect(ROOT / name)
    nodes = list(tools.walk(found.tree))
    listed = {tensor.name for tensor in found.tensors} | {alias for t in found.tensors for alias in t.aliases}
    assert {node.tensor for node in nodes} - {None} == listed
    assert {node.value for node in nodes if node.kind == "object"} == {item.path for item in found.objects}
    assert all(tools.text_of(value) for value in found.values.values())
    assert sum(len(t.shards) for t in found.tensors) == sum(rank.entries for rank in found.ranks)
    assert found.nbytes == sum(len(data) for file, data in files(ROOT / name).items() if file != "manifest.json")
    assert found.world_size == len(found.ranks)


def test_inspect_unpickles_nothing_and_tells_when(tmp_path):
    """To look at a checkpoint from anywhere must be safe."""
    state = {"model": torch.nn.Linear(2, 3), "bomb": Bomb(), "step": 5, "lr": (0.1, float("inf"))}
    shardckpt.save(state, tmp_path / "ck")
    found = tools.inspect(tmp_path / "ck")
    assert [item.path for item in found.objects] == ["bomb"]
    assert found.step == 5
    assert found.values["lr"] == {"$tuple": [0.1, {"$float": "inf"}]}
    assert tools.text_of(found.values["lr"]) == "(0.1, inf)"
    assert found.save_seconds is not None
    assert 0 <= found.save_seconds < 600
    assert tools.inspect(ROOT / "plain").save_seconds is None  # its id says no time
    assert tools.diff(tmp_path / "ck", tmp_path / "ck").equal
    tools.stats(tmp_path / "ck")
    tools.copy(tmp_path / "ck", tmp_path / "copy")
    assert pickle.loads(pickle.dumps(found)) == found


# -- streaming --------------------------------------------------------------------------------------------------------


@st.composite
def cut_tensors(draw: Any) -> tuple[tuple[int, ...], list[Box], str]:
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    dtype = draw(st.sampled_from(["float32", "int8", "complex128"]))
    if not shape:
        return shape, [Box((), ())], dtype
    at = draw(st.integers(1, shape[0]))
    rest = (0,) * (len(shape) - 1)
    boxes = [Box((0, *rest), (at, *shape[1:]))]
    if at < shape[0]:
        boxes.append(Box((at, *rest), (shape[0] - at, *shape[1:])))
    return shape, boxes, dtype


@given(tensors=st.lists(cut_tensors(), max_size=5), most=st.sampled_from([16, 64, 256, 4096]))
def test_batches_have_every_element_once_and_stay_small(tensors, most):
    """However tensors are cut and however large, memory is bounded and no element is left out or counted twice."""
    entries = {
        f"t{number}": TensorEntry(
            dtype,
            shape,
            [0] * len(boxes),
            [100 * number + at for at in range(len(boxes))],
            [0] * len(boxes),
            [box.offsets for box in boxes],
            [box.lengths for box in boxes],
        )
        for number, (shape, boxes, dtype) in enumerate(tensors)
    }
    manifest = Manifest(save_id="a" * 15, created="", world_size=1, writer={}, files=[], state=None, tensors=entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BATCH", most)
        found = list(streaming.batches(manifest, entries))
    size = {"float32": 4, "int8": 1, "complex128": 16}
    assert all(0 < sum(box.volume * size[entries[name].dtype] for name, box in batch) <= most for batch in found)
    for name, entry in entries.items():
        boxes = [box for batch in found for other, box in batch if other == name]
        assert covers_exactly(entry.shape, boxes).exact
        assert all(any(intersect(box, stored) == box for stored in entry.boxes()) for box in boxes)


# -- stats ------------------------------------------------------------------------------------------------------------


def all_kinds() -> dict[str, Tensor]:
    """A tensor of every dtype that a checkpoint may hold."""
    torch.manual_seed(3)
    real = torch.randn(6, 50)
    made: dict[str, Tensor] = {}
    for dtype in shardckpt.codecs.DTYPES.values():
        name = str(dtype).removeprefix("torch.")
        if name == "float4_e2m1fn_x2":  # which torch 2.6 has not
            made[name] = torch.arange(200, dtype=torch.uint8).view(dtype)
        elif dtype.is_complex:
            made[name] = torch.complex(real.double(), -real.double()).to(dtype)
        elif dtype.is_floating_point:
            made[name] = (real.abs() if name == "float8_e8m0fnu" else real).to(dtype)
        elif dtype == torch.bool:
            made[name] = real > 0
        else:
            made[name] = (real * 50).abs().to(dtype) if "uint" in name else (real * 50).to(dtype)
    return made


def plainly(tensor: Tensor) -> Any:
    """Elements as Python's own numbers."""
    if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):
        digits = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        values = digits + [-digit for digit in digits]
        return [values[half] for byte in tensor.view(torch.uint8).tolist() for half in (byte & 15, byte >> 4)]
    if tensor.dtype == torch.complex32:
        tensor = tensor.to(torch.complex64)
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()
    return tensor.flatten().tolist()


@pytest.mark.parametrize("compression", (None, "zstd"))
def test_stats_of_every_dtype(tmp_path, monkeypatch, compression):
    """Each dtype is counted by the numbers that it stands for, in whatever pieces they are read."""
    tensors = all_kinds() | {"empty": torch.empty(0, 3), "scalar": torch.tensor(-2.0)}
    shardckpt.save(tensors, tmp_path / "ck", compression=compression)
    monkeypatch.setattr(streaming, "BATCH", 1000)
    monkeypatch.setattr(numbers, "_STRETCH", 7)
    seen: list[tuple[int, int]] = []
    found = {item.name: item for item in tools.stats(tmp_path / "ck", progress=lambda *said: seen.append(said))}
    assert list(found) == list(tensors)
    assert len(seen) > 10
    for name, tensor in tensors.items():
        values = plainly(tensor)
        assert found[name].elements == tensor.numel()
        assert found[name].norm == pytest.approx(math.sqrt(sum(abs(value) ** 2 for value in values)), rel=1e-12), name
        assert found[name].max_abs == (max(map(abs, values)) if values else None), name
        assert (found[name].nan, found[name].inf) == (0, 0)
        mean = None if tensor.is_complex() or not values else sum(values) / len(values)
        assert found[name].mean == (None if mean is None else pytest.approx(mean, rel=1e-12, abs=1e-12)), name


def test_stats_count_what_is_no_number(tmp_path):
    """A NaN is found wherever it is, is counted once, and does not hide what the rest is like."""
    nan, inf = math.nan, math.inf
    state = {
        "f": torch.tensor([1.0, nan, inf, -inf, -2.0]),
        "b": torch.tensor([nan, 3.0], dtype=torch.bfloat16),
        "e4": torch.tensor([nan, 2.0]).to(torch.float8_e4m3fn),
        "e5": torch.tensor([nan, inf, 2.0]).to(torch.float8_e5m2),
        "c": torch.tensor([complex(nan, inf), complex(inf, 1), complex(3, 4)]),
        "none": torch.full((2,), nan),
        "huge": torch.full((4,), 1e300, dtype=torch.float64),
        "tiny": torch.full((4,), 1e-300, dtype=torch.float64),
    }
    shardckpt.save(state, tmp_path / "ck")
    found = {item.name: item for item in tools.stats(tmp_path / "ck")}
    assert {name: (item.nan, item.inf) for name, item in found.items()} == {
        "f": (1, 2), "b": (1, 0), "e4": (1, 0), "e5": (1, 1), "c": (1, 1), "none": (2, 0), "huge": (0, 0),
        "tiny": (0, 0),
    }  # fmt: skip
    assert (found["f"].norm, found["f"].mean, found["f"].max_abs) == (pytest.approx(math.sqrt(5)), -0.5, 2.0)
    assert (found["c"].norm, found["c"].mean, found["c"].max_abs) == (5.0, None, 5.0)
    assert (found["none"].norm, found["none"].mean, found["none"].max_abs) == (0.0, None, None)
    assert found["huge"].norm == pytest.approx(2e300)
    assert found["tiny"].norm == pytest.approx(2e-300, rel=1e-12)
    assert [item.name for item in tools.stats(tmp_path / "ck", include=["e*"], exclude=["e5"])] == ["e4"]


# -- diff -------------------------------------------------------------------------------------------------------------


def compared(tmp_path: Path, a: Any, b: Any) -> tools.Comparison:
    shardckpt.save(a, tmp_path / "a")
    shardckpt.save(b, tmp_path / "b", compression="zstd")
    return tools.diff(tmp_path / "a", tmp_path / "b")


def test_diff_of_another_layout_and_coding(tmp_path, monkeypatch):
    """What two ranks saved and what one saved are the same if every element is, however it is stored."""
    monkeypatch.setattr(streaming, "BATCH", 1 << 16)
    shardckpt.save(shardckpt.load(ROOT / "sharded", weights_only=False), tmp_path / "one", compression="zstd")
    found = tools.diff(ROOT / "sharded", tmp_path / "one")
    assert found.tensors
    assert {item.verdict for item in found.tensors} == {"equal"}
    for name in GOLDEN:
        assert tools.diff(ROOT / name, ROOT / name).equal


def test_diff_names_every_difference(tmp_path):
    """Structure, kinds of values and containers, and pickled objects count, also where Python calls them equal."""
    a = {"only a": {"x": torch.ones(2), "y": 1}, "one": 1, "nan": math.nan, "t": (1, 2), "o": slice(1), "d": {}, "s": 1}
    b = {"one": True, "nan": math.nan, "t": [1, 2], "o": slice(2), "d": {"new": 1}, "s": torch.ones(1)}
    found = compared(tmp_path, a, b)
    assert (found.only_a, found.only_b) == (["only a"], ["d.new"])
    changed = {change.path: (change.a, change.b) for change in found.changed}
    assert list(changed) == ["one", "t", "o", "s"]
    assert changed["one"] == ("1", "True")
    assert changed["t"] == ("(1, 2)", "[1, 2]")
    assert changed["o"][0].startswith("pickled object")
    assert changed["s"] == ("1", "tensor float32 [1]")
    assert not found.equal


def test_diff_measures_how_far_tensors_are_apart(tmp_path, monkeypatch):
    """The largest difference is that of the numbers, exact for integers; bits count where numbers do not."""
    monkeypatch.setattr(numbers, "_STRETCH", 3)
    big = 2**63 - 1
    zero = torch.zeros(5)
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "same": (zero, zero.clone()),
        "float": (zero, torch.tensor([0, 0, 0.25, -1.5, 0])),
        "sign": (torch.zeros(2), torch.tensor([0.0, -0.0])),
        "nan": (torch.tensor([1.0, math.nan, math.inf]), torch.tensor([math.nan, math.nan, 1.0])),
        "int64": (torch.tensor([big, 5]), torch.tensor([-big - 1, 5])),
        "near": (torch.tensor([big, 0]), torch.tensor([big - 1, 0])),
        "uint64": (torch.tensor([2**64 - 1], dtype=torch.uint64), torch.tensor([0], dtype=torch.uint64)),
        "bool": (torch.tensor([True, False]), torch.tensor([True, True])),
        "bf16": (zero.bfloat16(), (zero + 2).bfloat16()),
        "fp8": (zero.to(torch.float8_e4m3fn), (zero + 3).to(torch.float8_e4m3fn)),
        "complex": (torch.zeros(2, dtype=torch.complex64), torch.tensor([3 + 4j, 0])),
        "complex32": (
            torch.zeros(2, dtype=torch.complex64).to(torch.complex32),
            torch.tensor([3 + 4j, 0]).to(torch.complex32),
        ),
        "fp4": (
            torch.tensor([0x00, 0x11], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
            torch.tensor([0x70, 0x11], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        ),
        "dtype": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5], dtype=torch.bfloat16)),
        "same numbers": (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan], dtype=torch.float64)),
        "real": (torch.ones(2), torch.tensor([1 + 0j, 1 + 2j])),
        "shape": (torch.ones(2), torch.ones(1, 2)),
        "empty": (torch.empty(0, 2), torch.empty(0, 2)),
    }
    found = compared(tmp_path, {n: a for n, (a, _) in pairs.items()}, {n: b for n, (_, b) in pairs.items()})
    assert {t.path: (t.verdict, t.differing, t.max_abs, t.not_finite) for t in found.tensors} == {
        "same": ("equal", 0, 0, 0),
        "float": ("differs", 2, 1.5, 0),
        "sign": ("differs", 1, 0.0, 0),
        "nan": ("differs", 2, None, 2),
        "int64": ("differs", 1, 2**64 - 1, 0),
        "near": ("differs", 1, 1, 0),
        "uint64": ("differs", 1, 2**64 - 1, 0),
        "bool": ("differs", 1, 1, 0),
        "bf16": ("differs", 5, 2.0, 0),
        "fp8": ("differs", 5, 3.0, 0),
        "complex": ("differs", 1, 5.0, 0),
        "complex32": ("differs", 1, 5.0, 0),
        "fp4": ("differs", 1, 6.0, 0),
        "dtype": ("dtype", 1, 0.5, 0),
        "same numbers": ("dtype", 0, 0, 0),
        "real": ("dtype", 1, 2.0, 0),
        "shape": ("shape", 0, None, 0),
        "empty": ("equal", 0, 0, 0),
    }
    only = tools.diff(tmp_path / "a", tmp_path / "b", include=["same", "empty"])
    assert only.equal
    assert [item.path for item in only.tensors] == ["same", "empty"]


def test_diff_of_ties(tmp_path):
    """A tensor with two names is held against both of another checkpoint's, and two ties against each other once."""
    w = torch.arange(4.0)
    tied = {"a": w, "b": w}
    found = compared(tmp_path, tied, {"a": w.clone(), "b": w + 1})
    assert [(t.path, t.verdict, t.max_abs) for t in found.tensors] == [("a", "equal", 0), ("b", "differs", 1.0)]
    back = tools.diff(tmp_path / "b", tmp_path / "a")
    assert [(t.path, t.verdict, t.max_abs) for t in back.tensors] == [("a", "equal", 0), ("b", "differs", 1.0)]
    other = torch.arange(4.0) + 2
    both = compared(tmp_path, tied, {"a": other, "b": other})
    assert [(t.path, t.verdict, t.max_abs) for t in both.tensors] == [("a", "differs", 2.0), ("b", "differs", 2.0)]
    assert isinstance(both.tensors[0], TensorDifference)


# -- cp ---------------------------------------------------------------------------------------------------------------


def large_state() -> dict[str, Any]:
    """Several pieces of a copy, of entries whose blocks cross from one to the next."""
    torch.manual_seed(5)
    sizes = (5_000_001, 3, 700_003, 4_000_000)
    return {f"w{n}": torch.randn(size).to(torch.bfloat16) for n, size in enumerate(sizes)} | {"o": slice(3), "step": 3}


@pytest.mark.parametrize("compression", (None, "zstd"))
def test_a_copy_is_the_same_to_the_byte(tmp_path, compression):
    """What arrives is what was there, file by file, and it is a checkpoint."""
    shardckpt.save(large_state(), tmp_path / "ck", compression=compression)
    seen: list[tuple[int, int]] = []
    report = tools.copy(tmp_path / "ck", f"{tmp_path}/to/", progress=lambda *said: seen.append(said))
    assert files(tmp_path / "to/ck") == files(tmp_path / "ck")
    assert report.nbytes == sum(map(len, files(tmp_path / "ck").values()))
    assert seen[-1][0] == seen[-1][1] == report.nbytes - len((tmp_path / "ck/manifest.json").read_bytes())
    assert tools.copy(tmp_path / "ck", tmp_path / "to/ck").nbytes == 0
    # Other files, not other names of the same: a disk that goes bad takes one of them.
    assert all(file.stat().st_nlink == 1 for file in (tmp_path / "to/ck").iterdir())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_checkpoints_copy(tmp_path, name):
    """Values by rank, objects of several ranks, compression: all that belongs to a checkpoint comes along."""
    tools.copy(ROOT / name, tmp_path / "copy")
    assert files(tmp_path / "copy") == files(ROOT / name)


@pytest.mark.parametrize("at", (9, 5000, 9_000_000, -1))
def test_a_damaged_checkpoint_is_not_copied(tmp_path, at):
    """A copy must not give rotten bytes a new home, nor leave half of one, nor harm what was there."""
    shardckpt.save(large_state(), tmp_path / "ck")
    shardckpt.save({"x": 1}, tmp_path / "copy")
    before = files(tmp_path / "copy")
    damage(tmp_path / "ck", "*.safetensors", at)
    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        tools.copy(tmp_path / "ck", tmp_path / "copy", overwrite=True)
    assert files(tmp_path / "copy") == before
    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        tools.copy(tmp_path / "ck", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("pattern", ("rank-*.json", "*.pkl"))
def test_a_damaged_small_file_is_not_copied(tmp_path, pattern):
    """The manifests of ranks and the pickled objects have digests too."""
    shardckpt.save({"w": torch.ones(3), "o": slice(3)}, tmp_path / "ck")
    damage(tmp_path / "ck", pattern, 5)
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        tools.copy(tmp_path / "ck", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_copies_over_something(tmp_path):
    """Nothing is replaced unasked, what is replaced goes altogether, and a copy that died is no obstacle."""
    shardckpt.save({"x": torch.ones(2)}, tmp_path / "a")
    shardckpt.save({"x": torch.zeros(2)}, tmp_path / "b")
    before = files(tmp_path / "b")
    with pytest.raises(UsageError, match="another checkpoint"):
        tools.copy(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UsageError, match="what is to be copied"):
        tools.copy(tmp_path / "a", tmp_path / "a", overwrite=True)
    assert files(tmp_path / "b") == before
    tools.copy(tmp_path / "a", tmp_path / "b", overwrite=True)
    assert files(tmp_path / "b") == files(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "dead")
    (tmp_path / "dead/manifest.json").unlink()
    tools.copy(tmp_path / "a", tmp_path / "dead")
    assert files(tmp_path / "dead") == files(tmp_path / "a")


def test_a_copy_that_died_over_a_damaged_checkpoint_is_no_obstacle(tmp_path):
    """What it left cannot be told from the checkpoint's own files, and must not keep a good copy out for ever."""
    shardckpt.save({"x": torch.ones(2)}, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/manifest.json").write_text("{")
    marker = tmp_path / "b" / filenames.marker_name(tools.inspect(tmp_path / "a").save_id)
    marker.write_text('{"machine": "elsewhere", "pid": 1, "shares": null}')
    os.utime(marker, (1e9, 1e9))
    tools.copy(tmp_path / "a", tmp_path / "b", overwrite=True)
    assert files(tmp_path / "b") == files(tmp_path / "a")


def test_a_copy_beside_another_is_refused(tmp_path):
    """Two copies of one save to one place would write the same files."""
    shardckpt.save({"x": torch.ones(2)}, tmp_path / "a")
    save_id = tools.inspect(tmp_path / "a").save_id
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / filenames.marker_name(save_id)).write_text('{"machine": "elsewhere", "pid": 1, "shares": null}')
    with pytest.raises(shardckpt.ConflictingStateError, match="another copy"):
        tools.copy(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b/manifest.json").exists()


@pytest.mark.parametrize("when", ("before its marker", "before its commit"))
def test_a_copy_that_comes_second_spares_what_the_first_committed(tmp_path, monkeypatch, when):
    """Two copies of one save write files of the same names: the one that loses removes none that the other named."""
    shardckpt.save({"x": torch.ones(2)}, tmp_path / "a")
    method = "open_place" if when == "before its marker" else "publish_record"
    inner = getattr(commit, method)
    once = iter((True,))

    def late(*arguments: Any, **options: Any) -> Any:
        if next(once, False):
            monkeypatch.setattr(clearing, "_leases", {})  # as another process has none of ours
            if method == "publish_record":
                for marker in (tmp_path / "b").glob("saving-*"):
                    marker.unlink()  # as if it had not been renewed for so long that it was pruned
                for file in (tmp_path / "b").iterdir():
                    file.unlink()
            tools.copy(tmp_path / "a", tmp_path / "b")
        return inner(*arguments, **options)

    monkeypatch.setattr(commit, method, late)
    refused = shardckpt.ConflictingStateError if method == "open_place" else shardckpt.SaveFailedError
    with pytest.raises(refused):
        tools.copy(tmp_path / "a", tmp_path / "b")
    assert files(tmp_path / "b") == files(tmp_path / "a")


def test_a_copy_onto_a_link_is_refused(tmp_path):
    """Neither the link nor what it leads to is changed, with and without ``overwrite``."""
    shardckpt.save({"x": torch.ones(2)}, tmp_path / "a")
    shardckpt.save({"x": torch.zeros(2)}, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    before = files(tmp_path / "real")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="symbolic link"):
            tools.copy(tmp_path / "a", tmp_path / "link", overwrite=overwrite)
    assert (tmp_path / "link").is_symlink()
    assert files(tmp_path / "real") == before


def test_a_copy_of_an_alias(tmp_path):
    """A checkpoint whose shards bear another save's id arrives with them; it does not mix with one of the same."""
    checkpointer = shardckpt.Checkpointer()
    state = {"x": torch.ones(2)}
    checkpointer.async_save(state, tmp_path / "a", state_version=1).result()
    checkpointer.async_save(state, tmp_path / "b", state_version=1).result()
    assert set(files(tmp_path / "a")) & set(files(tmp_path / "b")) > {"manifest.json"}
    tools.copy(tmp_path / "b", tmp_path / "c")
    assert files(tmp_path / "c") == files(tmp_path / "b")
    with pytest.raises(UsageError, match="same shards"):
        tools.copy(tmp_path / "a", tmp_path / "c", overwrite=True)
    assert files(tmp_path / "c") == files(tmp_path / "b")


def test_a_copy_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C in the middle is no reason for rubbish, or for a checkpoint that is half there."""
    shardckpt.save(large_state(), tmp_path / "a")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(copying._Copy, "_copied", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tools.copy(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_shard_with_a_gap_is_not_copied(tmp_path):
    """Bytes under no digest cannot be verified; the format has none, so such a file is somebody else's."""
    shardckpt.save({"x": torch.ones(2)}, tmp_path / "a")
    manifest = next((tmp_path / "a").glob("rank-*.json"))
    said = shardckpt.manifest.decode_rank_manifest(manifest.read_bytes(), "")
    said.entries.clear()
    data = shardckpt.manifest.encode(said)
    manifest.write_bytes(data)
    record = json.loads((tmp_path / "a/manifest.json").read_bytes())
    record["files"][0] |= {
        "manifest_size": len(data),
        "manifest_digest": shardckpt.codecs.digests_text([shardckpt.codecs.digest(data)]),
    }
    (tmp_path / "a/manifest.json").write_text(json.dumps(record))
    with pytest.raises(CorruptCheckpointError, match="no digest for some bytes"):
        tools.copy(tmp_path / "a", tmp_path / "b")


@pytest.mark.s3
def test_there_and_back_through_s3(tmp_path, s3_place: S3Place):
    """Up to an object store and down again nothing changes, and every tool reads it there."""
    shardckpt.save(large_state(), tmp_path / "ck")
    told = s3_place.storage_options
    tools.copy(tmp_path / "ck", f"{s3_place.url}/", storage_options=told)
    there = f"{s3_place.url}/ck"
    assert tools.diff(tmp_path / "ck", there, storage_options=told).equal
    assert tools.stats(there, storage_options=told) == tools.stats(tmp_path / "ck")
    assert [(item.name, item.status) for item in tools.ls(s3_place.url, storage_options=told)] == [("ck", "complete")]
    tools.copy(there, tmp_path / "back", storage_options=told)
    assert files(tmp_path / "back") == files(tmp_path / "ck")
    damaged = open_storage(there, told)
    (shard,) = (stat.name for stat in damaged.list() if stat.name.endswith(".safetensors"))
    data = bytearray(damaged.get(shard))
    data[-1] ^= 1
    damaged.put(shard, bytes(data), replace=True)
    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        tools.copy(there, f"{s3_place.url}/other", storage_options=told)
    assert open_storage(f"{s3_place.url}/other", told).list() == []
    with pytest.raises(shardckpt.CheckpointNotFoundError):
        tools.ls(f"{s3_place.url}/none", storage_options=told)


# -- prune ------------------------------------------------------------------------------------------------------------


def test_prune_takes_what_dead_saves_left_and_nothing_else(tmp_path):
    """A tool that deletes says first what, and never touches what is anybody's."""
    shardckpt.save({"x": torch.ones(2)}, tmp_path / "a")
    for name in ("dead", "mixed"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        (tmp_path / name / "manifest.json").unlink()
    (tmp_path / "mixed/notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / filenames.shard_name(7, "aaaaaaaaaaaaaa1")).write_bytes(b"")
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    planned = tools.prune(tmp_path, dry_run=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == whole
    assert tools.prune(tmp_path) == planned
    assert planned.removed[f"{tmp_path}/a"] == [filenames.shard_name(7, "aaaaaaaaaaaaaa1")]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "mixed", "empty"}
    assert set(files(tmp_path / "mixed")) == {"notes.txt"}
    assert [item.status for item in tools.ls(tmp_path)] == ["complete"]
    assert tools.prune(tmp_path).removed == {}
    with pytest.raises(shardckpt.CheckpointNotFoundError):
        tools.prune(tmp_path / "none")


def test_prune_leaves_what_it_cannot_judge_and_goes_on(tmp_path):
    """One damaged manifest, a web page's, or a link must not keep the rest from being pruned, nor be touched."""
    shardckpt.save({"x": torch.ones(2)}, tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "dead")
    shutil.copytree(tmp_path / "b", tmp_path.parent / "elsewhere")
    for place in (tmp_path / "dead", tmp_path.parent / "elsewhere"):
        (place / "manifest.json").unlink()
    (tmp_path / "b/manifest.json").write_text('{"format": "shardckpt", "version": 1')
    (tmp_path / "web").mkdir()
    (tmp_path / "web/manifest.json").write_text('{"name": "an app"}')
    (tmp_path / "link").symlink_to(tmp_path.parent / "elsewhere")
    found = tools.prune(tmp_path)
    assert list(found.skipped) == [f"{tmp_path}/b"]
    assert list(found.removed) == [f"{tmp_path}/dead"]
    assert len(files(tmp_path.parent / "elsewhere")) == 2
    assert (tmp_path / "web/manifest.json").exists()
    assert {item.name: item.status for item in tools.ls(tmp_path)} == {"b": "damaged", "link": "unfinished"}
    assert tools.ls(tmp_path / "web") == []


def test_a_copy_takes_the_place_of_a_damaged_one_and_of_nothing_else(tmp_path):
    """A good copy is what a damaged checkpoint needs; a directory of other things is no place for one."""
    shardckpt.save({"x": torch.ones(2)}, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/manifest.json").write_text("{")
    tools.copy(tmp_path / "a", tmp_path / "b", overwrite=True)
    assert files(tmp_path / "b") == files(tmp_path / "a")
    for name in ("files", "folders"):
        (tmp_path / name).mkdir()
    (tmp_path / "files/notes.txt").write_text("mine")
    (tmp_path / "folders/one").mkdir()
    for name in ("files", "folders"):
        with pytest.raises(UsageError, match="end it with /"):
            tools.copy(tmp_path / "a", tmp_path / name)
        tools.copy(tmp_path / "a", f"{tmp_path / name}/")
        assert shardckpt.is_checkpoint(tmp_path / name / "a")


def test_a_listing_knows_of_every_file(tmp_path):
    """Pickled objects too: one that was cut off would fail the load that is counted on."""
    shardckpt.save({"x": torch.ones(2), "odd": Bomb()}, tmp_path / "a")
    assert [item.status for item in tools.ls(tmp_path)] == ["complete"]
    pickled = next((tmp_path / "a").glob("objects-*"))
    os.truncate(pickled, 10)
    assert [item.status for item in tools.ls(tmp_path)] == ["incomplete"]
    with pytest.raises(shardckpt.CheckpointNotFoundError, match="is a file"):
        tools.ls(pickled)


def test_a_listing_looks_again_where_a_save_comes_between(tmp_path, monkeypatch):
    """A checkpoint that is replaced between its listing and its record is not called incomplete."""
    shardckpt.save({"x": torch.ones(2)}, tmp_path / "a")
    inner, once = commit.find, iter((True,))

    def late(*arguments: Any) -> Any:
        if next(once, False):
            shardckpt.save({"x": torch.ones(3)}, tmp_path / "a")
        return inner(*arguments)

    monkeypatch.setattr(commit, "find", late)
    assert [item.status for item in tools.ls(tmp_path)] == ["complete"]


def test_sets_are_equal_in_any_order(tmp_path):
    """A set is stored as the process happened to hash it, which is another way in the next."""
    names = {f"k{number}" for number in range(9)}
    shardckpt.save({"s": names, "deep": [{"f": frozenset(names)}]}, tmp_path / "a")
    record = json.loads((tmp_path / "a/manifest.json").read_text())

    def turned(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: turned(v[::-1] if k in ("$set", "$frozenset") else v) for k, v in node.items()}
        return [turned(item) for item in node] if isinstance(node, list) else node

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/manifest.json").write_text(json.dumps(record | {"state": turned(record["state"])}))
    assert tools.diff(tmp_path / "a", tmp_path / "b").equal
    assert (tmp_path / "a/manifest.json").read_bytes() != (tmp_path / "b/manifest.json").read_bytes()


def test_patterns_that_match_nothing_are_said_to(tmp_path):
    """A typo must not look like two checkpoints that are the same; a tied tensor goes by each of its names."""
    weight = torch.ones(2)
    shardckpt.save({"a": weight, "tied": weight}, tmp_path / "a")
    with pytest.raises(UsageError, match="matches nothing"):
        tools.diff(tmp_path / "a", tmp_path / "a", include=["typo*"])
    with pytest.raises(UsageError, match="matches no tensor"):
        tools.stats(tmp_path / "a", include=["typo*"])
    assert [item.name for item in tools.stats(tmp_path / "a", include=["tied"])] == ["a"]


def test_places_of_one_name_keep_their_values(tmp_path):
    """{"a.b": 1, "a": {"b": 2}} has two values, which inspecting shows under two names."""
    shardckpt.save({"a.b": 1, "a": {"b": 2}}, tmp_path / "a")
    assert sorted(tools.inspect(tmp_path / "a").values.values()) == [1, 2]
