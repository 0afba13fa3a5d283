"""The command line: what it prints for people and for programs, and how it ends. What it does is in test_tools.py."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import shardckpt
from golden.make import ROOT
from shardckpt import errors
from shardckpt.cli import arguments, codes, screen
from shardckpt.cli.app import app

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
]

RUNNER = CliRunner()


def run(*arguments: object, code: int = 0) -> str:
    """Standard output of a command that ends with ``code``; of one that has none, what it says on standard error."""
    done = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, f"{done.stdout}{done.stderr}{done.exception!r}"
    # What a command found is its output, also where that is damage.
    return done.stdout or done.stderr


def as_json(*arguments: object, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two checkpoints that differ, one that was never finished, one that is damaged and one of a newer format."""
    root: Path = tmp_path_factory.mktemp("run")
    model = torch.nn.Linear(40, 3)
    for step in (1, 2):
        shardckpt.save(
            {"model": model, "step": step, "note": "[bold]no markup[/bold]", "o": slice(1)}, root / f"s{step}"
        )
        with torch.no_grad():
            model.weight[0, step] = float("nan")
    for name in ("unfinished", "damaged", "newer"):
        shutil.copytree(root / "s1", root / name)
    (root / "unfinished/manifest.json").unlink()
    (root / "damaged/manifest.json").write_text("{}")
    record = json.loads((root / "newer/manifest.json").read_bytes())
    (root / "newer/manifest.json").write_text(json.dumps(record | {"version": 99}))
    (root / "file").write_text("")
    return root


def test_ls(root):
    """One line for each checkpoint, and after them why some are none."""
    text = run("ls", root)
    assert text.splitlines()[0].split() == ["checkpoint", "step", "age", "size", "ranks", "status"]
    assert "unfinished: no manifest.json: its save was cut short" in text
    found = as_json("ls", root)
    assert {item["name"]: item["status"] for item in found} == {
        "s1": "complete", "s2": "complete", "unfinished": "unfinished", "damaged": "damaged", "newer": "newer",
    }  # fmt: skip
    assert [item["name"] for item in found if item["status"] == "complete"] == ["s2", "s1"]
    assert run("ls", ROOT / "plain" / "manifest.json").splitlines()[1].startswith("plain")
    assert as_json("ls", root / "s1")[0]["step"] == 1
    assert run("--version") == f"shardckpt {shardckpt.__version__}\n"


def test_inspect(root):
    """The tree with everything in it, text as it is, and the same for programs."""
    text = run("inspect", root / "s1")
    for part in ("weight  float32 [3, 40]  480 B", "step  1", "'[bold]no markup[/bold]'", "pickled object", "100.0%"):
        assert part in text
    assert "weight" not in run("inspect", root / "s1", "--depth", 1)
    found = as_json("inspect", root / "s1")
    assert [tensor["name"] for tensor in found["tensors"]] == ["model.weight", "model.bias"]
    assert found["values"]["step"] == 1
    assert found["objects"][0]["path"] == "o"
    assert "tree" not in found


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.iterdir() if path.is_dir()))
def test_every_kind_of_value_is_shown(name):
    """No checkpoint of this format is one that the command line cannot show, as a table and as JSON."""
    assert run("inspect", ROOT / name)
    assert as_json("inspect", ROOT / name)["save_id"]
    assert len(as_json("stats", ROOT / name)) == len(run("stats", ROOT / name).splitlines()) - 3
    assert as_json("diff", ROOT / name, ROOT / name)["equal"]


def test_stats(root):
    """NaN can be found by a person and by a script."""
    assert "2 tensor(s), 123 elements, 1 NaN, 0 Inf" in run("stats", root / "s2")
    found = {item["name"]: item for item in as_json("stats", root / "s2", "--include", "*weight")}
    assert list(found) == ["model.weight"]
    assert found["model.weight"]["nan"] == 1


def test_diff(root):
    """Differences are an exit code of their own, and shown where they are."""
    assert run("diff", root / "s1", root / "s1").startswith("the same: 2 of 2")
    text = run("diff", root / "s1", root / "s2", code=1)
    assert "model.weight  values" in text
    assert "different: 1 of 2 tensors" in text
    found = as_json("diff", root / "s1", root / "s2", code=1)
    assert not found["equal"]
    assert found["changed"] == [{"path": "step", "a": "1", "b": "2"}]
    assert run("diff", root / "s1", root / "s2", "--exclude", "step", "--include", "model.bias")


def test_verify(root, tmp_path):
    """Damage is an exit code, a line for each fault, and for programs where it lies."""
    assert run("verify", root / "s1").startswith("ok: 2 tensor(s), 1 pickled object(s)")
    shutil.copytree(root / "s1", tmp_path / "bad")
    (shard,) = (tmp_path / "bad").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    text = run("verify", tmp_path / "bad", code=4)
    assert "damaged, 1 fault(s)" in text
    assert "model.weight" in text
    found = as_json("verify", tmp_path / "bad", "--rank", 0, code=4)
    assert not found["ok"]
    assert [(fault["tensor"], fault["file"]) for fault in found["faults"]] == [("model.weight", shard.name)]
    assert as_json("verify", tmp_path / "bad", "--tensor", "model.bias")["ok"]
    assert "no rank 5" in run("verify", root / "s1", "--rank", 5, code=2)


def test_cp_and_prune(root, tmp_path):
    """A copy is a checkpoint; a dead save's files go when that is asked for, and not before."""
    assert "every byte verified" in run("cp", root / "s1", tmp_path / "copy")
    assert as_json("cp", root / "s1", tmp_path / "copy")["nbytes"] == 0
    assert "--overwrite" in run("cp", root / "s2", tmp_path / "copy", code=2)
    assert as_json("cp", root / "s2", tmp_path / "copy", "--overwrite")["nbytes"] > 0
    assert run("diff", root / "s2", tmp_path / "copy")
    shutil.copytree(root / "unfinished", tmp_path / "dead")
    assert "would be removed" in run("prune", tmp_path, "--dry-run")
    assert len(as_json("prune", tmp_path)["removed"][f"{tmp_path}/dead"]) == 3
    assert run("prune", tmp_path) == "nothing to prune\n"


@pytest.mark.parametrize("command", ("inspect", "stats", "diff", "verify", "cp"))
@pytest.mark.parametrize(
    ("name", "code", "says"),
    (
        ("none", 3, "nothing is there"),
        ("file", 3, "is a file"),
        ("", 3, "no manifest.json"),
        ("unfinished", 3, "cut short"),
        ("damaged", 4, "damaged"),
        ("newer", 5, "Upgrade shardckpt"),
    ),
)
def test_bad_input(root, tmp_path, command, name, code, says):
    """Each way to be no checkpoint has its exit code, and one message without a traceback."""
    more = {"diff": [root / "s1"], "cp": [tmp_path / "copy"]}.get(command, [])
    text = run(command, root / name, *more, code=code)
    assert text.startswith("shardckpt: ")
    assert says in text
    assert "Traceback" not in text
    assert not (tmp_path / "copy").exists()


def test_bad_usage(root):
    """What is wrong with the call is told apart from what is wrong with a checkpoint."""
    for wrong in (["ls"], ["lls", "x"], ["inspect", root / "s1", "--depth", "0"], ["ls", root, "-o", "key"]):
        assert run(*wrong, code=2)
    run("ls", root / "none", code=3)
    for unknown in (
        ("verify", root / "s1", "--tensor", "w9"),
        ("convert", root / "s1", root / "x.pt", "--prefix", "w9"),
    ):
        assert "w9" in run(*unknown, code=2)
    run("ls", "no-such-scheme://x", code=2)
    run("ls", "", code=2)


def test_damage_in_a_shard(root, tmp_path):
    """Reading tensors verifies them: a rotten byte is an exit code, and names the tensor."""
    shutil.copytree(root / "s1", tmp_path / "ck")
    (shard,) = (tmp_path / "ck").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "'model.weight'" in run("stats", tmp_path / "ck", code=4)
    assert run("inspect", tmp_path / "ck")


def test_every_error_has_a_code():
    """No error of the library is one that a script cannot tell from success, or from `diff`'s answer."""
    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    assert {codes.code_of(kind("")) for kind in kinds if issubclass(kind, shardckpt.ShardckptError)} == {
        2,
        3,
        4,
        5,
        6,
        7,
    }
    assert codes.code_of(errors.StorageAccessError("")) == codes.ExitCode.STORAGE
    assert codes.code_of(errors.TensorIndexError("")) == codes.ExitCode.USAGE


def test_storage_options():
    """Text stays text, since secrets may look like numbers; what is no text is JSON, and says so."""
    given = ["key=007", "secret=a=b", "anon:=true", "client_kwargs.endpoint_url=http://h", "client_kwargs.n:=2"]
    assert arguments.storage_options(given) == {
        "key": "007", "secret": "a=b", "anon": True, "client_kwargs": {"endpoint_url": "http://h", "n": 2},
    }  # fmt: skip
    assert arguments.storage_options(None) == {}
    for wrong in ("key", "=x", ":=1", "n:=[", "a.b=1"):
        with pytest.raises(typer.BadParameter):
            arguments.storage_options(["a=1", wrong])


def test_a_secret_is_not_shown():
    """A storage option that is mistyped may be a secret."""
    assert "hunter2" not in run("ls", "s3://b", "-o", "secret:=hunter2", code=2)


class Terminal(io.StringIO):
    """Standard output that a person looks at."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_80_columns(root, monkeypatch):
    """On a narrow terminal tables fold, and lose nothing."""
    name = "model." + "layers.12.attention." * 5 + "weight"
    shardckpt.save({name: torch.ones(3), "step": 1}, root.parent / "long")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    lines: list[str] = []
    for command in (["ls", root], ["inspect", root / "s1"], ["stats", root.parent / "long"]):
        out = Terminal()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            app([str(part) for part in command], standalone_mode=False)
        lines = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).splitlines()
        assert max(map(len, lines)) <= 80
    assert name in "".join(line.split()[0] for line in lines if line.strip())
    assert any(name in line for line in run("stats", root.parent / "long").splitlines())


def test_figures_for_people():
    """Sizes and ages are read at a glance."""
    assert [screen.ago(seconds) for seconds in (None, 3, 60, 7200, 200_000)] == [None, "3 s", "1 min", "2 h", "2 d"]
    assert [screen.number(value) for value in (None, 3, 2**64, 0.123456, 1e300)] == [
        None, "3", str(2**64), "0.1235", "1e+300",
    ]  # fmt: skip
    assert screen.shorten("abcdef", 5) == "ab..."


def test_a_real_process(root):
    """The program as installed: its output in a pipe, its exit codes, and nothing on standard error if all is well."""
    program = [sys.executable, "-m", "shardckpt.cli"]
    environment = os.environ | {"COLUMNS": "80"}
    asked = [["diff", "s1", "s2"], ["ls", "."], ["inspect", "none"]]
    started = [
        subprocess.Popen(
            [*program, *arguments], cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for arguments in asked
    ]
    (different, listed, missing) = [(*process.communicate(timeout=120), process.returncode) for process in started]
    assert different[1:] == ("", 1)
    assert "different: 1 of 2" in different[0]
    assert listed[1:] == ("", 0)
    assert not any(line != line.rstrip() or "\x1b" in line for line in listed[0].splitlines())
    assert missing[0] == ""
    assert missing[1].splitlines()[-1].startswith("shardckpt: there is no checkpoint at none")
    assert missing[2] == 3


def test_without_typer_it_says_what_to_install(monkeypatch, capsys):
    """Who installed the library alone and calls the program is told how to get it, not shown a traceback."""
    from shardckpt import cli

    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "shardckpt.cli.app")
    with pytest.raises(SystemExit, match=r"pip install 'shardckpt\[cli\]'"):
        cli.main()


def test_a_mistake_of_ours_is_not_an_answer(monkeypatch, capsys):
    """`diff` says "different" with 1, which is what Python exits with after a traceback."""
    from shardckpt import cli, tools

    monkeypatch.setattr(tools, "diff", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["shardckpt", "diff", "a", "b"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 70
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_output_that_cannot_be_written(monkeypatch):
    """A reader that has gone is no answer of `diff`, and a closed or full output is said, without a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(typer.Exit) as ended:
            screen.show("x")
        assert ended.value.exit_code == codes.ExitCode.CLOSED
    full = open("/dev/full", "w")  # noqa: SIM115 - closing it fails
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(errors.StorageError, match="cannot print: .*No space left"):
        screen.show("x" * 100_000)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(errors.StorageError, match="cannot print"):
        screen.show_json(1)
    with suppress(OSError):
        full.close()


def test_names_do_nothing_to_a_terminal(tmp_path):
    """A checkpoint is anybody's: escapes in its names are shown, not obeyed, and a row stays a line."""
    name = "a\x1b]0;gotcha\x07\nb"
    shardckpt.save({name: torch.ones(2), f"{name}v": f"{name}!"}, tmp_path / "ck")
    for command in ("inspect", "stats"):
        text = run(command, tmp_path / "ck")
        assert "\x1b" not in text
        assert r"a\x1b]0;gotcha\x07\nb" in text
    shardckpt.save({name: torch.zeros(2)}, tmp_path / "other")
    assert "\x1b" not in run("diff", tmp_path / "ck", tmp_path / "other", code=1)


def test_json_of_names_that_are_no_text(tmp_path):
    """File names may be any bytes; JSON takes only text."""
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff")
    shardckpt.save({"x": torch.ones(2)}, os.path.join(odd, "ck"))
    (found,) = as_json("ls", odd)
    assert found["status"] == "complete"
    assert "odd\ufffd" in found["path"]
