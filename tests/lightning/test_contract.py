"""The documented contract of ``CheckpointIO``, met by the plugin alone, without a Trainer around it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn

import shardckpt
from shardckpt import StateMismatchError, UsageError
from shardckpt.lightning import ShardedCheckpointIO


@pytest.fixture
def io() -> ShardedCheckpointIO:
    return ShardedCheckpointIO()


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 + seed)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    return model, torch.optim.Adam(model.parameters())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def dumped(model: nn.Module, optimizer: torch.optim.Optimizer, **rest: Any) -> dict[str, Any]:
    """What ``Trainer.dump_checkpoint`` makes of them."""
    return {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        **rest,
    }


def test_any_dict_is_saved_and_comes_back(io: ShardedCheckpointIO, tmp_path: Path) -> None:
    """Launchers save bare state dicts through the plugin, and read them back in another process."""
    model, _ = trained()
    io.save_checkpoint(model.state_dict(), tmp_path / "weights.ckpt")
    assert same(io.load_checkpoint(tmp_path / "weights.ckpt"), dict(model.state_dict()))
    io.remove_checkpoint(tmp_path / "weights.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_trainers_dict_is_filled_and_returned_whole(io: ShardedCheckpointIO, tmp_path: Path) -> None:
    """A Trainer that passes its state gets every key back, with model tensors read into the live ones.

    The connector looks all of them up, and a fresh Adam's state is empty, so that it cannot be filled in place.
    """
    model, optimizer = trained()
    io.save_checkpoint(dumped(model, optimizer, epoch=3, loops={"fit_loop": {"a": 1}}), tmp_path / "a")
    live, other = fresh()
    state = dumped(live, other, epoch=0)
    loaded = io.load_checkpoint(tmp_path / "a", state=state)
    assert loaded is not None
    assert loaded.keys() == {*dumped(model, optimizer), "epoch", "loops"}
    assert loaded["epoch"] == 3
    assert same(dict(live.state_dict()), dict(model.state_dict()))
    assert loaded["state_dict"]["0.weight"].data_ptr() == live[0].weight.data_ptr()
    other.load_state_dict(loaded["optimizer_states"][0])
    assert same(other.state_dict(), optimizer.state_dict())


def test_model_tensors_that_do_not_fit_are_left_to_the_caller(io: ShardedCheckpointIO, tmp_path: Path) -> None:
    """With a Trainer's dict, judging strictness is the Trainer's: it gets what the checkpoint has, and no more."""
    model, optimizer = trained()
    io.save_checkpoint(dumped(model, optimizer), tmp_path / "a")
    live = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5))
    before = copy.deepcopy(live.state_dict())
    loaded = io.load_checkpoint(tmp_path / "a", state=dumped(live, optimizer))
    assert loaded is not None
    assert same(loaded["state_dict"], dict(model.state_dict()))
    assert same(dict(live.state_dict()), dict(before))


def test_modules_and_optimizers_are_restored_in_place(io: ShardedCheckpointIO, tmp_path: Path) -> None:
    """Given the model and its optimizer under any names, both are restored, and the rest is returned."""
    model, optimizer = trained()
    io.save_checkpoint(dumped(model, optimizer, epoch=3), tmp_path / "a")
    live, other = fresh()
    rest = io.load_checkpoint(tmp_path / "a", state={"model": live, "optimizer": other})
    assert same(dict(live.state_dict()), dict(model.state_dict()))
    assert same(other.state_dict(), optimizer.state_dict())
    assert rest == {"pytorch-lightning_version": "2.6.6", "lr_schedulers": [], "epoch": 3}


@pytest.mark.parametrize("kind", ["module", "optimizer"])
def test_a_bare_module_or_optimizer(io: ShardedCheckpointIO, tmp_path: Path, kind: str) -> None:
    """The contract also allows one module, or one optimizer, as the state."""
    model, optimizer = trained()
    io.save_checkpoint(dumped(model, optimizer), tmp_path / "a")
    live, other = fresh()
    rest = io.load_checkpoint(tmp_path / "a", state=live if kind == "module" else other)
    assert rest is not None
    assert ("state_dict" in rest, "optimizer_states" in rest) == (kind == "optimizer", kind == "module")
    if kind == "module":
        assert same(dict(live.state_dict()), dict(model.state_dict()))
    else:
        assert same(other.state_dict(), optimizer.state_dict())


def test_nothing_is_left_where_everything_had_its_place(io: ShardedCheckpointIO, tmp_path: Path) -> None:
    """``None`` says that the caller has nothing to apply: every key of the checkpoint was given a place."""
    model, optimizer = trained()
    shardckpt.save({"model": model, "optimizer": optimizer, "step": 7}, tmp_path / "a")
    live, other = fresh()
    state: dict[str, Any] = {"model": live, "optimizer": other, "step": 0}
    assert io.load_checkpoint(tmp_path / "a", state=state) is None
    assert state["step"] == 7
    assert same(other.state_dict(), optimizer.state_dict())


def test_a_state_that_does_not_fit_is_refused(io: ShardedCheckpointIO, tmp_path: Path) -> None:
    """A value for which the checkpoint has nothing, and a model of another shape, are errors that name it."""
    model, optimizer = trained()
    io.save_checkpoint(dumped(model, optimizer), tmp_path / "a")
    with pytest.raises(UsageError, match="nothing for \\['scheduler'\\]"):
        io.load_checkpoint(tmp_path / "a", state={"model": model, "scheduler": 3})
    with pytest.raises(StateMismatchError, match=r"0\.weight"):
        io.load_checkpoint(tmp_path / "a", state=nn.Sequential(nn.Linear(4, 4)))


def test_map_location_and_positions(io: ShardedCheckpointIO, tmp_path: Path) -> None:
    """The released contract passes ``map_location`` and ``weights_only`` by position; tensors go where it says."""
    io.save_checkpoint({"w": torch.arange(3), "where": Path}, tmp_path / "a")
    loaded = io.load_checkpoint(tmp_path / "a", "meta", False)
    assert loaded is not None
    assert loaded["w"].device.type == "meta"
    assert loaded["where"] is Path
    with pytest.raises(shardckpt.UnsafeLoadError, match="where"):
        io.load_checkpoint(tmp_path / "a")


def test_ordinary_files(io: ShardedCheckpointIO, tmp_path: Path) -> None:
    """A ``.ckpt`` file that torch.save wrote loads and is removed, and a foreign directory is removed too."""
    torch.save({"a": torch.ones(2)}, tmp_path / "old.ckpt")
    loaded = io.load_checkpoint(tmp_path / "old.ckpt", state={"a": torch.zeros(2)})
    assert loaded is not None
    assert loaded["a"].tolist() == [1, 1]
    io.remove_checkpoint(tmp_path / "old.ckpt")
    (tmp_path / "dcp.ckpt").mkdir()
    (tmp_path / "dcp.ckpt" / ".metadata").touch()
    io.remove_checkpoint(tmp_path / "dcp.ckpt")
    io.remove_checkpoint(tmp_path / "never-there.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_plugins_are_copied_and_pickled_without_their_threads(io: ShardedCheckpointIO, tmp_path: Path) -> None:
    """Trainers are deep-copied and sent to spawned processes: a copy has the options and works on its own."""
    io = ShardedCheckpointIO(compression="zstd")
    io.save_checkpoint({"w": torch.zeros(10000)}, tmp_path / "a")
    for other in (copy.deepcopy(io), pickle.loads(pickle.dumps(io))):
        other.save_checkpoint({"w": torch.zeros(10000)}, tmp_path / "b")
        assert (tmp_path / "b").stat().st_size < 40000
        assert other.load_checkpoint(tmp_path / "b")["w"].shape == (10000,)
        other.teardown()


def test_wrong_options_are_known_at_once() -> None:
    """A misspelt option fails where it is written, and not at the first save hours later."""
    with pytest.raises(UsageError, match="compresion"):
        ShardedCheckpointIO(compresion="zstd")
    with pytest.raises(UsageError, match="compression"):
        ShardedCheckpointIO(compression="lz77")


def test_the_plugin_is_one_for_both_flavours(io: ShardedCheckpointIO) -> None:
    """With both packages installed, either's Trainer accepts the plugin, in whatever order they are imported."""
    for package in ("lightning.fabric.plugins", "lightning_fabric.plugins"):
        module = pytest.importorskip(package)
        assert isinstance(io, module.CheckpointIO)
    assert io.requires_state_on_load


def test_bound_strategies_can_be_named(lightning: Any, Toy: Any, tmp_path: Path) -> None:
    """Who passes the Trainer its strategy can pass a bound one, which brings the plugin, and copies to its like."""
    from shardckpt import lightning as ours
    from shardckpt.lightning import ShardedDDPStrategy, ShardedSingleDeviceStrategy, sharded

    assert sharded(lightning.strategies.DDPStrategy) is ShardedDDPStrategy is sharded(ShardedDDPStrategy)
    for name in ("FSDPStrategy", "ModelParallelStrategy"):
        bound = getattr(ours, f"Sharded{name}")
        assert bound is sharded(getattr(lightning.strategies, name))
        assert isinstance(bound().checkpoint_io, ShardedCheckpointIO)
    with pytest.raises(UsageError, match="DeepSpeedStrategy"):
        sharded(lightning.strategies.DeepSpeedStrategy)
    strategy = ShardedSingleDeviceStrategy()
    run = toy.trainer(lightning, tmp_path, checkpoint={"filename": "a"}, strategy=strategy, plugins=[], max_epochs=1)
    run.fit(Toy(), toy.loader())
    assert toy.complete(tmp_path) == {"a.ckpt"}
    twin = copy.deepcopy(strategy)
    assert type(twin) is ShardedSingleDeviceStrategy
    assert isinstance(twin.checkpoint_io, ShardedCheckpointIO)


def test_a_strategy_with_its_own_saving_is_left_alone(lightning: Any, caplog: Any) -> None:
    """A strategy that saves in its own way keeps doing so, and the log says that the plugin cannot help there."""
    from shardckpt.lightning import binding

    class Own(lightning.strategies.SingleDeviceStrategy):  # type: ignore[misc]
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

    class Gathering(lightning.strategies.FSDPStrategy):  # type: ignore[misc]
        def lightning_module_state_dict(self) -> Any:
            raise AssertionError

    for kind in (Gathering, Own):
        strategy = kind(checkpoint_io=ShardedCheckpointIO())
        assert not binding.bind(strategy)
        assert type(strategy) is kind
    assert "Gathering reads and writes its checkpoints in its own way" in caplog.text
    assert "Own reads and writes its checkpoints in its own way" in caplog.text
