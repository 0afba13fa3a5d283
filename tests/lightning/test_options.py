"""A file system that lets nobody in without an option of the plugin's: a fresh process has it from nowhere else."""

from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import toy
from fsspec.implementations.memory import MemoryFileSystem

from shardckpt import CheckpointNotFoundError
from shardckpt.lightning import ShardedCheckpointIO


class Guarded(MemoryFileSystem):
    """In memory, and of no use to whoever has not got the token."""

    protocol = "guarded"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def __init__(self, token: str = "", **options: Any) -> None:
        if token != "open sesame":
            raise PermissionError("no token, no files")
        super().__init__(**options)

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return super()._strip_protocol(path.removeprefix("guarded:/"))


OPTIONS = {"token": "open sesame"}
URL = "guarded://run"


@pytest.fixture
def guarded() -> Any:
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    Guarded.store.clear()
    Guarded.pseudo_dirs[:] = [""]
    return Guarded(**OPTIONS)


def plugin(resume: Any = None) -> ShardedCheckpointIO:
    return ShardedCheckpointIO(resume=resume, storage_options=OPTIONS, timeout=30)


def test_a_fresh_plugin_resumes_and_removes(guarded: Any, tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """A process that did not save the checkpoint loads and removes it with the options that its plugin was given."""
    run = toy.trainer(lightning, tmp_path, plugins=[plugin()], max_epochs=1)
    run.fit(Toy(), toy.loader())
    run.save_checkpoint(f"{URL}/a.ckpt")
    again = toy.trainer(lightning, tmp_path, plugins=[plugin()], max_epochs=2)
    again.fit(Toy(), toy.loader(), ckpt_path=f"{URL}/a.ckpt")
    assert again.global_step == 24
    io = plugin()
    loaded = io.load_checkpoint(f"{URL}/a.ckpt")
    assert loaded is not None
    assert loaded["global_step"] == 12
    io.remove_checkpoint(f"{URL}/a.ckpt")
    assert not guarded.find("/run")


def test_ordinary_files_behind_options(guarded: Any, tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """An ordinary file of stock Lightning is loaded and removed there too."""
    stock = toy.trainer(lightning, tmp_path, checkpoint={"filename": "old"}, plugins=[], max_epochs=1)
    stock.fit(Toy(), toy.loader())
    guarded.pipe("/run/old.ckpt", (tmp_path / "old.ckpt").read_bytes())
    again = toy.trainer(lightning, tmp_path, plugins=[plugin()], max_epochs=2)
    again.fit(Toy(), toy.loader(), ckpt_path=f"{URL}/old.ckpt")
    assert again.global_step == 24
    plugin().remove_checkpoint(f"{URL}/old.ckpt")
    assert not guarded.find("/run")


def test_last_is_found_behind_options(guarded: Any, tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """What looks for ``"last"`` looks with the options of the Trainer's plugin, and passes over half a checkpoint."""
    run = toy.trainer(lightning, tmp_path, plugins=[plugin()], max_epochs=1)
    run.fit(Toy(), toy.loader())
    run.save_checkpoint(f"{URL}/a.ckpt")
    run.save_checkpoint(f"{URL}/last.ckpt")
    callback = lightning.callbacks.ModelCheckpoint(str(tmp_path), save_last=True)
    callback.dirpath = URL
    fresh = toy.trainer(lightning, tmp_path, plugins=[plugin()])
    assert callback._find_last_checkpoints(fresh) == {f"{URL}/last.ckpt/manifest.json"}
    connector = lightning.trainer.connectors.checkpoint_connector
    dates = connector.get_filesystem(f"{URL}/last.ckpt")
    assert dates.exists(f"{URL}/last.ckpt")
    assert dates.modified(f"{URL}/last.ckpt") is not None
    guarded.rm("/run/last.ckpt/manifest.json")
    with pytest.raises(CheckpointNotFoundError, match="a.ckpt"):
        callback._find_last_checkpoints(fresh)
    tolerant = toy.trainer(lightning, tmp_path, plugins=[plugin(resume="latest")])
    assert callback._find_last_checkpoints(tolerant) == {f"{URL}/a.ckpt/manifest.json"}
