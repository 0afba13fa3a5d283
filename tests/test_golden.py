"""Format v1 for ever: committed checkpoints load as they did, are written as they were, and are what format.md says.

`golden/make.py` made the files. The reader in here shares no code with shardckpt: it is the specification, executed.
"""

import json
import struct
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
import torch
import xxhash
import zstandard
from safetensors import safe_open

import ranks
import shardckpt
from golden import make
from golden.make import ROOT, STATES

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]

MIB = 1 << 20
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "plain" and not hasattr(torch, "float8_e8m0fnu"), reason="it holds a dtype that came with torch 2.7"
        ),
    )
    for name in STATES
]
NUMPY = {
    "complex128": "c16", "complex64": "c8", "float64": "f8", "float32": "f4", "float16": "f2", "int64": "i8",
    "int32": "i4", "int16": "i2", "int8": "i1", "uint64": "u8", "uint32": "u4", "uint16": "u2", "uint8": "u1",
    "bool": "?", "complex32": "V4", "bfloat16": "V2", "float8_e4m3fn": "V1", "float8_e4m3fnuz": "V1",
    "float8_e5m2": "V1", "float8_e5m2fnuz": "V1", "float8_e8m0fnu": "V1",
}  # fmt: skip
"""Numpy's name for each dtype, or for as many bytes where it has none."""


def expected(name: str) -> dict[str, Any]:
    """What loading a golden checkpoint without a template gives."""
    if name == "sharded":
        return make.sharded_values()
    if name == "per_rank":
        return make.by_rank_values()
    state = STATES[name][0]()
    if name == "plain":
        model, optimizer = state["model"], state["optimizer"]
        state["model"] = OrderedDict(model.state_dict())
        state["optimizer"] = optimizer.state_dict()
        for group, names in zip(state["optimizer"]["param_groups"], [PARAMETERS], strict=True):
            assert group["params"] == list(range(len(names)))
    return state


PARAMETERS = ["model.a.weight", "model.a.bias", "model.norm.weight", "model.norm.bias"]


def assert_same(found: Any, wanted: Any, path: str = "") -> None:
    """Equal in type, order and every bit."""
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor), path
        assert (found.dtype, found.shape, found.layout) == (wanted.dtype, wanted.shape, wanted.layout), path
        if wanted.layout is not torch.strided:
            found, wanted = found.to_dense(), wanted.to_dense()
        assert bits(found) == bits(wanted), path
        return
    assert type(found) is type(wanted), path
    if isinstance(wanted, dict):
        assert list(map(repr, found)) == list(map(repr, wanted)), path
        assert getattr(found, "default_factory", None) is getattr(wanted, "default_factory", None), path
        for key in wanted:
            assert_same(found[key], wanted[key], f"{path}.{key}")
    elif type(wanted) in (list, tuple):
        assert len(found) == len(wanted), path
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            assert_same(*pair, f"{path}.{index}")
    elif isinstance(wanted, numpy.ndarray):
        assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes()), path
    else:
        assert repr(found) == repr(wanted), path


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_golden_checkpoints_load(name):
    """What was written by the first version is read by this one, to the last bit and the last type."""
    assert_same(shardckpt.load(ROOT / name, weights_only=False), expected(name))


def test_golden_module_and_optimizer_load_in_place():
    """A live model and optimizer take their state from the golden file."""
    model, optimizer = make.model_and_optimizer()
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [optimizer.state[p]["exp_avg"].clone() for p in list(model.parameters())[:2]]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=9.0)
    shardckpt.load(ROOT / "plain", {"model": model, "optimizer": optimizer})
    assert_same(dict(model.state_dict()), wanted)
    assert_same([optimizer.state[p]["exp_avg"] for p in list(model.parameters())[:2]], moments)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", NAMES)
def test_the_same_state_is_written_the_same(tmp_path, name):
    """No change of format slips in: shards are the same bytes and manifests say the same, whoever writes today."""
    path = tmp_path / name
    ranks.world(STATES[name][2]).run(make.save, name, str(path))
    # The bytes of pickles and of zstd frames are those of the libraries, which may change.
    stable = [p for p in sorted((ROOT / name).iterdir()) if p.suffix == ".safetensors" and name != "zstd"]
    for file in stable:
        assert (path / file.name).read_bytes() == file.read_bytes(), file
    assert sorted(p.name for p in path.iterdir()) == sorted(p.name for p in (ROOT / name).iterdir())
    today, golden = (json.loads((p / "manifest.json").read_bytes()) for p in (path, ROOT / name))
    for document in (today, golden):
        del document["writer"]
        for entry in document.get("objects", {}).values():
            entry["nbytes"] = entry["digest"] = None
        for file in document["files"] if name == "zstd" or "objects" in document else ():
            del file["size"], file["manifest_size"], file["manifest_digest"]
        if name == "zstd":
            for tensor in document["tensors"].values():
                tensor["nbytes"] = tensor["offset"] = None
    assert list(today) == list(golden)
    assert today == golden
    assert_same(shardckpt.load(path, weights_only=False), expected(name))


@pytest.mark.parametrize("name", NAMES)
def test_stock_safetensors_opens_golden_shards(name):
    """Whoever has only safetensors still gets at every tensor that it has a dtype for."""
    tensors = Reader(ROOT / name).document["tensors"]
    seen = 0
    for file in (ROOT / name).glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - a safe_open is no dict
                seen += 1
                entry = tensors.get(key)
                if entry is None or name == "zstd" or entry["dtype"] in ("complex128", "complex32"):
                    assert shard.get_tensor(key) is not None
                    continue
                found = shard.get_tensor(key)
                assert str(found.dtype) == f"torch.{entry['dtype']}"
                assert list(found.shape) == entry["shape"]
    assert seen == sum(len(entry["file"]) for entry in tensors.values())


class Reader:
    """Format v1, read by what docs/format.md says and nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = (path / "manifest.json").read_bytes()
        assert data[:1] == b"{", "plain JSON below a megabyte"
        self.document = json.loads(data)
        assert self.document["format"] == "shardckpt"
        assert self.document["version"] == 1

    def check_files(self) -> None:
        """Names, sizes, digests, headers, and that both manifests tell the same."""
        document, save_id = self.document, self.document["save_id"]
        named = {"manifest.json"} | {entry["file"] for entry in document.get("objects", {}).values()}
        assert len(document["files"]) == document["world_size"]
        for rank, file in enumerate(document["files"]):
            assert file["name"] == f"rank-{rank:05d}-{save_id}.safetensors"
            assert file["manifest"] == f"rank-{rank:05d}-{save_id}.json"
            named |= {file["name"], file["manifest"]}
            self._check_rank(rank, file)
        for entry in document.get("objects", {}).values():
            assert entry["file"] in (f"objects-{save_id}.pkl", f"objects-{save_id}-rank-00001.pkl")
            data = (self.path / entry["file"]).read_bytes()[entry["offset"] : entry["offset"] + entry["nbytes"]]
            assert xxhash.xxh3_64_hexdigest(data) == entry["digest"]
        assert named == {p.name for p in self.path.iterdir()}

    def _check_rank(self, rank: int, file: dict[str, Any]) -> None:
        shard = (self.path / file["name"]).read_bytes()
        said = (self.path / file["manifest"]).read_bytes()
        assert len(shard) == file["size"]
        assert len(said) == file["manifest_size"]
        assert xxhash.xxh3_64_hexdigest(said) == file["manifest_digest"]
        word = json.loads(said)
        assert (word["format"], word["version"], word["rank"]) == ("shardckpt", 1, rank)
        assert (word["save_id"], word["file"], word["size"]) == (self.document["save_id"], file["name"], file["size"])
        (length,) = struct.unpack("<Q", shard[:8])
        assert word["header_nbytes"] == 8 + length
        assert word["header_nbytes"] % 4096 == 0
        assert xxhash.xxh3_64_hexdigest(shard[: 8 + length]) == word["header_digest"]
        header = json.loads(shard[8 : 8 + length])
        header.pop("__metadata__")
        assert header.keys() == word["entries"].keys()
        at = 8 + length
        for key, entry in word["entries"].items():
            tensor = self.document["tensors"][entry["fqn"]]
            row = list(zip(*(tensor[c] for c in ("file", "offset", "nbytes", "starts", "lengths")), strict=True))
            assert (rank, entry["offset"], entry["nbytes"], entry["starts"], entry["lengths"]) in row
            spans = zip(entry["starts"], entry["lengths"], strict=True)
            box = ",".join(f"{start}:{start + n}" for start, n in spans)
            whole = entry["lengths"] == tensor["shape"] and entry["fqn"] != "__metadata__"
            assert key == (entry["fqn"] if whole else f"{entry['fqn']}[{box}]")
            begin, end = header[key]["data_offsets"]
            assert (8 + length + begin, end - begin) == (entry["offset"], entry["nbytes"])
            assert entry["offset"] == at
            at += entry["nbytes"]
            if "codec" not in entry:
                assert entry["offset"] % numpy.dtype(NUMPY[entry["dtype"]]).alignment == 0
            cells = self._cells(shard, entry)
            assert "".join(map(xxhash.xxh3_64_hexdigest, cells)) == entry["digests"]
        assert at == len(shard)

    @staticmethod
    def _cells(shard: bytes, entry: dict[str, Any]) -> list[bytes]:
        """The stored bytes under each digest: a frame, or a mebibyte."""
        data = shard[entry["offset"] : entry["offset"] + entry["nbytes"]]
        if "codec" not in entry:
            return [data[at : at + MIB] for at in range(0, len(data), MIB)]
        assert entry["codec"] == "zstd"
        ends = numpy.cumsum(entry["frames"]).tolist()
        return [data[end - size : end] for size, end in zip(entry["frames"], ends, strict=True)]

    def tensor(self, name: str) -> tuple[str, numpy.ndarray[Any, Any]]:
        """The dtype's name and the elements of a tensor, put together from its shards."""
        entry = self.document["tensors"][self.document.get("aliases", {}).get(name, name)]
        dtype = numpy.dtype(NUMPY[entry["dtype"]])
        whole = numpy.zeros(entry["shape"], dtype)
        filled = 0
        for index, starts, lengths in zip(entry["file"], entry["starts"], entry["lengths"], strict=True):
            file = self.document["files"][index]
            word = json.loads((self.path / file["manifest"]).read_bytes())
            shard = (self.path / file["name"]).read_bytes()
            (found,) = (e for e in word["entries"].values() if (e["fqn"], e["starts"]) == (self._stored(name), starts))
            cells = self._cells(shard, found)
            if "codec" in found:
                cells = [zstandard.ZstdDecompressor().decompress(cell) for cell in cells]
                assert all(len(cell) == MIB for cell in cells[:-1])
            part = numpy.frombuffer(b"".join(cells), dtype).reshape(lengths)
            whole[tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))] = part
            filled += prod(lengths)
        assert filled == prod(entry["shape"])
        return entry["dtype"], whole

    def _stored(self, name: str) -> str:
        return str(self.document.get("aliases", {}).get(name, name))

    def tensors_of(self, node: Any) -> list[str]:
        """The names of the tensors in a skeleton, in its order."""
        if isinstance(node, list):
            return [name for item in node for name in self.tensors_of(item)]
        if not isinstance(node, dict):
            return []
        if list(node) in (["$tensor"], ["$ndarray"]):
            return [next(iter(node.values()))]
        if list(node) == ["$per_rank"]:
            nodes = self.document["per_rank"][node["$per_rank"]]
            ranks = [str(rank) for rank in range(self.document["world_size"])]
            return [name for rank in ranks for name in self.tensors_of(nodes.get(rank))]
        return [name for item in node.values() for name in self.tensors_of(item)]


def live_tensors(value: Any) -> list[torch.Tensor]:
    """The same of a state, sparse tensors as their parts."""
    if isinstance(value, torch.Tensor):
        match value.layout:
            case torch.sparse_coo:
                return [value._indices(), value._values()]
            case torch.sparse_csr:
                return [value.crow_indices(), value.col_indices(), value.values()]
        return [value]
    if isinstance(value, numpy.ndarray):
        return [torch.from_numpy(value)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in live_tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in live_tensors(item)]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_an_independent_reader_finds_what_was_saved(name):
    """docs/format.md is enough to read a checkpoint: plain JSON, numpy, xxhash and zstandard get every bit."""
    reader = Reader(ROOT / name)
    reader.check_files()
    names = reader.tensors_of(reader.document["state"])
    wanted = live_tensors(expected(name))
    assert len(names) == len(wanted) > 3
    for fqn, tensor in zip(names, wanted, strict=True):
        dtype, elements = reader.tensor(fqn)
        assert f"torch.{dtype}" == str(tensor.dtype), fqn
        assert elements.shape == tuple(tensor.shape), fqn
        assert elements.tobytes() == bits(tensor), fqn


def test_tied_tensors_are_stored_once():
    """An alias names what it shares, so tied weights cost nothing."""
    document = Reader(ROOT / "plain").document
    assert document["aliases"] == {"tensors.tied": "tensors.matrix", "model.b.weight": "model.a.weight"}
    assert not document["aliases"].keys() & document["tensors"].keys()


def test_frames_are_of_a_mebibyte():
    """Several independent frames in one entry: a part is read without the rest."""
    word = json.loads(next((ROOT / "zstd").glob("rank-*.json")).read_bytes())
    assert [len(word["entries"][key]["frames"]) for key in ("long", "zeros", "short")] == [3, 5, 1]


def test_the_golden_files_are_small():
    """They are in every clone."""
    assert sum(p.stat().st_size for p in ROOT.rglob("*") if p.is_file()) < 1 << 20


def test_format_md_names_every_field_and_tag():
    """The specification cannot fall behind: each field of the manifests and each tag of the skeleton is in it."""
    from shardckpt import manifest as mf
    from shardckpt.state import schema, values

    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    structs = (mf.Manifest, mf.FileEntry, mf.TensorEntry, mf.ObjectEntry, mf.RankManifest, mf.ShardEntry)
    structs += (mf.RankValues, mf.TensorHead)
    fields = {field.name for struct in structs for field in msgspec.structs.fields(struct)}
    tags = {tag for tag in (*values._DECODERS, *schema._CHILDREN) if tag}
    missing = sorted(word for word in fields | tags if f"`{word}`" not in text and f'"{word}"' not in text)
    assert missing == []
