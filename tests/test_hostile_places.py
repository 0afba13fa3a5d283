"""Places where something else lies than what we put there, with names that are odd, or that others own."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
import shardckpt
from multirank import place_cases
from shardckpt import Checkpointer


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((5,), float(value)), "odd": Path}


def found(path: Any) -> float:
    return float(shardckpt.load(path, weights_only=False)["w"][0])


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_directory(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("kept")


def a_link(path: Path) -> None:
    target = path.with_name("target-of-link")
    target.write_text("kept")
    path.symlink_to(target)


def a_dead_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def a_circle(path: Path) -> None:
    path.symlink_to(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = (a_pipe, a_directory, a_link, a_dead_link, a_circle, a_device)
Make = Callable[[Path], None]


@pytest.mark.parametrize("make", KINDS)
def test_what_is_called_manifest_and_is_none_is_refused(tmp_path: Path, make: Make) -> None:
    """Neither a load nor a save waits for a pipe, reads a device or follows a link; the error names what is there."""
    path = tmp_path / "ck"
    path.mkdir()
    make(path / "manifest.json")
    for act in (lambda: shardckpt.load(path), lambda: Checkpointer().save(state(1), path)):
        with pytest.raises(
            shardckpt.CorruptCheckpointError, match=r"ck/manifest\.json is (a symbolic link|not a regular)"
        ):
            act()
    assert not [name for name in os.listdir(path) if name.startswith(("rank-", "saving-", ".tmp-"))]
    assert os.path.lexists(path / "manifest.json")


@pytest.mark.parametrize("suffix", (".safetensors", ".json", ".pkl"))
@pytest.mark.parametrize("make", KINDS)
def test_what_stands_in_for_a_file_of_a_checkpoint_is_refused(tmp_path: Path, make: Make, suffix: str) -> None:
    """A shard, a manifest of a rank or an object that became something else is damage, and nothing hangs on it."""
    path = tmp_path / "ck"
    Checkpointer().save(state(1), path)
    (victim,) = [file for file in path.iterdir() if file.name.endswith(suffix) and file.name != "manifest.json"]
    victim.unlink()
    make(victim)
    with pytest.raises(shardckpt.CorruptCheckpointError, match=victim.name):
        shardckpt.load(path, weights_only=False)
    Checkpointer().save(state(2), path)
    assert found(path) == 2
    assert os.path.lexists(victim) == (make is a_directory or make is a_pipe or victim.is_symlink())


@pytest.mark.parametrize("make", KINDS)
def test_strangers_with_names_of_ours_are_let_be(tmp_path: Path, make: Make) -> None:
    """What is called like a shard, a marker or a temporary file, and is none, neither stops a save nor is followed."""
    path = tmp_path / "ck"
    path.mkdir()
    for name in ("rank-00000-0abcdefgh012345.safetensors", "saving-0abcdefgh012345.json", ".tmp-0123456789abcdef"):
        shutil.rmtree(path / "target-of-link", ignore_errors=True)
        make(path / name)
    Checkpointer().save(state(1), path)
    Checkpointer().save(state(2), path)
    assert found(path) == 2
    Checkpointer().prune(path)
    Checkpointer().remove(path)
    if make is a_directory:
        assert (path / "saving-0abcdefgh012345.json" / "precious").read_text() == "kept"
    if make is a_link:
        assert (path / "target-of-link").read_text() == "kept"


@pytest.mark.parametrize("make", (a_link, a_dead_link, a_circle, a_device))
def test_a_link_in_place_of_the_directory_is_replaced(tmp_path: Path, make: Make) -> None:
    """As `remove` does: the link goes, and what it leads to stays as it is."""
    path = tmp_path / "ck"
    make(path)
    Checkpointer().save(state(1), path)
    assert found(path) == 1
    assert not path.is_symlink()


@pytest.mark.parametrize("make", (a_pipe, lambda path: path.write_text("kept")))
@pytest.mark.parametrize("below", ("", "/deeper", "/much/deeper"))
def test_what_is_no_directory_is_in_the_way(tmp_path: Path, make: Make, below: str) -> None:
    """A file or a pipe where the directory, or one above it, should be: an error that names it, and it stays."""
    path = tmp_path / "ck"
    make(path)
    with pytest.raises(shardckpt.StorageError, match=str(path)):
        Checkpointer().save(state(1), f"{path}{below}")
    assert path.exists()
    with pytest.raises((shardckpt.CheckpointNotFoundError, shardckpt.StorageError), match=str(path)):
        shardckpt.load(f"{path}{below}")


@pytest.mark.parametrize(
    "name",
    (
        "two\nlines",
        " blanks ",
        "tab\there",
        "-rf",
        "%2e%2e",
        "ünï\u2028cödé",
        os.fsdecode(b"not\xffutf8"),
        "\x1b[31mred",
    ),
)
def test_odd_names_are_names(tmp_path: Path, name: str) -> None:
    """Whatever a file system takes for a name, we take."""
    path = tmp_path / name / name
    Checkpointer().save(state(1), path)
    Checkpointer().async_save(state(2), path).result()
    assert found(path) == 2
    assert shardckpt.latest(tmp_path / name) == str(path)
    with pytest.raises(shardckpt.CheckpointNotFoundError):
        shardckpt.load(tmp_path / name / "none")
    Checkpointer().remove(path)
    assert not path.exists()


@pytest.mark.parametrize("path", ("n" * 256, "/".join(["n" * 200] * 30)), ids=("name", "path"))
def test_names_that_are_too_long(tmp_path: Path, path: str) -> None:
    """They are errors of the storage, which say so, of a save as of a load."""
    with pytest.raises(shardckpt.StorageError, match="File name too long"):
        Checkpointer().save(state(1), tmp_path / path)
    with pytest.raises((shardckpt.StorageError, shardckpt.CheckpointNotFoundError), match="nnn"):
        shardckpt.load(tmp_path / path)
    assert not shardckpt.is_checkpoint(tmp_path / path)


@pytest.mark.multiprocess
def test_an_error_about_an_odd_name_reaches_all_ranks(tmp_path: Path) -> None:
    """What is no text cannot be sent as text: a rank that choked on it would leave the others waiting."""
    (tmp_path / "file").write_text("in the way")
    path = os.fsdecode(os.fsencode(tmp_path) + b"/file/\xff\n")
    for kind, text in ranks.world(2).run(place_cases.refused, path):
        assert kind == "StorageError"
        assert "file" in text


STRANGER = """
import json, os, sys, torch, shardckpt
root = sys.argv[1]
shardckpt.save({"w": torch.ones(3)}, f"{root}/own/ck")  # what is imported late may be out of reach later
shardckpt.load(f"{root}/own/ck")
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
told = {}
def trying(name, act):
    try:
        told[name] = ["none", str(act())]
    except Exception as error:
        told[name] = [type(error).__name__, str(error)]
state = {"w": torch.ones(3)}
for name in ("closed", "sticky", "listed"):
    trying("save " + name, lambda: shardckpt.save(state, f"{root}/{name}/ck"))
    trying("load " + name, lambda: float(shardckpt.load(f"{root}/{name}/ck")["w"][0]))
    trying("remove " + name, lambda: shardckpt.Checkpointer().remove(f"{root}/{name}/ck"))
    trying("load again " + name, lambda: float(shardckpt.load(f"{root}/{name}/ck")["w"][0]))
print(json.dumps(told))
"""


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A directory that any user may enter, which pytest's are not."""
    root = Path(tempfile.mkdtemp(prefix="shardckpt-test-"))
    root.chmod(0o755)
    yield root
    shutil.rmtree(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can act as another user")
def test_places_of_another_user(open_root: Path) -> None:
    """Where permissions keep a user out, saves and removals are refused by name, and what lies there stays."""
    for name, mode in (("closed", 0o700), ("sticky", 0o1777), ("listed", 0o744)):
        Checkpointer().save(state(7), open_root / name / "ck")
        (open_root / name / "ck").chmod(0o777 | mode)
        (open_root / name).chmod(mode)
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(open_root)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for name in ("closed", "listed"):
        for act in ("save", "load", "remove"):
            assert told[f"{act} {name}"][0] == "StorageAccessError", told
            assert f"{open_root}/{name}" in told[f"{act} {name}"][1]
    # In a sticky directory one may add files, but not replace those of others.
    assert told["save sticky"][0] == "SaveFailedError"
    assert "manifest.json" in told["save sticky"][1]
    assert told["remove sticky"][0] == "StorageAccessError"
    for name in ("closed", "sticky", "listed"):
        (open_root / name).chmod(0o755)
        assert found(open_root / name / "ck") == 7
        left = os.listdir(open_root / name / "ck")
        assert not [file for file in left if file.startswith((".tmp-", "saving-"))]


@pytest.mark.parametrize("umask", (0o077, 0o027, 0o002))
def test_no_file_is_ever_more_open_than_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    """Weights may be secret: files that are there for a moment have the user's permissions from the start too."""
    modes: set[int] = set()
    opened = os.open

    def opening(path: Any, flags: int, mode: int = 0o777, **how: Any) -> int:
        descriptor = opened(path, flags, mode, **how)
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            modes.add(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", opening)
    before = os.umask(umask)
    try:
        Checkpointer().save(state(1), tmp_path / "run" / "ck")
    finally:
        os.umask(before)
    assert modes == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "run" / "ck").iterdir()} == {0o666 & ~umask}
