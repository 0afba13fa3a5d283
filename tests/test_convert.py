"""Conversions: what other programs wrote becomes ours and the reverse, bit for bit, and nothing is lost on the way."""

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save

import shardckpt
from s3_server import S3Place
from shardckpt import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LoadFailedError,
    StorageError,
    TensorNotFoundError,
    UnsafeLoadError,
    UsageError,
    codecs,
)
from shardckpt.storage import posix
from shardckpt.tools import convert
from shardckpt.tools.conversion import dcp, output, scratch

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]


class Net(nn.Module):
    """With a buffer that counts, tied weights, and a tensor that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.BatchNorm1d(8)
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def trained() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(3)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return net, optimizer


def state_of(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a script saves with torch.save."""
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "name": "run", "betas": (0.9, 1)}


def same(a: Any, b: Any) -> bool:
    """Equal in kind, order, dtype and every bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def every_dtype() -> dict[str, Tensor]:
    bits = torch.arange(64, dtype=torch.uint8)
    return {name: bits.clone().view(dtype) for name, dtype in codecs.DTYPES.items() if dtype != torch.bool} | {
        "bool": bits > 30
    }


# -- there and back ---------------------------------------------------------------------------------------------------


def test_a_file_of_torch_goes_there_and_back(tmp_path, trained):
    """What a script saved with torch.save is restored into live objects by us, and by torch.load after a way back."""
    state = state_of(*trained)
    torch.save(state, tmp_path / "a.pt")
    report = convert(tmp_path / "a.pt", tmp_path / "ours")
    assert (report.source_format, report.target_format, report.left_out) == ("torch", "shardckpt", [])
    net = Net()
    live = {"model": net, "optimizer": torch.optim.AdamW(net.parameters()), "step": 0, "name": "", "betas": ()}
    shardckpt.load(tmp_path / "ours", live)
    assert same(state_of(live["model"], live["optimizer"]), state)
    convert(tmp_path / "ours", tmp_path / "b.pt")
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert same(back, state)
    assert back["model"]["embed.weight"].data_ptr() == back["model"]["head.weight"].data_ptr()


def test_what_training_saved_becomes_a_file_that_torch_restores(tmp_path, trained):
    """A user moves out in one command: optimizers come in the form that torch's own load_state_dict takes."""
    net, optimizer = trained
    shardckpt.save({"model": net, "optimizer": optimizer, "step": 7}, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "a.pt")
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    other = Net()
    other_optimizer = torch.optim.AdamW(other.parameters())
    other.load_state_dict(found["model"])
    other_optimizer.load_state_dict(found["optimizer"])
    assert same(state_of(other, other_optimizer), state_of(net, optimizer))


@pytest.mark.parametrize("version", [None, "old"])
def test_torch_formats_old_and_new(tmp_path, version):
    """Files from before torch 1.6 cannot be mapped, and convert all the same."""
    state = {"w": torch.randn(30), "n": OrderedDict(a=1)}
    torch.save(state, tmp_path / "a.pt", **({"_use_new_zipfile_serialization": False} if version else {}))
    convert(tmp_path / "a.pt", tmp_path / "ours")
    assert same(shardckpt.load(tmp_path / "ours"), state)


def test_a_dcp_directory_goes_there_and_back(tmp_path, trained):
    """Users of torch.distributed.checkpoint move in, and out again to what dcp.load reads."""
    net, optimizer = trained
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "nested": {"lr": [0.1, 0.2]}}
    dcp_save(state, storage_writer=FileSystemWriter(tmp_path / "dcp"))
    convert(tmp_path / "dcp", tmp_path / "ours")
    other = Net()
    live = {"model": other, "optimizer": torch.optim.AdamW(other.parameters()), "step": 0, "nested": {}}
    shardckpt.load(tmp_path / "ours", live, strict=False)
    assert same(live["model"].state_dict(), state["model"])
    assert same(live["optimizer"].state_dict(), state["optimizer"])
    assert (live["step"], live["nested"]) == (7, {"lr": [0.1, 0.2]})
    convert(tmp_path / "ours", tmp_path / "back", to="dcp")
    empty = {"model": {name: torch.zeros_like(value) for name, value in net.state_dict().items()}, "step": 0}
    dcp_load(empty, storage_reader=FileSystemReader(tmp_path / "back"))
    assert same(dict(empty["model"]), dict(net.state_dict()))
    assert empty["step"] == 7


def test_safetensors_goes_there_and_back_in_every_dtype(tmp_path):
    """Every bit of every dtype that safetensors knows survives, and the stock reader opens what we write."""
    tensors = {name: value for name, value in every_dtype().items() if codecs.SAFETENSORS_TAGS[name] is not None}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "a.b.c": torch.randn(3, 4, 5)}
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "ours")
    assert same(dict(sorted(shardckpt.load(tmp_path / "ours").items())), dict(sorted(tensors.items())))
    report = convert(tmp_path / "ours", tmp_path / "b.safetensors")
    assert report.left_out == []
    assert same(dict(sorted(load_file(tmp_path / "b.safetensors").items())), dict(sorted(tensors.items())))


def test_a_state_that_is_saved_by_ranks_is_whole_again(tmp_path, trained):
    """Values by rank are lists of all ranks', and values of every plain kind come back as they were."""
    state = {
        "plain": [1, 2.5, None, True, "text", (1, 2), {3: 4}],
        "mine": shardckpt.PerRank({"seed": torch.arange(4)}),
        "sparse": torch.eye(3).to_sparse(),
    }
    shardckpt.save(state, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "a.pt")
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert found["plain"] == state["plain"]
    assert found["mine"][0]["seed"].tolist() == [0, 1, 2, 3]
    assert found["sparse"].to_dense().equal(torch.eye(3))


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def test_transformers_loads_the_result(tmp_path):
    """A model that was trained and sharded by us is one that ``from_pretrained`` takes: whole, and in several files."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=96, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    shardckpt.save({"model": model, "step": 3}, tmp_path / "ours")
    for name, most in (("one", 5_000_000_000), ("several", 40_000)):
        config.save_pretrained(tmp_path / name)
        report = convert(tmp_path / "ours", tmp_path / name, to="safetensors", prefix="model", max_shard_size=most)
        assert report.left_out == ["lm_head.weight"]  # tied: the config says so
        loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name)
        assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert {file.name for file in (tmp_path / "one").glob("model*")} == {"model.safetensors"}
    index = json.loads((tmp_path / "several/model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 2
    assert index["metadata"]["total_size"] == report.nbytes
    sizes = dict.fromkeys(index["weight_map"].values(), 0)
    for name, file in index["weight_map"].items():
        sizes[file] += model.state_dict()[name].nbytes
    assert all(size <= 40_000 or list(index["weight_map"].values()).count(file) == 1 for file, size in sizes.items())


def test_what_transformers_saved_becomes_ours(tmp_path):
    """A pretrained model in several files is loaded into a live one by us."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=96, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    convert(tmp_path / "hf", tmp_path / "ours")
    other = transformers.GPT2LMHeadModel(config)
    shardckpt.load(tmp_path / "ours", other, strict=False)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_files_of_the_model_before_do_not_stay(tmp_path):
    """A reader never takes an older file for this model's: one file goes before an index, whoever wrote it."""
    shardckpt.save({"a": torch.ones(100), "b": torch.ones(100)}, tmp_path / "ours")
    place = tmp_path / "hf"
    convert(tmp_path / "ours", place, to="safetensors")
    (place / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="--overwrite"):
        convert(tmp_path / "ours", place, to="safetensors", max_shard_size=400)
    convert(tmp_path / "ours", place, to="safetensors", max_shard_size=400, overwrite=True)
    assert sorted(file.name for file in place.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    convert(tmp_path / "ours", place, to="safetensors", overwrite=True)
    assert sorted(file.name for file in place.iterdir()) == ["config.json", "model.safetensors"]


# -- a part of it, otherwise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["shardckpt", "torch", "dcp"])
def test_a_part_under_other_names_and_in_another_dtype(tmp_path, trained, source):
    """The same options do the same to every source: prefix, patterns, renames and a dtype, which spares counters."""
    net, optimizer = trained
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    path = tmp_path / "a.pt"
    if source != "torch":
        convert(path, tmp_path / "b", to=source)
        path = tmp_path / "b"
    convert(
        path,
        tmp_path / "c.safetensors",
        prefix="net",
        exclude=["conv*", "head*"],
        rename={r"^norm\.running_(\w+)": r"stats.\1", "^embed": "tokens"},
        dtype="bf16",
    )
    found = load_file(tmp_path / "c.safetensors")
    state = net.state_dict()
    expected = {
        "tokens.weight": state["embed.weight"].bfloat16(),
        "norm.weight": state["norm.weight"].bfloat16(),
        "norm.bias": state["norm.bias"].bfloat16(),
        "norm.num_batches_tracked": state["norm.num_batches_tracked"],
        "stats.mean": state["norm.running_mean"].bfloat16(),
        "stats.var": state["norm.running_var"].bfloat16(),
    }
    assert same(dict(sorted(found.items())), dict(sorted(expected.items())))
    convert(path, tmp_path / "d.pt", to="torch", prefix="optimizer", dtype="bfloat16")
    steps = {value["step"].dtype for value in torch.load(tmp_path / "d.pt")["state"].values()}
    assert steps == {torch.float32}


def test_a_subset_of_ours_is_all_that_is_read(tmp_path):
    """What is left out is neither read nor unpickled: a damaged part is no hindrance to saving the rest."""
    shardckpt.save({"bad": torch.ones(5000), "good": torch.ones(5000), "o": slice(1)}, tmp_path / "ours")
    (shard,) = (tmp_path / "ours").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-40_000 // 2 - 10_000] ^= 1  # in the first of the two
    shard.write_bytes(data)
    with pytest.raises(UnsafeLoadError):
        convert(tmp_path / "ours", tmp_path / "a.pt")
    with pytest.raises(CorruptCheckpointError, match="bad"):
        convert(tmp_path / "ours", tmp_path / "a.pt", exclude=["o"])
    assert not (tmp_path / "a.pt").exists()
    convert(tmp_path / "ours", tmp_path / "a.pt", exclude=["o", "bad"])
    assert torch.load(tmp_path / "a.pt")["good"].equal(torch.ones(5000))
    convert(tmp_path / "ours", tmp_path / "b.pt", exclude=["bad"], weights_only=False)
    assert torch.load(tmp_path / "b.pt", weights_only=False)["o"] == slice(1)


def test_safetensors_says_what_it_has_no_room_for(tmp_path):
    """Nothing is dropped in silence: what is no tensor, and second names of one, are reported."""
    w = torch.randn(4)
    shardckpt.save({"w": w, "again": w, "half": w[:2], "step": 5, "log": {"note": "x"}}, tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "a.safetensors")
    assert report.left_out == ["step", "log.note", "again"]
    assert same(dict(sorted(load_file(tmp_path / "a.safetensors").items())), {"half": w[:2], "w": w})
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "again": "w"}


# -- wherever it lies -------------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_any_side_may_be_in_s3(tmp_path, s3_place: S3Place, trained):
    """Paths are local or URLs, on both sides: files of other formats are brought here, or written there in parts."""
    options = s3_place.storage_options
    state = state_of(*trained) | {"large": torch.randn(5 << 20)}
    torch.save(state, tmp_path / "a.pt")

    def go(source: Any, target: Any, **more: Any) -> Any:
        return convert(source, target, storage_options=options, **more)

    go(tmp_path / "a.pt", f"{s3_place.url}/ours")
    go(f"{s3_place.url}/ours", f"{s3_place.url}/b.pt")
    go(f"{s3_place.url}/b.pt", tmp_path / "back")
    assert same(shardckpt.load(tmp_path / "back"), state)
    go(f"{s3_place.url}/ours", f"{s3_place.url}/hf", to="safetensors", prefix="model", max_shard_size=400)
    go(f"{s3_place.url}/hf", tmp_path / "hf.pt", to="torch")
    found = torch.load(tmp_path / "hf.pt")
    assert found.keys() == state["model"].keys() - {"head.weight"}
    assert all(same(value, state["model"][name]) for name, value in found.items())
    with pytest.raises(UsageError, match="no local path"):
        go(tmp_path / "a.pt", f"{s3_place.url}/dcp", to="dcp")
    with pytest.raises(CheckpointNotFoundError):
        go(f"{s3_place.url}/nothing.safetensors", tmp_path / "x")


# -- what goes wrong --------------------------------------------------------------------------------------------------


def listing(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_a_file_whose_code_is_not_here(tmp_path):
    """A whole module that was pickled is neither damaged nor somebody's other file: what it needs is said."""
    code = (
        "import sys, types, torch; m = types.ModuleType('gone'); sys.modules['gone'] = m\n"
        "class C: pass\n"
        f"C.__module__ = 'gone'; m.C = C\ntorch.save({{'c': C()}}, {str(tmp_path / 'a.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(UnsafeLoadError, match="--no-weights-only"):
        convert(tmp_path / "a.pt", tmp_path / "ours")
    with pytest.raises(LoadFailedError, match=r"code which is not here: No module named 'gone'\. Nothing was changed"):
        convert(tmp_path / "a.pt", tmp_path / "ours", weights_only=False)
    (tmp_path / "b.pt").write_bytes(b"hello")
    with pytest.raises(CorruptCheckpointError, match="damaged, or no file of torch.save: "):
        convert(tmp_path / "b.pt", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("x", {}, "--to"),
        ("x.pt", {"to": "onnx"}, "no format 'onnx'"),
        ("x", {"to": "shardckpt"}, "use cp"),
        ("ours", {"to": "dcp", "overwrite": True}, "is what is to be converted"),
        ("there.pt", {}, "there already"),
        ("there.safetensors", {}, "there already"),
        ("folder.pt", {"overwrite": True}, "is a directory"),
        ("there", {"to": "dcp"}, "there already"),
        ("other", {"to": "shardckpt", "dtype": "bf16"}, "there already"),
        ("there.pt", {"to": "shardckpt", "dtype": "bf16", "overwrite": True}, "is a file"),
        ("x.pt", {"dtype": "int8"}, "floating-point"),
        ("x.pt", {"dtype": "float99"}, "no dtype"),
        ("x.pt", {"rename": {"(": ""}}, "regular expression"),
        ("x.pt", {"rename": {"w[12]": "w"}}, "two names"),
        ("x.pt", {"include": ["nothing"]}, "leave nothing"),
        ("x.safetensors", {"include": ["odd"]}, "'odd'"),
        ("x.safetensors", {"include": ["step"]}, "no tensor"),
        ("x.pt", {"prefix": "nothing"}, "nothing at 'nothing'"),
    ],
)
def test_a_wrong_call_changes_nothing(tmp_path, target, options, words):
    """Whatever cannot be meant, or would replace something, is an error before a byte of the target is there."""
    state = {"w1": torch.ones(3), "w2": torch.zeros(3), "odd": torch.ones(2, dtype=torch.complex128), "step": 1}
    shardckpt.save(state, tmp_path / "ours")
    shardckpt.save({"w": torch.ones(1)}, tmp_path / "other")
    for name in ("there.pt", "there.safetensors", "there"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder.pt").mkdir()
    before = listing(tmp_path), listing(tmp_path / "ours"), listing(tmp_path / "other")
    with pytest.raises((UsageError, TensorNotFoundError), match=words):
        convert(tmp_path / "ours", tmp_path / target, **options)
    assert (listing(tmp_path), listing(tmp_path / "ours"), listing(tmp_path / "other")) == before
    assert (tmp_path / "there.pt").read_text() == "mine"


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> Any:
        return os._exit, (99,)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nothing", CheckpointNotFoundError),
        ("empty", CheckpointNotFoundError),
        ("unfinished", CheckpointNotFoundError),
        ("text.pt", CorruptCheckpointError),
        ("empty.pt", CorruptCheckpointError),
        ("cut.pt", CorruptCheckpointError),
        ("bomb.pt", UnsafeLoadError),
        ("bomb", UnsafeLoadError),
        ("shardless", LoadFailedError),
        ("text.safetensors", CorruptCheckpointError),
        ("empty.safetensors", CorruptCheckpointError),
        ("cut.safetensors", CorruptCheckpointError),
        ("hostile", CorruptCheckpointError),
        ("lacking", CorruptCheckpointError),
        ("no index", CorruptCheckpointError),
        ("two", UsageError),
    ],
)
def test_a_source_that_is_none(tmp_path, name, kind):
    """What is missing, damaged or hostile is named, runs no code, and leaves no target."""
    for folder in ("empty", "unfinished", "hostile", "lacking", "no index", "two"):
        (tmp_path / folder).mkdir()
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "unfinished")
    (tmp_path / "unfinished/manifest.json").unlink()
    for suffix in ("pt", "safetensors"):
        (tmp_path / f"text.{suffix}").write_text("hello, world")
        (tmp_path / f"empty.{suffix}").write_bytes(b"")
    torch.save({"w": torch.ones(3000)}, tmp_path / "cut.pt")
    save_file({"w": torch.ones(3000)}, tmp_path / "cut.safetensors")
    for cut in (tmp_path / "cut.pt", tmp_path / "cut.safetensors"):
        cut.write_bytes(cut.read_bytes()[:-5000])
    torch.save({"w": Bomb()}, tmp_path / "bomb.pt")
    dcp_save({"w": torch.ones(3)}, storage_writer=FileSystemWriter(tmp_path / "bomb"))
    torch.save(Bomb(), tmp_path / "bomb/meta.pt")
    dcp_save({"w": torch.ones(3)}, storage_writer=FileSystemWriter(tmp_path / "shardless"))
    next((tmp_path / "shardless").glob("*.distcp")).unlink()
    save_file({"w": torch.ones(3)}, tmp_path / "outside.safetensors")
    for folder, weight_map in (("hostile", {"w": "../outside.safetensors"}), ("lacking", {"x": "a.safetensors"})):
        save_file({"w": torch.ones(3)}, tmp_path / folder / "a.safetensors")
        (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"w": torch.ones(3)}, tmp_path / "no index/a.safetensors")
    (tmp_path / "no index/model.safetensors.index.json").write_text("[1")
    for file in ("a", "b"):
        save_file({"w": torch.ones(3)}, tmp_path / f"two/{file}.safetensors")
    with pytest.raises(kind):
        convert(tmp_path / name, tmp_path / "target", to="torch")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("to", ["torch", "safetensors", "dcp"])
def test_a_target_that_fails_leaves_what_was_there(tmp_path, monkeypatch, to):
    """A disk that fails in the middle: the old file or directory stays, whole, and nothing else does."""
    shardckpt.save({"w": torch.randn(3 << 20)}, tmp_path / "ours")
    target = tmp_path / ("x.safetensors" if to == "safetensors" else "x")
    options = {"to": to, "overwrite": True}
    convert(tmp_path / "ours", target, **options)
    before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    broken = (
        [(dcp.saver, "_save_state_dict"), (dcp.os, "rename")]
        if to == "dcp"
        else [(posix, "sync_file"), (output.os, "replace")]
    )
    for module, name in broken:
        with monkeypatch.context() as patched:
            patched.setattr(module, name, fail)
            with pytest.raises(StorageError):
                convert(tmp_path / "ours", target, **options)
        assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()} == before


def test_a_disk_without_room_for_scratch_is_an_error(tmp_path, monkeypatch):
    """Memory mapped to a file that the disk cannot hold would kill the process with SIGBUS."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    shardckpt.save({"w": torch.ones(100)}, tmp_path / "ours")
    monkeypatch.setattr(scratch.os, "posix_fallocate", full)
    with pytest.raises(shardckpt.StorageFullError):
        convert(tmp_path / "ours", tmp_path / "a.pt")
    assert listing(tmp_path) == ["ours"]


LARGE = """
import sys, threading
import torch, shardckpt.tools
from shardckpt.tools import convert

def own():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) << 10

most, done = 0, threading.Event()

def watch():
    global most
    while not done.wait(0.003):
        most = max(most, own())

path, before = sys.argv[1], own()
watching = threading.Thread(target=watch)
watching.start()
convert(f"{path}/a.pt", f"{path}/ours")
convert(f"{path}/ours", f"{path}/b.pt", dtype="bf16")
convert(f"{path}/ours", f"{path}/c.safetensors")
convert(f"{path}/ours", f"{path}/d", to="dcp")
convert(f"{path}/d", f"{path}/e")
done.set()
watching.join()
print(most - before)
"""


def test_a_state_larger_than_memory_goes_through(tmp_path):
    """A checkpoint is converted where memory does not hold it: what is mapped is the kernel's to write out."""
    torch.save({f"w{index}": torch.full((16 << 20,), float(index)) for index in range(8)}, tmp_path / "a.pt")
    command = [sys.executable, "-c", LARGE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("ours", "e"):
        assert shardckpt.verify(tmp_path / name).ok
    assert shardckpt.read_tensor(tmp_path / "e", "w7", 0) == 7
    assert int(done.stdout) < 320 << 20  # of 512 MiB; libraries that are loaded on the way are part of it


def test_tensors_in_scratch_are_apart(tmp_path):
    """Room for one tensor is never that of another, in arenas of their own size too, and ends with the tensors."""
    room = scratch.Scratch(str(tmp_path))
    tensors = [room.empty((size,), torch.float32) for size in (0, 1, 3, 1 << 20, 80 << 20, 5)]
    for index, tensor in enumerate(tensors):
        tensor.fill_(index)
    room.close()
    assert all((tensor == index).all() for index, tensor in enumerate(tensors))
    assert listing(tmp_path) == []


def test_progress_ends_at_the_total(tmp_path):
    """A bar that people watch never goes past its end, nor back within one pass."""
    shardckpt.save({"w": torch.randn(4 << 20)}, tmp_path / "ours")
    heard: list[tuple[int, int]] = []
    convert(tmp_path / "ours", tmp_path / "a.pt", progress=lambda *told: heard.append(told))
    assert heard[-1][0] == heard[-1][1] > 0
    assert all(0 <= done <= total for done, total in heard)
