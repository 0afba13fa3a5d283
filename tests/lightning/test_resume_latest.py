"""A run that is to go on from a checkpoint which was never completed: it says so, or takes the newest complete one."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import toy

from shardckpt import CheckpointNotFoundError, UsageError
from shardckpt.lightning import ShardedCheckpointIO

OPTIONS = {"filename": "{epoch}", "save_top_k": -1, "save_last": True}


@pytest.fixture
def cut_short(tmp_path: Path, lightning: Any, Toy: Any) -> Path:
    """A folder with epoch=0.ckpt and epoch=1.ckpt, and with a last.ckpt whose save did not get to its end."""
    toy.trainer(lightning, tmp_path, checkpoint=OPTIONS).fit(Toy(), toy.loader())
    (tmp_path / "last.ckpt" / "manifest.json").unlink()
    return tmp_path


def latest(**options: Any) -> dict[str, Any]:
    return {"plugins": [ShardedCheckpointIO(resume="latest", timeout=30, commit_timeout=60, **options)]}


@pytest.mark.parametrize("ckpt_path", ["last", "{}/last.ckpt", "{}/last.ckpt/manifest.json"])
def test_the_error_names_the_newest_complete_one(ckpt_path: str, cut_short: Path, lightning: Any, Toy: Any) -> None:
    """Nobody goes on from another checkpoint unawares, nor from scratch: the error says what there is instead."""
    run = toy.trainer(lightning, cut_short, checkpoint=OPTIONS, max_epochs=3)
    with pytest.raises(CheckpointNotFoundError, match=r'cut short.*epoch=1\.ckpt\. Resume from that.*resume="latest"'):
        run.fit(Toy(), toy.loader(), ckpt_path=ckpt_path.format(cut_short))
    assert run.global_step == 0


@pytest.mark.parametrize("ckpt_path", ["last", "{}/last.ckpt", "{}/last.ckpt/manifest.json"])
def test_latest_takes_it_loudly(ckpt_path: str, cut_short: Path, lightning: Any, Toy: Any, caplog: Any) -> None:
    """With ``resume="latest"`` the run goes on from the newest complete one, and the log says from which and why."""
    record = toy.recorder(lightning)
    run = toy.trainer(lightning, cut_short, checkpoint=OPTIONS, max_epochs=3, callbacks=[record], **latest())
    run.fit(Toy(), toy.loader(), ckpt_path=ckpt_path.format(cut_short))
    assert record.position == (2, 24)
    assert any(
        "last.ckpt is not complete" in one.message and "epoch=1.ckpt" in one.message and one.levelname == "WARNING"
        for one in caplog.records
    )


def test_the_newest_is_not_the_last_by_name(cut_short: Path, lightning: Any, Toy: Any) -> None:
    """The newest is that which was saved last, whatever the names and the dates of the files say."""
    (cut_short / "epoch=0.ckpt").rename(cut_short / "z.ckpt")
    (cut_short / "epoch=1.ckpt").rename(cut_short / "a.ckpt")
    (cut_short / "z.ckpt" / "manifest.json").touch()
    record = toy.recorder(lightning)
    run = toy.trainer(lightning, cut_short, checkpoint=OPTIONS, max_epochs=3, callbacks=[record], **latest())
    run.fit(Toy(), toy.loader(), ckpt_path="last")
    assert record.position == (2, 24)


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_last_that_is_complete_is_the_last(
    resume: Any, cut_short: Path, lightning: Any, Toy: Any, caplog: Any
) -> None:
    """What a dead run left unfinished does not keep a later one's ``last-v1.ckpt`` from being found."""
    (cut_short / "epoch=1.ckpt").rename(cut_short / "last-v1.ckpt")
    record = toy.recorder(lightning)
    plugins = [ShardedCheckpointIO(resume=resume)]
    run = toy.trainer(lightning, cut_short, checkpoint=OPTIONS, max_epochs=3, callbacks=[record], plugins=plugins)
    run.fit(Toy(), toy.loader(), ckpt_path="last")
    assert record.position == (2, 24)
    assert "last.ckpt is not complete" in caplog.text


@pytest.mark.parametrize("resume", [None, "latest"])
def test_with_nothing_complete_last_is_from_scratch_and_a_path_an_error(
    resume: Any, tmp_path: Path, lightning: Any, Toy: Any, caplog: Any
) -> None:
    """A job that died in its first save starts again as it began; a path that somebody wrote down has to be right."""
    toy.trainer(lightning, tmp_path, checkpoint={"save_last": True, "save_top_k": 0}).fit(Toy(), toy.loader())
    (tmp_path / "last.ckpt" / "manifest.json").unlink()
    plugins = [ShardedCheckpointIO(resume=resume)]
    run = toy.trainer(lightning, tmp_path, checkpoint=OPTIONS, plugins=plugins)
    with pytest.raises(CheckpointNotFoundError, match="cut short"):
        run.fit(Toy(), toy.loader(), ckpt_path=tmp_path / "last.ckpt")
    record = toy.recorder(lightning)
    run = toy.trainer(lightning, tmp_path, checkpoint=OPTIONS, plugins=plugins, callbacks=[record])
    run.fit(Toy(), toy.loader(), ckpt_path="last")
    assert record.position == (0, 0)
    assert "no complete checkpoint lies beside it" in caplog.text


def test_latest_is_no_licence_for_other_mistakes(cut_short: Path, lightning: Any, Toy: Any) -> None:
    """A path where nothing is at all is a mistake, not a crash: it stays an error."""
    run = toy.trainer(lightning, cut_short, max_epochs=3, **latest())
    with pytest.raises(FileNotFoundError):
        run.fit(Toy(), toy.loader(), ckpt_path=cut_short / "lost.ckpt")


def test_the_option_is_checked_and_survives_a_pickle() -> None:
    """Spawned processes get the plugin pickled, and a typo is known before the run begins."""
    with pytest.raises(UsageError, match="resume is 'latest' or None, not 'newest'"):
        ShardedCheckpointIO(resume="newest")  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(ShardedCheckpointIO(resume="latest"))).places.resume == "latest"
