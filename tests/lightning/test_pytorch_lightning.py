"""The other name of the framework, ``pytorch_lightning``: the same things work, in a process of either or both."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ddp_job
import pytest
import toy

pytest.importorskip("pytorch_lightning")


@pytest.fixture(scope="module")
def pl() -> Any:
    return toy.package("pytorch_lightning")


@pytest.fixture(scope="module")
def Toy(pl: Any) -> Any:  # noqa: N802 - it is a class
    return toy.module_class(pl)


def test_fit_resume_and_inference(tmp_path: Path, pl: Any, Toy: Any) -> None:
    """One process that has imported both flavours binds, saves, resumes and loads with this one."""
    record, again = toy.recorder(pl), toy.recorder(pl)
    options = {"filename": "{epoch}", "save_last": True, "save_top_k": -1}
    first = toy.trainer(pl, tmp_path, checkpoint=options, callbacks=[record], max_epochs=1)
    first.fit(Toy(width=12), toy.loader(), toy.loader(32))
    assert type(first.strategy).__name__ == "ShardedSingleDeviceStrategy"
    assert isinstance(first.strategy, pl.strategies.SingleDeviceStrategy)
    assert toy.shards(tmp_path / "last.ckpt")[0].samefile(toy.shards(tmp_path / "epoch=0.ckpt")[0])
    second = toy.trainer(pl, tmp_path, checkpoint=options, callbacks=[again], max_epochs=2)
    second.fit(Toy(width=12), toy.loader(), toy.loader(32), ckpt_path="last")
    assert again.start == record.end
    model = Toy.load_from_checkpoint(tmp_path / "last.ckpt")
    assert {f"model.{n}": toy.digest(v) for n, v in model.state_dict().items()}.items() <= again.end.items()


def test_checkpoints_pass_between_the_flavours(tmp_path: Path, pl: Any, Toy: Any, lightning: Any) -> None:
    """What one flavour saved resumes under the other: they are one framework."""
    toy.trainer(pl, tmp_path, checkpoint={"filename": "a"}, max_epochs=1).fit(Toy(), toy.loader())
    other = toy.module_class(lightning)
    run = toy.trainer(lightning, tmp_path, max_epochs=2)
    run.fit(other(), toy.loader(), ckpt_path=tmp_path / "a.ckpt")
    assert run.global_step == 24


@pytest.mark.multiprocess
@pytest.mark.timeout(150)
def test_two_processes(tmp_path: Path) -> None:
    """Under DDP every rank writes its part, and a run resumed at an epoch boundary equals an uninterrupted one."""
    outcomes = ddp_job.run(2, "pytorch_lightning", tmp_path, ["even_parts", "uninterrupted"])
    assert all(len(sizes) == 2 for sizes, _ in outcomes.of("even_parts"))
    first, _ = outcomes.of("uninterrupted")
    assert first["second"] == first["whole"]
    assert first["links"] == [2, 2]


@pytest.mark.parametrize(
    ("used", "spared"), [("pytorch_lightning", "lightning.pytorch"), ("lightning.pytorch", "pytorch_lightning")]
)
def test_one_flavour_does_not_bring_the_other(used: str, spared: str, tmp_path: Path) -> None:
    """A program of one flavour does not pay for importing the other, which merely happens to be installed."""
    pytest.importorskip("lightning")
    program = (
        f"import sys, {used} as L\n"
        "from shardckpt.lightning import ShardedCheckpointIO\n"
        f"options = dict(accelerator='cpu', logger=False, default_root_dir={str(tmp_path)!r})\n"
        "run = L.Trainer(plugins=[ShardedCheckpointIO()], **options)\n"
        "assert 'ShardedCheckpointBinding' in [type(c).__name__ for c in run.callbacks]\n"
        f"assert {spared!r} not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60, env=os.environ)
