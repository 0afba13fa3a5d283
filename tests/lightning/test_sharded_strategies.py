"""FSDP and ModelParallel: every rank saves its shards, and any strategy resumes what any other one saved."""

from pathlib import Path
from typing import Any

import ddp_job
import pytest
import toy

from lowest import CANNOT
from s3_server import S3Server

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(CANNOT), reason="one job has all strategies, FSDP2 among them"),
]

WRITERS = ("ddp", "fsdp2", "tp", "fsdp1", "fsdp1-flat", "fsdp1-mesh", "fsdp1-whole")
"""FSDP2, tensor parallel, and FSDP1: with the parameters of the module, flat ones, DTensors, and not sharded at all."""
SHARDING = ("fsdp2", "fsdp1")
CASES = ("continued", "stock", "evaluated", "mismatched", "by_hand", "objects", "unreadable", "failing", "exception")


def job(
    size: int, folder: Path, cases: list[str], *, flavour: str = "lightning.pytorch", **options: Any
) -> ddp_job.Outcomes:
    return ddp_job.run(size, flavour, folder, cases, worker="sharded_worker.py", seconds=200, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def worker(lightning: Any) -> Any:
    """The script that ranks run, as a module of this process, which is a world of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        import sharded_worker
    sharded_worker.L = lightning
    return sharded_worker


@pytest.fixture(scope="module")
def single(folder: Path, worker: Any) -> dict[str, str]:
    """What a single device wrote, before the others come to resume it."""
    worker.FOLDER = folder
    return worker.fit("single", folder / "written", checkpoint={"filename": "single"}, max_epochs=1).record.end


@pytest.fixture(scope="module")
def two(folder: Path, single: dict[str, str], s3_server: S3Server, s3_client: Any) -> ddp_job.Outcomes:
    """All cases on two processes."""
    s3_client.create_bucket(Bucket="lightning-sharded")
    environment = s3_server.environment | {"TEST_S3_URL": "s3://lightning-sharded/run"}
    cases = [f"write:{kind}" for kind in WRITERS] + [f"resume:{kind}" for kind in WRITERS]
    cases += [f"{case}:{kind}" for case in CASES for kind in SHARDING]
    cases += [f"compiled:{kind}" for kind in ("ddp", "fsdp2", "tp")] + ["averaged:ddp"]
    cases += ["stock:tp", "ordinary:fsdp2", "ordinary:fsdp1", "hostile:fsdp2"]
    cases += ["marked:fsdp2", "replaced:fsdp2", "on_s3:fsdp2", "on_s3:fsdp1"]
    cases += [f"touched:{kind}" for kind in ("fsdp2", "tp", "fsdp1", "fsdp1-flat")]
    return job(2, folder, cases, environment=environment)


@pytest.mark.parametrize("target", WRITERS)
def test_strategies_resume_each_other(target: str, two: ddp_job.Outcomes, single: dict[str, str]) -> None:
    """Model, Adam state, steps, groups and schedulers of every strategy come back under every other, bit for bit."""
    resumed = two.of(f"resume:{target}")
    assert resumed[0].keys() == {*WRITERS, "single"}
    for source, (start, position, epoch) in resumed[0].items():
        written = single if source == "single" else two.of(f"write:{source}")[0][0]
        assert start == written, source
        assert position == [1, 12 if source in ("single", "tp") else 6]
        assert epoch == 2
    assert two.of(f"write:{target}")[0][1].startswith("Sharded")


@pytest.mark.parametrize("source", WRITERS)
def test_many_become_one(source: str, folder: Path, two: ddp_job.Outcomes, worker: Any, tmp_path: Path) -> None:
    """A single device resumes what several ranks wrote under any strategy, and loads it for inference."""
    written = two.of(f"write:{source}")[0][0]
    path = folder / "written" / f"{source}.ckpt"
    assert len(toy.shards(path)) == 2
    assert worker.fit("single", tmp_path, ckpt_path=path, max_epochs=2).record.start == written
    model = worker.module_class().load_from_checkpoint(path)
    assert {f"model.{n}": toy.digest(v) for n, v in model.state_dict().items()}.items() <= written.items()


@pytest.mark.parametrize("kind", SHARDING)
def test_resumed_equals_uninterrupted(kind: str, two: ddp_job.Outcomes) -> None:
    """A run resumed at its last checkpoint ends with the bits of an uninterrupted one, and ``last`` costs no write."""
    for answer in two.of(f"continued:{kind}"):
        assert answer["same"]
        assert answer["links"] == [2, 2]
        assert all(entries > 8 for entries in answer["shards"])  # of 12 tensors each rank has a part
        assert answer["kept"] == ["epoch=1.ckpt", "last.ckpt"]
        assert answer["said"] == []  # or the warm-up did not work


@pytest.mark.parametrize("kind", ["fsdp2", "tp", "fsdp1", "fsdp1-flat"])
def test_hooks_see_whole_tensors(kind: str, two: ddp_job.Outcomes) -> None:
    """What a hook has looked at, on all ranks or on one, is cut to this rank's part, to the same bits."""
    assert two.of(f"touched:{kind}")[0] == [two.of(f"write:{kind}")[0][0]] * 2


def test_hooks_may_replace_what_is_saved(two: ddp_job.Outcomes) -> None:
    """Sharded tensors that a hook or a callback puts into a checkpoint are saved by every rank's part."""
    assert two.of("replaced:fsdp2") == [[True, True]] * 2


def test_what_callbacks_mark_differs_by_rank(two: ddp_job.Outcomes) -> None:
    """Under a sharding strategy too every rank's marked value is saved, and nobody gets rank 0's for its own."""
    assert two.of("marked:fsdp2") == [[[[0.0, 0.0], 0], [[1.0, 1.0], 1]]] * 2


@pytest.mark.parametrize(("kind", "is_folder"), [("fsdp2", True), ("fsdp1", True), ("tp", False)])
def test_what_lightning_wrote(kind: str, is_folder: bool, two: ddp_job.Outcomes) -> None:
    """Files and folders that the strategies wrote without the plugin load with it, to the same bits."""
    for same, was_folder, position, strategy in two.of(f"stock:{kind}"):
        assert same
        assert was_folder == is_folder
        assert position == [1, 12 if kind == "tp" else 6]
        assert strategy.startswith("Sharded")


@pytest.mark.parametrize("kind", SHARDING)
def test_state_of_a_file_finds_its_parameter(kind: str, two: ddp_job.Outcomes) -> None:
    """An ordinary file's optimizer state goes by the order of the groups, where Lightning goes by the module's.

    None of it stays in the pages of that file, which may be removed while training goes on.
    """
    assert two.of(f"ordinary:{kind}") == [[True, [1, 6], 0]] * 2


def test_a_directory_runs_no_code(two: ddp_job.Outcomes) -> None:
    """ModelParallel's own directories are read by our reader, which unpickles nothing without leave."""
    for ran, message in two.of("hostile:fsdp2"):
        assert not ran
        assert ".metadata" in message


@pytest.mark.parametrize("kind", SHARDING)
def test_evaluation_and_saves_by_hand(kind: str, two: ddp_job.Outcomes) -> None:
    """A save after training is committed on return, and ``validate`` and ``test`` take its weights."""
    assert two.of(f"evaluated:{kind}") == [[True, [True, True]]] * 2


@pytest.mark.parametrize("kind", SHARDING)
def test_a_model_that_does_not_fit(kind: str, two: ddp_job.Outcomes) -> None:
    """All ranks refuse it and name what differs; ``strict_loading=False`` takes the rest."""
    written = two.of(f"write:{kind}")[0][0]
    for (shapes, missing), _ in two.of(f"mismatched:{kind}"):
        assert "state_dict.net.0.weight: shape (20, 16) here, (26, 16) in the checkpoint" in shapes
        assert "missing from the checkpoint: state_dict.more.weight" in missing
    taken = two.of(f"mismatched:{kind}")[0][1]
    common = {name for name in taken if name in written}
    assert {name: taken[name] for name in common} == {name: written[name] for name in common}
    assert taken.keys() - common == {"model.more.weight", "model.more.bias"}


@pytest.mark.parametrize("kind", SHARDING)
def test_manual_optimization(kind: str, two: ddp_job.Outcomes) -> None:
    """Several optimizers, each of a part of the model, come back."""
    same, entries, position = two.of(f"by_hand:{kind}")[0]
    assert same
    assert entries == 5 + 2 + 6 + 2  # the model's, momenta, AdamW's state, and a param group each
    assert position == [1, 9]


@pytest.mark.parametrize("kind", SHARDING)
def test_weights_only_arrives(kind: str, two: ddp_job.Outcomes) -> None:
    """Objects are refused unless ``fit(weights_only=False)`` allows them, of which Lightning does not tell these."""
    assert all("weights_only" in message for message in two.of(f"objects:{kind}"))


@pytest.mark.parametrize("kind", SHARDING)
def test_one_rank_fails(kind: str, two: ddp_job.Outcomes) -> None:
    """What one rank cannot write or read is an error of all, though the others may be headed for a collective."""
    assert all("the disk of this node is gone" in message for message in two.of(f"unreadable:{kind}"))
    for message, complete in two.of(f"failing:{kind}"):
        assert "no room on this node" in message
        assert complete == ["epoch=0.ckpt"]


@pytest.mark.parametrize("kind", SHARDING)
def test_a_checkpoint_of_a_crash(kind: str, two: ddp_job.Outcomes) -> None:
    """``OnExceptionCheckpoint`` leaves a checkpoint that resumes in mid-epoch."""
    assert two.of(f"exception:{kind}") == [[0, 2]] * 2


@pytest.mark.s3
@pytest.mark.parametrize("kind", SHARDING)
def test_a_bucket_as_folder(kind: str, two: ddp_job.Outcomes) -> None:
    """S3, which these strategies themselves cannot write to."""
    same, position, path = two.of(f"on_s3:{kind}")[0]
    assert same
    assert position == [1, 6]
    assert path.startswith(f"s3://lightning-sharded/run/{kind}/last.ckpt")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp"])
def test_a_compiled_model_is_the_plain_one(kind: str, two: ddp_job.Outcomes) -> None:
    """``torch.compile`` leaves no trace in a checkpoint: the plain model and the compiled one resume it alike."""
    assert two.of(f"compiled:{kind}")[0] == [True, True, True]


def test_a_moving_average_comes_back(two: ddp_job.Outcomes) -> None:
    """Of a callback that saves averages in the place of the weights, both come back; and they differ."""
    assert two.of("averaged:ddp") == [[True, True, False]] * 2


def test_a_mesh_of_two_dimensions(folder: Path, two: ddp_job.Outcomes, worker: Any, tmp_path: Path) -> None:
    """FSDP2 over tensor parallel on four processes resumes what each of the two wrote, and one process resumes it."""
    cases = ["write:2d", "resume:2d:fsdp2", "resume:2d:tp", "touched:2d"]
    four = job(4, folder, cases)
    for source in ("fsdp2", "tp"):
        ((start, _, _),) = four.of(f"resume:2d:{source}")[0].values()
        assert start == two.of(f"write:{source}")[0][0]
    written = four.of("write:2d")[0][0]
    path = folder / "written" / "2d.ckpt"
    assert len(toy.shards(path)) == 4
    assert four.of("touched:2d")[0] == [written] * 2
    assert worker.fit("single", tmp_path, ckpt_path=path, max_epochs=2).record.start == written


def test_two_become_three(folder: Path, two: ddp_job.Outcomes) -> None:
    """Three processes resume what two wrote, under another strategy, and of ``pytorch_lightning``, which binds too."""
    pytest.importorskip("pytorch_lightning")
    cases = ["resume:fsdp1:fsdp2", "resume:fsdp2:fsdp1", "resume:fsdp2:tp"]
    outcomes = job(3, folder, cases, flavour="pytorch_lightning")
    for case in cases:
        ((source, (start, _, epoch)),) = outcomes.of(case)[0].items()
        assert start == two.of(f"write:{source}")[0][0], case
        assert epoch == 2
