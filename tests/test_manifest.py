"""What a manifest says survives being written, and what it must not say is refused by name."""

import json
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt
from shardckpt import manifest as mf
from shardckpt.errors import CorruptCheckpointError, UnsupportedFormatError
from shardckpt.manifest import FileEntry, Manifest, ObjectEntry, RankManifest, RankValues, ShardEntry, TensorEntry
from shardckpt.state.schema import MAX_DEPTH, check_skeleton

SAVE_ID = "0123456789abcde"
DIGEST = "0123456789abcdef"
WHERE = "/run/step=7.ckpt/manifest.json"

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names.filter(lambda n: n[0] != "$"), inner, max_size=3),
    max_leaves=8,
)


def rows(*lengths: int, codec: str | None = None) -> TensorEntry:
    """A float32 matrix of 4 columns, one shard for each number of rows, one after another in file 0."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return TensorEntry(
        dtype="float32",
        shape=(sum(lengths), 4),
        file=[0] * len(lengths),
        offset=[4096 + 16 * start for start in starts],
        nbytes=[16 * n for n in lengths],
        starts=[(start, 0) for start in starts],
        lengths=[(n, 4) for n in lengths],
        codec=codec,
    )


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "save_id": SAVE_ID,
        "created": "2026-01-01T00:00:00.000+00:00",
        "world_size": 1,
        "writer": {"shardckpt": "0.1.0"},
        "files": [
            FileEntry(f"rank-00000-{SAVE_ID}.safetensors", 1 << 20, f"rank-00000-{SAVE_ID}.json", 900, DIGEST),
        ],
        "state": {"w": {"$tensor": "w"}, "o": {"$object": "o"}},
        "tensors": {"w": rows(3, 5)},
        "aliases": {"tied": "w"},
        "objects": {"o": ObjectEntry(f"objects-{SAVE_ID}.pkl", 0, 10, DIGEST)},
    }
    return Manifest(**(fields | changes))


def rank_manifest(**changes: Any) -> RankManifest:
    entry = ShardEntry("w", "float32", (0, 0), (3, 4), 4096, 48, DIGEST)
    fields: dict[str, Any] = {
        "save_id": SAVE_ID,
        "rank": 0,
        "file": f"rank-00000-{SAVE_ID}.safetensors",
        "size": 4144,
        "header_nbytes": 4096,
        "header_digest": DIGEST,
        "entries": {"w[0:3,0:4]": entry},
    }
    return RankManifest(**(fields | changes))


def as_json(value: Manifest | RankManifest) -> dict[str, Any]:
    return json.loads(mf.encode(value))


def changed(path: str, value: Any) -> bytes:
    """The manifest's JSON with the value at a dotted path replaced; ``del`` removes it."""
    document = as_json(manifest())
    node: Any = document
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        node = node[part]
    if value is del_:
        del node[last]
    else:
        node[last] = value
    return json.dumps(document).encode()


del_ = object()


@given(
    state=json_values,
    tensors=st.dictionaries(names, st.lists(st.integers(1, 5), min_size=0, max_size=3).map(lambda n: rows(*n))),
    writer=st.dictionaries(names, names, max_size=2),
    world_size=st.integers(1, 10**6),
)
def test_manifest_round_trip(state, tensors, writer, world_size):
    """Whatever names and values a state has, what is read is what was written."""
    before = manifest(state=state, tensors=tensors, writer=writer, world_size=world_size, aliases={})
    assert mf.decode_manifest(mf.encode(before), WHERE) == before


@given(st.dictionaries(names, st.integers(0, 40), max_size=4), json_values)
def test_rank_manifest_round_trip(cells, state):
    """A rank's word on what it wrote comes back as it was said."""
    entries = {
        key: ShardEntry(key, "uint8", (0,), (n + 1,), at, n, DIGEST * (n % 3), *(("zstd", [n]) if n % 2 else ()))
        for (key, n), at in zip(cells.items(), accumulate(cells.values(), initial=4096), strict=False)
    }
    before = rank_manifest(entries=entries, state=state, size=1 << 20)
    assert mf.decode_rank_manifest(mf.encode(before), WHERE) == before


def test_a_state_that_is_nothing_is_kept():
    """An object whose state_dict() is None makes a checkpoint that can be read."""
    assert mf.decode_manifest(mf.encode(manifest(state=None)), WHERE).state is None


def test_json_is_for_people():
    """One line per tensor and file, so that a person reads it and ``diff`` shows what changed."""
    lines = mf.encode(manifest()).decode().splitlines()
    assert lines[:4] == ["{", ' "format": "shardckpt",', ' "version": 1,', f' "save_id": "{SAVE_ID}",']
    assert sum('"w": {"dtype":"float32"' in line for line in lines) == 1
    assert sum(".safetensors" in line for line in lines) == 1


def test_large_manifests_are_compressed():
    """Past a megabyte a manifest is zstd, smaller and still readable; below it is plain JSON."""
    large = manifest(tensors={f"layers.{i}.weight": rows(3, 5) for i in range(12_000)} | {"w": rows(1)})
    large.files[0].size = 1 << 30
    data = mf.encode(large)
    plain = zstandard.ZstdDecompressor().decompress(data)
    assert data[:4] == b"\x28\xb5\x2f\xfd"
    assert len(data) < len(plain) / 5
    assert json.loads(plain)["format"] == "shardckpt"
    assert mf.decode_manifest(data, WHERE) == large


def test_newer_version_says_upgrade():
    """A checkpoint of a future format is no damage: the message names its version and the remedy."""
    for data in (
        changed("version", 2),
        b'{"format": "shardckpt", "version": 9, "all": "different"}',
        zstandard.ZstdCompressor().compress(b'{"format": "shardckpt", "version": 3, "state": 1}'),
    ):
        with pytest.raises(UnsupportedFormatError, match=r"manifest.json: written in format v\d.*Upgrade shardckpt"):
            mf.decode_manifest(data, WHERE)


def test_unknown_features_are_refused_by_name():
    """What a later writer adds and an older reader would misread, it does not read at all."""
    assert mf.decode_manifest(changed("requires", ["per_rank"]), WHERE).requires == ["per_rank"]
    with pytest.raises(UnsupportedFormatError, match=r"requires \['telepathy'\], .*Upgrade shardckpt"):
        mf.decode_manifest(changed("requires", ["per_rank", "telepathy"]), WHERE)


def test_a_world_of_ranks_without_files_is_refused():
    """Values by rank are listed by rank: a claim of a million million ranks must not become as many values."""
    document = as_json(manifest()) | {"per_rank": {"p": {"0": 1}}, "world_size": 10**12}
    with pytest.raises(CorruptCheckpointError, match="but there are 1 `files`"):
        mf.decode_manifest(json.dumps(document).encode(), WHERE)


def test_no_truncation_passes():
    """However much of the end is missing, plain or compressed, it is damage and nothing else."""
    for whole in (mf.encode(manifest()), zstandard.ZstdCompressor().compress(mf.encode(manifest()))):
        for length in range(len(whole.rstrip()) - 1):
            with pytest.raises(CorruptCheckpointError, match="manifest.json is not a manifest"):
                mf.decode_manifest(whole[:length], WHERE)


TWO_FILES = [json.loads(msgspec.json.encode(manifest().files[0]))] * 2
HOSTILE = [
    ("format", "other", "format"),
    ("version", 0, "version|format v0"),
    ("version", "1", r"\$\.version"),
    ("version", True, r"\$\.version"),
    ("save_id", "../../etc", "save_id"),
    ("save_id", 5, r"\$\.save_id"),
    ("world_size", 0, "world_size"),
    ("world_size", 1.5, r"\$\.world_size"),
    ("files", {}, r"\$\.files"),
    ("files", TWO_FILES, "files"),
    ("files.0.name", "../../../etc/passwd", "etc/passwd"),
    ("files.0.name", "/etc/passwd", "/etc/passwd"),
    ("files.0.name", f"rank-00000-{SAVE_ID}.safetensors\n", "not a name"),
    ("files.0.name", f"rank-0000٠-{SAVE_ID}.safetensors", "not a name"),
    ("files.0.name", f"rank-00000-{SAVE_ID}.json", "not a name"),
    ("files.0.name", "manifest.json", "not a name"),
    ("files.0.manifest", "manifest.json", "not a name"),
    ("files.0.manifest", f"x/rank-00000-{SAVE_ID}.json", "not a name"),
    ("files.0.size", -1, "impossible size"),
    ("files.0.manifest_size", -1, "impossible size"),
    ("files.0.manifest_size", 1 << 40, "impossible size"),
    ("files.0.manifest_digest", "", "manifest_digest"),
    ("files.0.manifest_digest", DIGEST.upper(), "manifest_digest"),
    ("files.0.manifest_digest", DIGEST * 2, "manifest_digest"),
    ("tensors", [], r"\$\.tensors"),
    ("tensors.w.dtype", 7, r"\$\.tensors\[\.\.\.\]\.dtype"),
    ("tensors.w.shape", [8, -4], "tensor 'w'"),
    ("tensors.w.shape", [8, 4, 1], "tensor 'w'"),
    ("tensors.w.shape", [1] * 65, "tensor 'w'"),
    ("tensors.w.shape", [10**9] * 60, "tensor 'w'"),
    ("tensors.w.shape", [0, 10**30], "tensor 'w'"),
    ("tensors.w.shape", [9, 4], "hold 32 of its 36 elements"),
    ("tensors.w.shape", [8, 4.5], r"shape"),
    ("tensors.w.file", [0], "columns of tensor 'w'"),
    ("tensors.w.file", [0, 1], "file 1 of 1"),
    ("tensors.w.file", [0, -1], "file -1 of 1"),
    ("tensors.w.offset", [4096, 1 << 62], "outside 'rank-00000"),
    ("tensors.w.offset", [4096, -16], "outside 'rank-00000"),
    ("tensors.w.nbytes", [48, -80], "outside 'rank-00000"),
    ("tensors.w.nbytes", [48, 1 << 40], "outside 'rank-00000"),
    ("tensors.w.nbytes", [48, 10**40], "outside 'rank-00000|range"),
    ("tensors.w.nbytes", [48, 2], "2 bytes for 20 elements"),
    ("tensors.w.starts", [[0, 0], [4, 0]], "outside its shape"),
    ("tensors.w.starts", [[0, 0], [-3, 0]], "outside its shape"),
    ("tensors.w.starts", [[0, 0], [3]], "1 dimensions"),
    ("tensors.w.lengths", [[3, 4], [0, 4]], "outside its shape"),
    ("tensors.w.lengths", [[3, 4], [5]], "dimensions"),
    ("aliases", {"a": "tied", "tied": "w"}, "alias 'a'"),
    ("aliases", {"a": "gone"}, "alias 'a'"),
    ("aliases", {"w": "w"}, "alias 'w'"),
    ("objects.o.file", "../../home/me/.ssh/id_rsa", "object 'o'"),
    ("objects.o.file", "manifest.json", "object 'o'"),
    ("objects.o.file", f"rank-00000-{SAVE_ID}.safetensors", "object 'o'"),
    ("objects.o.offset", -1, "object 'o'"),
    ("objects.o.nbytes", -1, "object 'o'"),
    ("objects.o.digest", "short", "object 'o'"),
    ("per_rank", {"p": {"1": 0}}, r"`per_rank` of 'p' has ranks \[1\] of 1"),
    ("per_rank", {"p": {"-1": 0}}, "`per_rank` of 'p'"),
    ("per_rank", {"p": {"one": 0}}, "per_rank"),
    ("per_rank", {"p": {"00": 0}}, "per_rank"),
    ("per_rank", {"p": [0]}, "per_rank"),
    ("files.0.size", 4096 + 128 - 1, "outside"),
    ("state", del_, "state"),
    ("tensors", del_, "tensors"),
]


@pytest.mark.parametrize(("path", "value", "named"), HOSTILE, ids=lambda value: str(value)[:30])
def test_impossible_values_are_named(path, value, named):
    """A hostile or damaged value is refused before anyone uses it, with the file and the field."""
    with pytest.raises(CorruptCheckpointError, match=named) as caught:
        mf.decode_manifest(changed(path, value), WHERE)
    assert str(caught.value).startswith(WHERE)


RANK_HOSTILE = [
    ({"file": "../x.safetensors"}, "file"),
    ({"rank": -1}, "rank"),
    ({"header_nbytes": 0}, "header"),
    ({"header_nbytes": 5000}, "header"),
    ({"header_digest": "xyz"}, "header"),
    ({"offset": 0}, "outside its file"),
    ({"offset": 4100}, "outside its file"),
    ({"nbytes": -1}, "outside its file"),
    ({"digests": DIGEST[:-1]}, "digests"),
    ({"digests": " " * 16}, "digests"),
    ({"starts": (-1, 0)}, "impossible box"),
    ({"lengths": (3,)}, "impossible box"),
    ({"codec": "zstd"}, "without"),
    ({"frames": [48]}, "without"),
    ({"codec": "zstd", "frames": [50, -2]}, "add up"),
    ({"codec": "zstd", "frames": [40]}, "add up"),
    ({"objects": {"o": ObjectEntry("../o.pkl", 0, 1, DIGEST)}}, "object 'o'"),
    ({"per_rank": RankValues({}, objects={"o": ObjectEntry("../o.pkl", 0, 1, DIGEST)})}, "object 'o'"),
]


@pytest.mark.parametrize(("changes", "named"), RANK_HOSTILE, ids=lambda value: str(value)[:30])
def test_impossible_rank_manifests_are_named(changes, named):
    """The same for what one rank says."""
    value = rank_manifest()
    for name, to in changes.items():
        setattr(value if hasattr(value, name) else value.entries["w[0:3,0:4]"], name, to)
    with pytest.raises(CorruptCheckpointError, match=named):
        mf.decode_rank_manifest(mf.encode(value), WHERE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"[]",
        b"null",
        b"{}",
        b"[" * 1_000_000,
        b'{"state":' * 100_000,
        b'{"format": "shardckpt", "state": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"\xff\xfe{}",
        b'{"\xff": 1}',
        b"\x28\xb5\x2f\xfd",
        b"\x28\xb5\x2f\xfd" + b"\xff" * 50,
        zstandard.ZstdCompressor().compress(b"\0" * (64 << 20)),
        zstandard.ZstdCompressor().compress(b"{}") + b"more",
        # A frame that claims to hold 2**60 bytes.
        b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"\x01\x00\x00",
        mf.encode(manifest())[:-2] + b', "save_id": "aaaaaaaaaaaaaaa"}',
        mf.encode(manifest()).replace(b'"aliases": {', b'"aliases": {"tied": "w", '),
        mf.encode(manifest()) + b"{}",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_manifest_is_refused_in_no_time(data):
    """No bytes hang us, exhaust memory or raise anything but our own error; doubled keys are ambiguous, so refused."""
    started = time.monotonic()
    with pytest.raises(CorruptCheckpointError, match="manifest.json"):
        mf.decode_manifest(data, WHERE)
    with pytest.raises(CorruptCheckpointError, match="manifest.json"):
        mf.decode_rank_manifest(data, WHERE)
    assert time.monotonic() - started < 10


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: b'{"format":"shardckpt",' + tail))
def test_no_bytes_raise_anything_else(data):
    """Whatever is found under the name of a manifest, callers have one error to catch."""
    with pytest.raises(CorruptCheckpointError):
        mf.decode_manifest(data, WHERE)


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["w", "x", "-1", "8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=2),
    max_leaves=6,
)
FIELDS = [
    "save_id", "files", "files.0", "files.0.size", "tensors", "tensors.w", "tensors.w.shape", "tensors.w.file",
    "tensors.w.starts", "tensors.w.lengths", "tensors.w.nbytes", "aliases", "objects", "objects.o", "per_rank",
]  # fmt: skip


@given(st.sampled_from(FIELDS), any_json)
@settings(max_examples=300)
def test_any_value_anywhere_is_read_or_refused(field, value):
    """A field of any type and size is either sound or our own error."""
    try:
        mf.decode_manifest(changed(field, value), WHERE)
    except CorruptCheckpointError as error:
        assert WHERE in str(error)


TAGS = ["tensor", "ndarray", "object", "tuple", "set", "frozenset", "dict", "ordered", "counter", "defaultdict", "int",
        "float", "complex", "bytes", "str", "size", "dtype", "device", "path", "numpy", "datetime", "date", "time",
        "timedelta", "per_rank", "module", "optimizer", "sparse", "unknown"]  # fmt: skip
BODIES = ["entries", "versions", "state", "param_groups", "params", "options", "loose", "rest", "layout", "parts"]
skeletons = st.recursive(
    any_json,
    lambda inner: (
        st.builds(lambda tag, body: {f"${tag}": body}, st.sampled_from(TAGS), inner)
        | st.builds(
            lambda tag, body: {f"${tag}": body},
            st.sampled_from(TAGS),
            st.dictionaries(st.sampled_from(BODIES), inner, max_size=4) | st.lists(st.lists(inner, max_size=2)),
        )
        | st.dictionaries(names, inner, max_size=2)
    ),
    max_leaves=8,
)


@given(skeletons)
@settings(max_examples=400, deadline=None)
def test_a_skeleton_that_is_accepted_can_be_restored(skeleton):
    """Nothing that the check lets pass makes the code behind it stumble: it is refused by name, or becomes a value."""
    from shardckpt.relocation import relocation
    from shardckpt.state import Maker

    found = manifest(state={"s": skeleton, "p": {"$per_rank": "p"}}, per_rank={"p": {0: skeleton}})
    try:
        check_skeleton(found, WHERE)
    except CorruptCheckpointError as error:
        assert WHERE in str(error)
        return
    maker = Maker(found, relocation(None))
    value = maker.new(found.state, "")
    maker.objects = dict.fromkeys(maker.objects, "object")
    for fresh in maker.fresh:
        fresh.tensor = torch.zeros(fresh.entry.shape)
    value()


def test_deep_nesting_is_refused(tmp_path):
    """A state as deep as Python's stack is refused by name, when read as when written."""
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    with pytest.raises(CorruptCheckpointError, match="deeper than 200 levels"):
        check_skeleton(manifest(state={"a": deep}), WHERE)
    check_skeleton(manifest(state=deep[0]), WHERE)
    shardckpt.save({"a": 1}, tmp_path / "ck")
    with pytest.raises(shardckpt.UnserialisableError, match="containers deep"):
        shardckpt.save({"a": deep}, tmp_path / "ck")
    assert shardckpt.load(tmp_path / "ck") == {"a": 1}


def test_claims_are_checked_before_memory_is_taken(tmp_path):
    """A manifest that claims terabytes is held against the files on disk before anything is allocated."""
    path = tmp_path / "ck"
    shardckpt.save({"w": torch.ones(8, 4)}, path)
    file = Path(path, "manifest.json")
    document = json.loads(file.read_bytes())
    document["files"][0]["size"] = 1 << 50
    rows = (1 << 46) - 4096
    document["tensors"]["w"] |= {"shape": [rows, 4], "nbytes": [16 * rows], "lengths": [[rows, 4]]}
    file.write_text(json.dumps(document))
    with pytest.raises(CorruptCheckpointError, match="should have 1125899906842624 bytes, and has"):
        shardckpt.load(path)
    with pytest.raises(CorruptCheckpointError, match="should have"):
        shardckpt.read_tensor(path, "w")


def test_bytes_that_several_tensors_have_are_refused():
    """A small file cannot be told to be many large tensors, and no two entries of a shard lie in each other."""
    again = manifest(tensors={f"t{i}": rows(8) for i in range(40)} | {"w": rows(3, 5)})
    again.files[0].size = 4096 + 8 * 16
    with pytest.raises(CorruptCheckpointError, match="bytes in common"):
        mf.decode_manifest(mf.encode(again), WHERE)
    value = rank_manifest()
    (entry,) = value.entries.values()
    value.entries["x"] = msgspec.structs.replace(entry, fqn="x", offset=entry.offset + entry.nbytes - 1)
    value.size += 1 << 20
    with pytest.raises(CorruptCheckpointError, match=r"entries 'w\[0:3,0:4\]' and 'x' have bytes in common"):
        mf.decode_rank_manifest(mf.encode(value), WHERE)


def test_a_frame_that_is_all_but_empty_is_refused():
    """Of a zstd bomb nothing is unpacked: names and offsets never compress like that."""
    bomb = zstandard.ZstdCompressor().compress(mf.encode(manifest()) + b" " * (80 << 20))
    with pytest.raises(CorruptCheckpointError, match="are allowed"):
        mf.decode_manifest(bomb, WHERE)


RACING = """
import os, sys, threading, shardckpt
from shardckpt import manifest
data = open(sys.argv[1], "rb").read()
sys.setswitchinterval(1e-6)

def race():
    together = threading.Barrier(8)
    def decode():
        together.wait()
        manifest.decode_manifest(data, "here")
    threads = [threading.Thread(target=decode) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(0)

children = [os.fork() or race() for _ in range(12)]
print({os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children})
"""


def test_threads_may_decode_first_at_the_same_time(tmp_path):
    """`ls` looks at many checkpoints at a time, a commit at many ranks: as a first act that must not kill a process."""
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "ck")
    script = [sys.executable, "-c", RACING, str(tmp_path / "ck" / "manifest.json")]
    done = subprocess.run(script, check=False, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("{0}\n", "")
