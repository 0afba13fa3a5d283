"""`shardckpt.verify`: every fault, with its place, by one process that reads all and unpickles nothing."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from golden.make import ROOT
from shardckpt import CorruptCheckpointError, Fault, StorageError, VerifyReport
from shardckpt.codecs import DIGEST_BLOCK, digest, digests_text
from shardckpt.commit import reading
from shardckpt.tools import checking
from storage.wrappers import WrapperStorage

GOLDEN = sorted(path.name for path in ROOT.iterdir() if path.is_dir())


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> Any:
        return os._exit, (99,)


def state() -> dict[str, Any]:
    noise = torch.randint(256, (5 * DIGEST_BLOCK // 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"big": noise, "other": noise.flip(0), "small": torch.arange(5.0), "step": 1000, "object": slice(3)}


@pytest.fixture(params=[None, "zstd"])
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    shardckpt.save(state(), tmp_path / "c", compression=request.param)
    return tmp_path / "c"


def entries(path: Path) -> dict[str, dict[str, Any]]:
    """What the rank's manifest says of each tensor."""
    (file,) = path.glob("rank-*.json")
    found: dict[str, dict[str, Any]] = json.loads(file.read_bytes())["entries"]
    return found


def shard(path: Path) -> Path:
    (found,) = path.glob("*.safetensors")
    return found


def damage(file: Path, *places: int) -> None:
    data = bytearray(file.read_bytes())
    for at in places:
        data[at] ^= 1
    file.write_bytes(data)


def places(report: VerifyReport) -> list[tuple[str | None, str, int | None, int | None]]:
    return [(fault.tensor, fault.file, fault.offset, fault.nbytes) for fault in report.faults]


@pytest.mark.parametrize("name", GOLDEN)
def test_sound_checkpoints_are_sound(name):
    """No false alarm: of all that any save writes, nothing is called damaged, and all of it is read."""
    report = shardckpt.verify(ROOT / name)
    assert report.ok, report.faults
    assert report.values_checked
    files = [file.stat().st_size for file in (ROOT / name).iterdir() if file.name != "manifest.json"]
    assert report.bytes_read >= sum(files)
    for rank in range(report.world_size):
        assert shardckpt.verify(ROOT / name, rank=rank).ok
    for tensor in shardckpt.tools.inspect(ROOT / name).tensors:
        assert shardckpt.verify(ROOT / name, tensor=tensor.name).ok


def test_all_faults_are_reported_with_their_places(saved):
    """One look tells of all damage, so that nobody mends one thing to find the next; blocks side by side are one."""
    table = entries(saved)
    big, other, small = (table[name] for name in ("big", "other", "small"))
    sizes = big.get("frames") or [DIGEST_BLOCK, DIGEST_BLOCK, DIGEST_BLOCK // 2]
    at = [big["offset"], big["offset"] + sizes[0], big["offset"] + sizes[0] + sizes[1]]
    damage(shard(saved), 100, at[0], at[1] + 7, small["offset"])
    (objects,) = saved.glob("objects-*")
    damage(objects, 60)
    report = shardckpt.verify(saved)
    name = shard(saved).name
    assert places(report) == [
        (None, objects.name, 0, objects.stat().st_size),
        (None, name, 0, 4096),
        *sorted(
            [("big", name, at[0], sizes[0] + sizes[1]), ("small", name, small["offset"], small["nbytes"])],
            key=lambda place: place[2],
        ),
    ]
    assert report.faults[0].object == "object"
    (fault,) = (fault for fault in report.faults if fault.tensor == "small")
    assert fault.expected == small["digests"] != fault.found
    assert other["offset"] not in [fault.offset for fault in report.faults]
    assert "tensor 'small' in" in str(fault)
    assert "4 FAULT(S)" in repr(report)


def test_a_rank_or_a_tensor_alone(tmp_path):
    """What is not asked for is not read, and its damage is not reported."""
    shutil.copytree(ROOT / "sharded", tmp_path / "c")
    first, second = sorted((tmp_path / "c").glob("*.safetensors"))
    inspected = {tensor.name: tensor for tensor in shardckpt.tools.inspect(tmp_path / "c").tensors}
    hurt = next(tensor for tensor in inspected.values() if {shard.rank for shard in tensor.shards} == {0})
    sound = next(tensor for tensor in inspected.values() if {shard.rank for shard in tensor.shards} == {1})
    (entry,) = (
        e for e in json.loads(first.with_suffix(".json").read_bytes())["entries"].values() if e["fqn"] == hurt.name
    )
    damage(first, entry["offset"])
    damage(second, 9)
    assert [fault.file for fault in shardckpt.verify(tmp_path / "c").faults] == [first.name, second.name]
    assert [fault.tensor for fault in shardckpt.verify(tmp_path / "c", rank=0).faults] == [hurt.name]
    assert [fault.offset for fault in shardckpt.verify(tmp_path / "c", rank=1).faults] == [0]
    assert len(shardckpt.verify(tmp_path / "c", tensor=hurt.name).faults) == 1
    assert shardckpt.verify(tmp_path / "c", tensor=sound.name).ok
    with pytest.raises(shardckpt.TensorNotFoundError, match="Did you mean"):
        shardckpt.verify(tmp_path / "c", tensor=hurt.name + "x")
    with pytest.raises(shardckpt.UsageError, match="ranks 0 to 1"):
        shardckpt.verify(tmp_path / "c", rank=2)


def test_what_is_cut_off_is_told_from_what_is_damaged(saved):
    """Of a file that is too short, all that is there is still checked, and the rest is named tensor by tensor."""
    table = entries(saved)
    last = max(table.values(), key=lambda entry: entry["offset"])
    size = shard(saved).stat().st_size
    damage(shard(saved), 5)
    os.truncate(shard(saved), size - 1)
    report = shardckpt.verify(saved)
    cut = report.faults[1]
    assert (cut.what, cut.tensor) == ("is cut off", last["fqn"])
    assert (cut.offset or 0) + (cut.nbytes or 0) == size
    assert [fault.offset for fault in report.faults] == [0, cut.offset, size - 1]
    with shard(saved).open("ab") as file:
        file.write(b"xyz")
    assert {fault.what for fault in shardckpt.verify(saved).faults} >= {"has the wrong size"}


@pytest.mark.parametrize("pattern", ["*.safetensors", "rank-*.json", "objects-*"])
@pytest.mark.parametrize("how", ["missing", "link", "empty"])
def test_files_that_cannot_be_used(saved, pattern, how):
    """A file that is gone, leads elsewhere or is empty is a fault that names it, and ends nothing."""
    (file,) = saved.glob(pattern)
    moved = file.rename(saved.parent / "elsewhere")
    if how == "link":
        file.symlink_to(moved)
    elif how == "empty":
        file.write_bytes(b"")
    report = shardckpt.verify(saved)
    assert {fault.file for fault in report.faults} == {file.name}
    with pytest.raises(CorruptCheckpointError, match=file.name):
        shardckpt.load(saved, weights_only=False)


@pytest.mark.parametrize(
    ("was", "becomes"), [('"step":1000', '"step":1001'), ('"step":1000', '"stap":1000'), ('"small":{"$', '"smell":{"$')]
)
def test_plain_values_are_held_against_what_the_ranks_wrote(tmp_path, was, becomes):
    """A flipped digit of a step is neither restored nor called sound, though nothing but JSON holds it."""
    shardckpt.save(state(), tmp_path / "c")
    record = tmp_path / "c/manifest.json"
    text = record.read_text()
    squeezed = text.replace('"step": 1000', '"step":1000').replace('"small": {', '"small":{')
    assert was in squeezed
    record.write_text(squeezed.replace(was, becomes))
    (fault,) = shardckpt.verify(tmp_path / "c").faults
    assert (fault.file, "another state" in fault.what) == ("manifest.json", True)
    live = {"step": 5, "small": torch.zeros(5)}
    for strict in (True, False):
        with pytest.raises(CorruptCheckpointError, match=r"manifest\.json is damaged"):
            shardckpt.load(tmp_path / "c", live, strict=strict)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json is damaged"):
        shardckpt.load(tmp_path / "c", weights_only=False)
    assert live["step"] == 5
    assert not live["small"].any()


def test_what_shares_the_shards_of_another_says_that_its_values_are_alone(tmp_path):
    """Nobody is told that values have been checked that nothing could be held against."""
    checkpointer = shardckpt.Checkpointer()
    for step in (1, 2):
        checkpointer.save({"step": step, "w": torch.ones(3)}, tmp_path / str(step), state_version="same")
    checkpointer.close()
    assert [shardckpt.verify(tmp_path / name).values_checked for name in "12"] == [True, False]
    assert shardckpt.verify(tmp_path / "2").ok
    assert shardckpt.load(tmp_path / "2")["step"] == 2


def test_nothing_is_unpickled(tmp_path):
    """A checkpoint from anywhere can be verified."""
    shardckpt.save({"bomb": Bomb(), "w": torch.ones(3)}, tmp_path / "c")
    report = shardckpt.verify(tmp_path / "c")
    assert report.ok
    assert report.objects == 1


class Watched(WrapperStorage):
    """Fails to read what touches some bytes of shards, and counts how many read at a time."""

    def __init__(self, inner: Any, bad: range = range(0), code: int = errno.EIO) -> None:
        super().__init__(inner)
        self.bad, self.code = bad, code
        self.most = self.reading = 0
        self.lock = threading.Lock()
        self.two = threading.Event()

    def read_into(self, name: str, offset: int, into: memoryview, *, cached: bool = True) -> None:
        with self.lock:
            self.reading += 1
            self.most = max(self.most, self.reading)
            if self.reading > 1:
                self.two.set()
        try:
            if name.endswith("safetensors") and offset:
                self.two.wait(20)
            if name.endswith("safetensors") and offset < self.bad.stop and offset + len(into) > self.bad.start:
                raise StorageError(f"cannot read {name}") from OSError(self.code, "bad")
            super().read_into(name, offset, into, cached=cached)
        finally:
            with self.lock:
                self.reading -= 1


def test_a_bad_sector_is_a_fault_and_the_rest_is_read(tmp_path, monkeypatch):
    """A dying disk shows what it still has; a storage that refuses everything is an error, and no verdict."""
    shardckpt.save({"a": torch.ones(3 << 20), "b": torch.ones(3 << 20)}, tmp_path / "c")
    start = entries(tmp_path / "c")["b"]["offset"]
    bad = range(start + (8 << 20), start + (8 << 20) + 1)
    original = reading.open_storage
    made: list[Watched] = []

    def opened(*args: Any) -> Watched:
        made.append(Watched(original(*args), bad, code))
        return made[-1]

    monkeypatch.setattr(reading, "open_storage", opened)
    code = errno.EIO
    report = shardckpt.verify(tmp_path / "c")
    assert {fault.tensor for fault in report.faults} == {"b"}
    assert all("cannot be read" in fault.what for fault in report.faults)
    assert any((f.offset or 0) <= bad.start < (f.offset or 0) + (f.nbytes or 0) for f in report.faults)
    assert report.bytes_read > 12 << 20
    assert made[0].most > 1, "it is read in parallel"
    code = errno.ETIMEDOUT
    with pytest.raises(StorageError):
        shardckpt.verify(tmp_path / "c")


def test_a_checkpoint_that_is_replaced_meanwhile_is_no_damage(tmp_path, monkeypatch):
    """Verifying beside a training that overwrites its last.ckpt raises no false alarm."""
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
    original = checking.Checking._open
    saves = [2.0]

    def first_overwritten(self: Any, *args: Any, **options: Any) -> Any:
        if saves:
            shardckpt.save({"w": torch.full((3,), saves.pop())}, tmp_path / "c")
        return original(self, *args, **options)

    monkeypatch.setattr(checking.Checking, "_open", first_overwritten)
    report = shardckpt.verify(tmp_path / "c")
    assert report.ok
    assert report.save_id == shardckpt.tools.inspect(tmp_path / "c").save_id


def test_faults_side_by_side_are_one(tmp_path):
    """A tensor that rotted as a whole is one line, not a thousand."""
    faults = [Fault("is damaged", "f", "t", None, at, 10, f"{at}", "x") for at in (10, 0, 20, 40)]
    merged = checking.in_order([*faults, Fault("is damaged", "f", "u", None, 50, 5, "e", "x")])
    assert [(fault.tensor, fault.offset, fault.nbytes) for fault in merged] == [
        ("t", 0, 30),
        ("t", 40, 10),
        ("u", 50, 5),
    ]
    assert merged[0].expected == "0"


@pytest.mark.parametrize(
    "state", [{"$dict": 5}, {"$tuple": {"a": 1}}, {"own": {"$optimizer": 3}}, [], 7, {"own": {"$defaultdict": []}}]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_say_what_is_no_state(tmp_path, state, rank):
    """What a hostile rank's manifest says, with its right digest, is compared with the commit record, and no more."""
    shutil.copytree(ROOT / "sharded", tmp_path / "c")
    record = json.loads((tmp_path / "c/manifest.json").read_bytes())
    listed = record["files"][rank]
    word = json.loads((tmp_path / "c" / listed["manifest"]).read_bytes())
    data = json.dumps(word | {"state": state}).encode()
    (tmp_path / "c" / listed["manifest"]).write_bytes(data)
    listed |= {"manifest_size": len(data), "manifest_digest": digests_text([digest(data)])}
    (tmp_path / "c/manifest.json").write_text(json.dumps(record))
    assert "another state" in shardckpt.verify(tmp_path / "c").faults[0].what
    with pytest.raises(CorruptCheckpointError, match="another state"):
        shardckpt.load(tmp_path / "c")
