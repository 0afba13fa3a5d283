"""DDP with real processes: every rank writes its part, any number of processes resumes, and all hear one verdict."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ddp_job
import pytest
import toy

from s3_server import S3Server

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(240)]

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def two(folder: Path, s3_server: S3Server, s3_client: Any) -> ddp_job.Outcomes:
    """All cases on two processes."""
    pytest.importorskip("lightning")
    s3_client.create_bucket(Bucket="lightning-ddp")
    cases = ["even_parts", "uninterrupted", "write", "other_names", "rank_zeros_word", "evaluate", "missing", "on_s3"]
    cases += ["marked_by_rank"]
    cases += ["zero_redundancy", "failing_rank", "failing_at_the_end", "unbound"]
    cases += ["going_on", "taking_the_latest", "terminated"]
    cases += ["touched_on_one_rank", "options_of_a_call", "failing_wait", "alone"]
    environment = s3_server.environment | {"TEST_S3_URL": "s3://lightning-ddp/run"}
    return ddp_job.run(2, "lightning.pytorch", folder, cases, environment=environment, seconds=180)


@pytest.fixture(scope="module")
def three(folder: Path, two: ddp_job.Outcomes) -> ddp_job.Outcomes:
    """What two processes wrote, on three."""
    two.of("write")
    return ddp_job.run(3, "lightning.pytorch", folder, ["resume", "write"])


def test_every_rank_writes_an_even_part(two: ddp_job.Outcomes) -> None:
    """The work is shared to within a megabyte, and a large tensor is divided between the ranks."""
    for sizes, divided in two.of("even_parts"):
        assert len(sizes) == 2
        assert max(sizes) - min(sizes) <= 2 * MIB
        assert divided


def test_resumed_equals_uninterrupted(two: ddp_job.Outcomes) -> None:
    """A run of two processes resumed at an epoch boundary ends with the bits of an uninterrupted one, on each rank."""
    for answer in two.of("uninterrupted"):
        assert answer["position"] == [1, 6]
        ours = {name for name in answer["first"] if "running" not in name}
        assert {name: answer["start"][name] for name in ours} == {name: answer["first"][name] for name in ours}
    first, second = two.of("uninterrupted")
    assert first["second"] == first["whole"] != first["first"]
    trained = {name for name in second["whole"] if "running" not in name}
    assert {name: second["second"][name] for name in trained} == {name: second["whole"][name] for name in trained}


def test_last_costs_no_second_write(two: ddp_job.Outcomes) -> None:
    """The shards of ``last.ckpt`` are those of the checkpoint of the same step, on every rank."""
    assert two.of("uninterrupted")[0]["links"] == [2, 2]


def test_two_become_three(two: ddp_job.Outcomes, three: ddp_job.Outcomes) -> None:
    """Three processes resume what two wrote, with the same bits in model, optimizer and scheduler."""
    written = two.of("write")[0]
    for start, position, epoch in three.of("resume"):
        assert start == written
        assert position == [1, 6]
        assert epoch == 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_become_one(
    world_size: int, folder: Path, two: ddp_job.Outcomes, three: ddp_job.Outcomes, lightning: Any, Toy: Any
) -> None:
    """A single process resumes what several wrote, and loads it for inference."""
    written = (two if world_size == 2 else three).of("write")[0]
    path = folder / "written" / f"by-{world_size}.ckpt"
    assert len(toy.shards(path)) == world_size
    record = toy.recorder(lightning)
    run = toy.trainer(lightning, folder / "single", callbacks=[record], max_epochs=2)
    run.fit(Toy(), toy.loader(), toy.loader(32), ckpt_path=path)
    assert record.start == written
    model = Toy.load_from_checkpoint(path)
    assert {f"model.{n}": toy.digest(v) for n, v in model.state_dict().items()}.items() <= written.items()


def test_rank_zero_names_the_path(two: ddp_job.Outcomes) -> None:
    """Ranks that would call the checkpoint otherwise, by their own metrics, save to rank 0's path."""
    for complete, all_there in two.of("other_names"):
        assert complete == all_there == ["mine=0.00.ckpt"] or complete == all_there == ["mine=0.0.ckpt"]


def test_what_differs_by_rank_is_rank_zeros(two: ddp_job.Outcomes) -> None:
    """A callback's tensors of another shape on each rank are no conflict, and buffers are not mixed."""
    for mine, rank, extra, saved_mean, _ in two.of("rank_zeros_word"):
        assert (mine, rank, extra) == ([0.0], 0, [])
        assert saved_mean == two.of("rank_zeros_word")[0][-1]


def test_what_hooks_mark_is_every_ranks(two: ddp_job.Outcomes) -> None:
    """A callback's and a module's values by rank are all in the checkpoint, and the hooks that load see them all."""
    for answer in two.of("marked_by_rank"):
        assert answer["own"] == [[[0.0, 0.0], []], [[1.0, 1.0, 1.0], [1]]]
        assert answer["rank"] == 0
        assert answer["deep"] == [["0", "1"]]
        assert answer["module"] == [[10, 11], {"of 1": [None, "here"]}]
        assert answer["links"] == [2, 2]
        assert answer["tensors"] == [True, True]


def test_an_optimizer_that_shards_itself(two: ddp_job.Outcomes) -> None:
    """``ZeroRedundancyOptimizer``, whose whole state only rank 0 has, resumes to the same bits as with stock files."""
    for ours, stock in two.of("zero_redundancy"):
        assert ours == stock


def test_evaluation_on_many_ranks(two: ddp_job.Outcomes) -> None:
    """Every rank validates with the weights of the checkpoint."""
    written = two.of("write")[0]
    for weights in two.of("evaluate"):
        assert weights.items() <= written.items()


def test_errors_of_loading_are_everyones(two: ddp_job.Outcomes) -> None:
    """No rank goes on alone when the checkpoint is missing or does not fit."""
    assert two.of("missing") == [["CheckpointNotFoundError", "StateMismatchError"]] * 2


def test_a_failing_rank_is_everyones_error(two: ddp_job.Outcomes) -> None:
    """One rank's full disk is raised on every rank at the next save, by name; the last good checkpoint is kept."""
    for message, complete in two.of("failing_rank"):
        assert "epoch=1.ckpt" in message
        assert "no room on this node" in message
        assert complete == ["epoch=0.ckpt"]
    assert "rank 1" in two.of("failing_rank")[0][0]
    assert all("no room on this node" in message for message in two.of("failing_at_the_end"))


def test_a_failing_rank_need_not_end_the_run(two: ddp_job.Outcomes) -> None:
    """With ``on_save_error="warn"`` all ranks count the failure, and the last good one stays until there is another."""
    there = [["epoch=0.ckpt"], ["epoch=0.ckpt"], ["epoch=2.ckpt"]]
    assert two.of("going_on") == [[there, 1, ["epoch=3.ckpt"]]] * 2


def test_every_rank_goes_on_from_the_same_newest_one(two: ddp_job.Outcomes) -> None:
    """A ``last.ckpt`` that was cut short is every rank's error, or every rank goes on from the newest complete one."""
    assert two.of("taking_the_latest") == [[True] * 4] * 2


def test_preemption_waits_for_the_save_in_flight(two: ddp_job.Outcomes) -> None:
    """SIGTERM on all ranks: each ends as Lightning has it, after the checkpoint that was in flight is complete."""
    assert two.of("terminated") == [["SIGTERMException", ["a.ckpt"], files] for files in (5, 1)]


def test_a_hook_on_one_rank_does_not_part_the_ranks(two: ddp_job.Outcomes) -> None:
    """What a ``rank_zero_only`` hook looked at is loaded by all ranks in one way, and to the same bits."""
    assert two.of("touched_on_one_rank") == [two.of("write")[0]] * 2


def test_every_rank_knows_the_options_of_a_call(two: ddp_job.Outcomes) -> None:
    """A checkpoint saved with storage options of its own is found again by whichever rank looks for it."""
    assert two.of("options_of_a_call") == [{"auto_mkdir": True}] * 2


def test_a_failure_that_one_rank_is_told_of_is_everyones(two: ddp_job.Outcomes) -> None:
    """A failed save that surfaces on one rank as a load begins ends the load on all, in bounded time."""
    assert all(message.startswith("SaveFailedError") for message in two.of("failing_wait"))
    assert all("the one before" in message for message in two.of("failing_wait"))


@pytest.mark.s3
def test_a_bucket_as_folder(two: ddp_job.Outcomes) -> None:
    """Two processes save to S3 and resume ``"last"`` from there, where stock Lightning starts from scratch."""
    (first, start, position, path), *_ = two.of("on_s3")
    assert start == first
    assert position == [2, 12]
    assert path.startswith("s3://lightning-ddp/run/last.ckpt")


def test_unbound_says_what_to_do(two: ddp_job.Outcomes) -> None:
    """Without the binding the plugin still works, from one rank, and the log names the remedy."""
    (shards, warned, same, strategy), (_, other, same_there, _) = two.of("unbound")
    assert (shards, strategy, same, same_there) == (1, "DDPStrategy", True, True)
    assert len([line for line in warned if "ShardedDDPStrategy" in line]) == 1
    assert other == []


def test_a_lone_rank_does_not_hang(two: ddp_job.Outcomes) -> None:
    """A checkpoint that one rank alone saves is an error in bounded time that names who did not come."""
    message, seconds = two.of("alone")[0]
    assert message.startswith("RankTimeoutError")
    assert "rank 1" in message
    assert seconds < 20


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_processes_that_the_trainer_starts(strategy: str, tmp_path: Path) -> None:
    """Spawned and forked ranks write their parts, and the weights come back to the process that started them."""
    program = [sys.executable, str(Path(__file__).with_name("spawn_job.py")), strategy, str(tmp_path)]
    ran = subprocess.run(program, timeout=90, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {"shards": [2, 2], "same": True, "best": str(tmp_path / "a.ckpt")}
    assert "not bound" not in ran.stderr
