"""What stock Lightning wrote before: its directories of DCP files load through the plugin, and never mix with ours."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

import ranks
from multirank import foreign_cases
from shardckpt import dcp_directory
from shardckpt.errors import CorruptCheckpointError, StateMismatchError, UnsafeLoadError, UsageError
from shardckpt.lightning import ShardedCheckpointIO, ordinary, sharded


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a stock Trainer wrote under ModelParallel on two ranks."""
    pytest.importorskip("lightning")
    path = tmp_path_factory.mktemp("stock") / "a.ckpt"
    ranks.world(2).run(foreign_cases.train_stock, str(path), 2)
    assert {"meta.pt", ".metadata"} < {file.name for file in path.iterdir()}
    return path


@pytest.fixture(scope="module")
def written(directory: Path) -> dict[str, str]:
    """Digests of what is in it, read by Lightning's own consolidation."""
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    whole = _load_distributed_checkpoint(directory)
    found = {f"model.{name}": toy.digest(value) for name, value in whole["state_dict"].items()}
    for name, slots in whole["optimizer_0"]["state"].items():
        found |= {f"optimizer0.{name}.{key}": toy.digest(value) for key, value in slots.items()}
    for index, group in enumerate(whole["optimizer_0"]["param_groups"]):
        found[f"optimizer0.group{index}"] = toy.digest({k: group[k] for k in sorted(group) if k != "params"})
    return found


@pytest.mark.multiprocess
def test_a_directory_resumes_where_tensors_are_whole(
    directory: Path, written: dict[str, str], tmp_path: Path, lightning: Any, Toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on one device, and one of two DDP ranks, go on with the bits that ModelParallel saved, read in place."""
    made: list[Any] = []
    stock = dcp_directory.Directory.value
    monkeypatch.setattr(
        dcp_directory.Directory, "value", lambda self, *place: (made.append(place), stock(self, *place))[1]
    )
    record = toy.recorder(lightning)
    run = toy.trainer(lightning, tmp_path, callbacks=[record], max_epochs=2)
    run.fit(Toy(), toy.loader(), ckpt_path=directory)
    assert record.position == (1, 6)
    assert written.items() <= record.start.items()
    assert any(name.endswith("exp_avg_sq") for name in written)
    assert made == [("optimizer_0", "param_groups")]
    for start in ranks.world(2).run(foreign_cases.resume_ddp, str(directory), 2):
        assert written.items() <= start.items()


@pytest.mark.multiprocess
def test_a_directory_for_inference(directory: Path, written: dict[str, str], Toy: Any) -> None:
    """``load_from_checkpoint`` and the plugin alone give the tensors and the hyper-parameters of a directory."""
    model = Toy.load_from_checkpoint(directory, lr=0.5)
    assert model.hparams["lr"] == 0.5
    found = {f"model.{name}": toy.digest(value) for name, value in model.state_dict().items()}
    assert found.items() <= written.items()
    whole = ShardedCheckpointIO().load_checkpoint(directory, map_location="meta")
    assert whole is not None
    assert whole["state_dict"]["net.0.weight"].device.type == "meta"
    assert whole["optimizer_states"][0]["state"]["net.0.weight"].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.multiprocess
def test_a_directory_that_does_not_fit_changes_nothing(directory: Path, tmp_path: Path, lightning: Any) -> None:
    """Names and shapes are compared before a tensor is read, and every difference is named."""
    other = toy.module_class(lightning)(width=7)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(StateMismatchError, match=r"size mismatch of net.0.weight: \(7, 16\) here, \(24, 16\)"):
        toy.trainer(lightning, tmp_path, max_epochs=2).fit(other, toy.loader(), ckpt_path=directory)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


class Mine:
    """Something that only unpickling can make."""


@pytest.mark.multiprocess
def test_nothing_is_unpickled_without_leave(directory: Path, tmp_path: Path) -> None:
    """Neither ``meta.pt`` nor DCP's own metadata, which is a pickle too, runs code under ``weights_only``."""
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    torch.save({"mine": Mine()}, copy / "meta.pt")
    plugin = ShardedCheckpointIO()
    with pytest.raises(UnsafeLoadError, match=r"meta\.pt.*weights_only=False"):
        plugin.load_checkpoint(copy)
    found = plugin.load_checkpoint(copy, weights_only=False)
    assert found is not None
    assert type(found["mine"]).__name__ == "Mine"
    (copy / ".metadata").write_bytes(pickle.dumps(Mine()))
    with pytest.raises(UnsafeLoadError, match="Mine"):
        plugin.load_checkpoint(copy)


@pytest.mark.multiprocess
def test_a_damaged_directory_says_so(directory: Path, tmp_path: Path) -> None:
    """A save that was cut short, damaged metadata and names that lead outside are errors that name the file."""
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    for stored in metadata.storage_data.values():
        stored.relative_path = "../secret"
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptCheckpointError, match=r"outside its directory: '\.\./secret'"):
        ShardedCheckpointIO().load_checkpoint(copy)
    (copy / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        ShardedCheckpointIO().load_checkpoint(copy)
    (copy / ".metadata").unlink()
    with pytest.raises(CorruptCheckpointError, match="cut short"):
        ShardedCheckpointIO().load_checkpoint(copy)


@pytest.mark.multiprocess
def test_a_directory_makes_way_and_comes_back(directory: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Ours is never written into a directory of another's: that is kept until ours is complete, and put back if not."""
    path = tmp_path / "a.ckpt"
    shutil.copytree(directory, path)
    plugin = ShardedCheckpointIO()
    with monkeypatch.context() as patch:
        patch.setattr("shardckpt.saving.halves.stage", lambda *_, **__: 1 / 0)
        with pytest.raises(Exception, match="division by zero"):
            plugin.save_checkpoint({"x": torch.ones(3)}, path)
    assert dcp_directory.is_directory(str(path))
    assert plugin.load_checkpoint(path) is not None
    plugin.save_checkpoint({"x": torch.ones(3)}, path)
    assert not dcp_directory.is_directory(str(path))
    assert (path / "manifest.json").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.multiprocess
def test_a_directory_stands_for_what_was_to_replace_it(directory: Path, tmp_path: Path) -> None:
    """After a job that died while it wrote over a directory, that loads; and asked to, the plugin removes it."""
    path = tmp_path / "a.ckpt"
    shutil.copytree(directory, str(path) + ordinary.ASIDE)
    (path / "rank-00000-0mwsfhlumdifjnl.safetensors").parent.mkdir()
    found = ShardedCheckpointIO().load_checkpoint(path)
    assert found is not None
    assert "state_dict" in found
    ShardedCheckpointIO().remove_checkpoint(str(path) + ordinary.ASIDE)
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def deepspeed_class(module: Any) -> Any:
    """A DeepSpeed strategy without DeepSpeed, which is not needed to be refused."""

    class Renamed(module.DeepSpeedStrategy):  # type: ignore[misc]
        def __init__(self) -> None:
            super(module.DeepSpeedStrategy, self).__init__(accelerator=None)

    return Renamed


def test_deepspeed_is_refused(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """With the plugin a Trainer or a Fabric of DeepSpeed's ends at once, and says who writes the checkpoints."""
    import lightning.fabric as fabric

    from shardckpt.lightning import binding

    strategy = deepspeed_class(lightning.strategies)()
    strategy.checkpoint_io = ShardedCheckpointIO()
    with pytest.raises(UsageError, match="DeepSpeed's own engine"):
        binding.bind(strategy)
    with pytest.raises(UsageError, match="DeepSpeed's own engine"):
        sharded(lightning.strategies.DeepSpeedStrategy)
    with pytest.raises(UsageError, match="DeepSpeed's own engine"):
        fabric.Fabric(accelerator="cpu", strategy=deepspeed_class(fabric.strategies)(), plugins=[ShardedCheckpointIO()])


def test_xla_refuses_the_plugin(lightning: Any) -> None:
    """Lightning's XLA strategies take no plugin but their own: an error, and not a checkpoint of another kind."""
    strategy = lightning.strategies.XLAStrategy.__new__(lightning.strategies.XLAStrategy)
    with pytest.raises(TypeError, match="XLACheckpointIO"):
        strategy.checkpoint_io = ShardedCheckpointIO()
