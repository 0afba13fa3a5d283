"""What the documentation shows is run, so that it stays true."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ranks
import shardckpt
from multirank import docs_cases
from pages import DOCS, blocks, run_python

SOURCE = Path(shardckpt.__file__).parent

ACTIONS = {
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "complete_multipart_upload": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "delete_object": "s3:DeleteObject",
    "delete_objects": "s3:DeleteObject",
    "head_object": "s3:GetObject",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "list_objects_v2": "s3:ListBucket",
    "put_object": "s3:PutObject",
    "upload_part": "s3:PutObject",
}
"""What IAM calls the permission for each request of S3."""

_VARYING = {
    r"\d{4}-\d\d-\d\dT[\d:.+]+": "<time>",
    r"\b0[0-9a-z]{14}\b": "<save id>",
    r"in \d+\.\d+ s": "in <seconds>",
    r"\b[\d.]+ (?:B|KiB)(?![A-Za-z])": "<size>",
    r"\d+ s\b": "<age>",
    r"(torch|python) [\d.]+\S*?(,|$)": r"\1 <version>\2",
    r"[ ]+": " ",
}
"""What is different each time, and what stands for it; alignment follows from that."""


ALONE = ("async.md", "converting.md", "manager.md", "moving.md", "partial.md")
BY_RANKS = ("layouts.md", "per_rank.md")
ELSEWHERE = {"cli.md", "s3.md", "quickstart.md", "lightning.md", "README.md"}
"""Run by tests of their own: below, and for Lightning in ``tests/lightning/test_docs.py``."""


def test_every_page_with_python_is_run():
    """An example that no test runs is wrong before long, and readers paste it."""
    pages = {path.name for path in (*DOCS.glob("*.md"), DOCS.parent / "README.md") if blocks(path.name, "python")}
    assert pages == {*ALONE, *BY_RANKS, *ELSEWHERE}


@pytest.mark.parametrize("page", ALONE)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """A reader may paste the blocks of a page one after the other; ``path`` is theirs to choose."""
    monkeypatch.chdir(tmp_path)
    run_python(page, {"path": str(tmp_path / "ck"), "__name__": page})


@pytest.mark.multiprocess
@pytest.mark.parametrize("page", BY_RANKS)
def test_the_examples_for_ranks_run(page, tmp_path):
    """The same on two ranks, with the names that the page speaks of."""
    ranks.world(2).run(docs_cases.run_page, page, str(tmp_path / "ck"))


@pytest.mark.multiprocess
def test_the_loop_of_the_quick_start_resumes(tmp_path):
    """What is pasted into a training script saves, and goes on from there when it is started again."""
    for _ in range(2):
        assert ranks.world(2).run(docs_cases.quick_start, str(tmp_path)) == [20, 20]


@pytest.mark.s3
def test_the_quick_start_for_s3_runs(s3_place):
    """Its options are those that the server takes, but for the secrets."""
    options = s3_place.storage_options
    s3_place.client.create_bucket(Bucket="bucket")
    (block,) = [block for block in blocks("quickstart.md", "python") if "storage_options" in block]
    block = block.replace("http://127.0.0.1:9000", options["client_kwargs"]["endpoint_url"])
    for name in ("key", "secret"):
        block = block.replace(f'"{name}": "..."', f'"{name}": {options[name]!r}')
    names = {"model": torch.nn.Linear(2, 2)}
    exec(compile(block, "quickstart.md", "exec"), names)
    assert names["state"]["step"] == 1000


def test_the_site_builds(tmp_path):
    """A link that leads nowhere, or a docstring that cannot be shown, is an error before readers meet it."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=DOCS.parent, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "Restore" in api
    assert all(f"shardckpt.{name}" in api for name in ("save", "Checkpointer", "tools.convert", "errors.StorageError"))


@pytest.mark.s3
def test_the_examples_for_s3_run(s3_place):
    """The page's Python runs against a server, which takes its lifecycle rule; its policy allows all that is asked."""
    s3_place.client.create_bucket(Bucket="my-bucket")
    endpoint = s3_place.storage_options["client_kwargs"]["endpoint_url"]
    run_python("s3.md", {"__name__": "s3.md"}, **{"https://minio.example:9000": endpoint})
    policy, rules = map(json.loads, blocks("s3.md", "json"))
    s3_place.client.put_bucket_lifecycle_configuration(Bucket="my-bucket", LifecycleConfiguration=rules)
    (rule,) = s3_place.client.get_bucket_lifecycle_configuration(Bucket="my-bucket")["Rules"]
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    allowed = {action for statement in policy["Statement"] for action in statement["Action"]}
    text = "".join(path.read_text(encoding="utf-8") for path in (SOURCE / "storage").glob("s3*.py"))
    asked = set(re.findall(r'request(?:, |\()"([a-z_]+)"', text))
    assert len(asked) >= 9
    assert {ACTIONS[method] for method in asked} <= allowed


def steady(text: str) -> list[str]:
    """Lines without what is different each time."""
    for pattern, instead in _VARYING.items():
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    return [line.strip() for line in text.strip().splitlines()]


def test_the_command_line_prints_what_its_page_shows(tmp_path, monkeypatch):
    """Every command of the page ends as it says there, and prints that, but for times, ids, sizes and versions."""
    testing = pytest.importorskip("typer.testing")
    from shardckpt.cli.app import app

    monkeypatch.chdir(tmp_path)
    run_python("cli.md", {"__name__": "cli.md"})
    shutil.copytree("runs/step=1000.ckpt", "damaged/step=1000.ckpt")
    (shard,) = Path("damaged/step=1000.ckpt").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[4096] ^= 1
    shard.write_bytes(data[:-2])
    sessions = [part for block in blocks("cli.md", "console") for part in re.split(r"^\$ ", block, flags=re.MULTILINE)]
    asked = [session.partition("\n") for session in sessions if session]
    assert {command.split()[1] for command, _, _ in asked} == {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    for command, _, expected in asked:
        program, *arguments = shlex.split(command)
        assert program == "shardckpt"
        done = testing.CliRunner().invoke(app, arguments)
        printed = done.output + (f"[exit code {done.exit_code}]" if done.exit_code else "")
        assert steady(printed) == steady(expected), command


def test_the_page_of_the_command_line_has_every_exit_code():
    """A script is written by that table."""
    codes = pytest.importorskip("shardckpt.cli.codes")
    shown = re.findall(r"^\| (\d+) \|", (DOCS / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [*map(int, shown)] == [*codes.ExitCode, 70, 130]
