"""Fabric: ``fabric.save`` and ``fabric.load`` with the plugin, under every strategy that runs without a GPU."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
import shardckpt
from multirank import fabric_cases
from multirank.fabric_cases import digests, fabric, name_of, net, trained
from shardckpt.errors import SaveFailedError, StateMismatchError, UsageError
from shardckpt.lightning import ShardedCheckpointIO, binding, sharded

pytest.importorskip("lightning")

OURS = [
    ("ddp", "lightning.fabric", True),
    ("fsdp2", "lightning.fabric", True),
    ("tp", "lightning.fabric", True),
    ("fsdp2", "lightning_fabric", True),
]
STOCK = [("ddp", "lightning.fabric", False), ("fsdp2", "lightning.fabric", False)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fabric")


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, dict[str, str]]:
    """What two ranks saved under each strategy, with the plugin and without: digests by checkpoint."""
    first, second = ranks.world(2).run(fabric_cases.write, str(folder), OURS + STOCK)
    assert first == second
    return first


@pytest.mark.multiprocess
def test_every_rank_writes_a_part(folder: Path, written: dict[str, dict[str, str]]) -> None:
    """Under each strategy both ranks save a shard, to the path that rank 0 was given; without the plugin neither."""
    assert {path.name for path in folder.iterdir()} == written.keys()
    for kind in OURS:
        assert len(list((folder / name_of(*kind)).glob("rank-*.safetensors"))) == 2
    assert (folder / name_of(*STOCK[0])).is_file()
    assert (folder / name_of(*STOCK[1]) / "meta.pt").is_file()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("kind", "package"), [("ddp", "lightning.fabric"), ("fsdp2", "lightning.fabric"), ("tp", "lightning_fabric")]
)
def test_any_strategy_loads_what_any_other_wrote(
    kind: str, package: str, folder: Path, written: dict[str, dict[str, str]]
) -> None:
    """Model, optimizer and plain values come back bit for bit, from our checkpoints and from Lightning's own."""
    for loaded in ranks.world(2).run(fabric_cases.read, str(folder), kind, package, list(written)):
        for name, (found, step, rest) in loaded.items():
            assert (name, found) == (name, written[name])
            assert (step, rest) == (2, {"note": {"a": [1, "b"]}, "rank": 0})


@pytest.mark.multiprocess
def test_one_process_and_no_fabric_load_it_too(folder: Path, written: dict[str, dict[str, str]]) -> None:
    """One process reads what two wrote, and so do two that know nothing of Fabric: the names are the bare module's."""
    for name, expected in written.items():
        found, step, rest = fabric_cases.read(0, str(folder), "single", "lightning.fabric", [name])[name]
        assert (name, found, step) == (name, expected, 2)
        assert rest == {"note": {"a": [1, "b"]}, "rank": 0}
    for kind in OURS:
        plainly = ranks.world(2).run(fabric_cases.read_plainly, str(folder / name_of(*kind)))
        assert plainly == [written[name_of(*kind)]] * 2


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", [OURS[1], STOCK[1]])
def test_optimizer_state_finds_its_parameter(kind: Any, folder: Path, written: dict[str, dict[str, str]]) -> None:
    """State goes by name, ours and that of Lightning's directories, so param groups may come in another order."""
    made = fabric("single")
    model, _ = trained(made, steps=0)
    groups = [[p for p in model.parameters() if p.ndim == dims] for dims in (1, 2)]
    turned = made.setup_optimizers(torch.optim.AdamW([{"params": params} for params in groups]))
    made.load(folder / name_of(*kind), {"model": model, "optimizer": turned})
    found = digests(model, turned)
    assert (found.pop("group1"), found.pop("group0")) == tuple(written[name_of(*kind)][f"group{i}"] for i in (0, 1))
    assert found.items() <= written[name_of(*kind)].items()


@pytest.mark.multiprocess
def test_a_rank_that_fails_is_everyones_error(tmp_path: Path) -> None:
    """A load that one rank refuses, or cannot read, ends on all ranks, and nothing has been changed on any."""
    outcomes = ranks.world(2).outcomes(fabric_cases.part_ways, str(tmp_path))
    assert [outcome.kind for outcome in outcomes] == ["StateMismatchError"] * 2
    assert all("only_here" in outcome.text for outcome in outcomes)


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ("ddp", "fsdp2"))
def test_values_that_differ_by_rank(kind: str, tmp_path: Path) -> None:
    """What is marked with ``PerRank`` comes back to each rank as its own, in place."""
    assert ranks.world(2).run(fabric_cases.marked, str(tmp_path), kind) == [[0, True], [1, True]]


@pytest.mark.multiprocess
def test_an_optimizer_that_shards_itself(tmp_path: Path) -> None:
    """``ZeroRedundancyOptimizer`` gets back on each rank the part that the rank had."""
    for before, after in ranks.world(2).run(fabric_cases.shards_itself, str(tmp_path)):
        assert before == after
        assert any(name.endswith("exp_avg") for name in before)


def test_states_of_all_kinds(tmp_path: Path) -> None:
    """Wrapped, compiled and nested objects are restored in place, plain values replaced, and the rest returned."""
    made = fabric("single")
    model, optimizer = trained(made)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1)
    extra = net(5)
    state = {
        "model": model,
        "o": optimizer,
        "s": scheduler,
        "deep": {"net": extra, "n": 1},
        "h": {"a": 1},
        "t": torch.ones(2),
    }
    made.save(tmp_path / "a", state)
    again, other = trained(made, steps=1, seed=9)
    fresh, kept, counts = net(6), torch.zeros(2), torch.optim.lr_scheduler.StepLR(other.optimizer, 7)
    target: dict[str, Any] = {
        "model": torch.compile(again),
        "deep": {"net": fresh, "n": 0},
        "h": {},
        "t": kept,
        "s": counts,
    }
    rest = made.load(tmp_path / "a", target)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    assert all(map(torch.equal, fresh.state_dict().values(), extra.state_dict().values()))
    assert (target["h"], target["deep"]["n"], target["t"] is kept, kept.tolist()) == ({"a": 1}, 1, True, [1, 1])
    assert counts.step_size == 1
    assert rest.keys() == {"o"}
    assert rest["o"]["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    everything = made.load(tmp_path / "a")
    assert everything.keys() == state.keys()
    assert torch.equal(everything["model"]["0.weight"], model.state_dict()["0.weight"])
    made.load(tmp_path / "a", grown := {"t": torch.zeros(5)})
    assert grown["t"].tolist() == [1, 1]


def test_strict_is_honoured(tmp_path: Path) -> None:
    """``strict`` speaks of the state's keys and the module's names, as in stock Fabric; a shape never passes."""
    made = fabric("single")
    made.save(tmp_path / "a", {"model": torch.nn.Linear(2, 3), "step": 1})
    with pytest.raises(KeyError, match="'other' that does not exist"):
        made.load(tmp_path / "a", {"other": 1})
    made.load(tmp_path / "a", state := {"other": 1}, strict=False)
    assert state == {"other": 1}
    larger = torch.nn.Sequential(torch.nn.Linear(2, 3))
    with pytest.raises(StateMismatchError, match=r"missing from the checkpoint: model\.0\.weight"):
        made.load(tmp_path / "a", {"model": larger})
    made.load(tmp_path / "a", {"model": larger}, strict=False)
    for strict in (True, False):
        with pytest.raises(StateMismatchError, match=r"model\.weight.*\(4, 2\) here"):
            made.load(tmp_path / "a", {"model": torch.nn.Linear(2, 4), "step": 5}, strict=strict)


def test_filters_choose_what_is_saved(tmp_path: Path) -> None:
    """A filter sees the names and values that stock Fabric shows it."""
    made = fabric("single")
    model, optimizer = trained(made)
    chosen = {
        "model": lambda name, value: "bias" not in name,
        "opt": lambda name, value: name == "param_groups",
        "h": lambda name, value: value > 1,
        "n": lambda name, value: False,
    }
    state = {"model": model, "opt": optimizer, "h": {"a": 1, "b": 2}, "n": 3}
    made.save(tmp_path / "a", state, filter=chosen)
    fabric("single", plugin=False).save(tmp_path / "stock", state, filter=chosen)
    ours, stock = made.load(tmp_path / "a"), torch.load(tmp_path / "stock")
    assert ours["model"].keys() == stock["model"].keys() == {"0.weight", "2.weight"}
    assert ours["opt"] == stock["opt"]
    assert (ours["h"], ours["n"]) == (stock["h"], stock["n"]) == ({"b": 2}, 3)


def test_load_raw(tmp_path: Path) -> None:
    """A module's or an optimizer's own state dict is read into it, in whichever of the ways it was saved."""
    made = fabric("single")
    model, optimizer = trained(made)
    made.save(tmp_path / "dict", model.state_dict())
    shardckpt.save(model.module, tmp_path / "module")
    torch.save(model.state_dict(), tmp_path / "file")
    for name in ("dict", "module", "file"):
        fresh = made.setup_module(net(8))
        made.load_raw(tmp_path / name, fresh)
        assert all(map(torch.equal, fresh.state_dict().values(), model.state_dict().values()))
    made.save(tmp_path / "optimizer", optimizer.state_dict())
    twin, other = trained(made, steps=0, seed=8)
    made.load_raw(tmp_path / "dict", twin)
    made.load_raw(tmp_path / "optimizer", other)
    assert digests(twin, other) == digests(model, optimizer)


def test_saves_are_committed_on_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to wait for after ``fabric.save``; a failure is raised by it, and what was there is intact."""
    made = fabric("single")
    torch.save({"step": 1}, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr("shardckpt.saving.halves.stage", lambda *_, **__: 1 / 0)
        with pytest.raises(SaveFailedError, match="division by zero"):
            made.save(tmp_path / "a", {"t": torch.ones(2), "step": 2})
    assert made.load(tmp_path / "a") == {"step": 1}
    made.save(tmp_path / "a", {"t": torch.ones(2), "step": 2})
    assert shardckpt.is_checkpoint(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


def test_the_engine_saves_in_the_background_what_fabric_loads(tmp_path: Path) -> None:
    """Who wants an asynchronous save calls the engine with what Fabric wraps, and the names are the same."""
    made = fabric("single")
    model, optimizer = trained(made)
    pending = shardckpt.async_save({"model": model.module, "optimizer": optimizer.optimizer}, tmp_path / "a")
    pending.result(60)
    twin, other = trained(made, steps=0, seed=4)
    made.load(tmp_path / "a", {"model": twin, "optimizer": other})
    assert digests(twin, other) == digests(model, optimizer)


@pytest.mark.parametrize("package", ["lightning.fabric", "lightning_fabric"])
def test_however_the_strategy_got_the_plugin(package: str, tmp_path: Path) -> None:
    """Made with the plugin, given it, or bound by hand: every way binds, and pickles of it do too."""
    pytest.importorskip(package.partition(".")[0])
    strategies = __import__(package, fromlist=["strategies"]).strategies
    device = torch.device("cpu")
    made_with = strategies.SingleDeviceStrategy(device, checkpoint_io=ShardedCheckpointIO())
    (callback,) = binding.fabric_callbacks()
    callback.on_after_setup(fabric=type("Fabric", (), {"strategy": made_with}), module=None)
    by_hand = sharded(strategies.SingleDeviceStrategy)(device)
    given = strategies.SingleDeviceStrategy(device)
    given.checkpoint_io = ShardedCheckpointIO()
    for strategy in (made_with, by_hand, given, pickle.loads(pickle.dumps(given))):
        assert type(strategy) is sharded(strategies.SingleDeviceStrategy)
        assert isinstance(strategy.checkpoint_io, ShardedCheckpointIO)
        assert isinstance(strategy, strategies.SingleDeviceStrategy)
        strategy.save_checkpoint(tmp_path / "a", {"x": 1})
        assert strategy.load_checkpoint(tmp_path / "a") == {"x": 1}


def test_a_strategy_without_the_plugin_stays_as_it_is() -> None:
    """Another plugin is set, or refused, as ever; and FSDP1, which cannot be bound, says so instead of half working."""
    import lightning.fabric as package

    torch_io = package.plugins.TorchCheckpointIO()
    parallel = package.strategies.ModelParallelStrategy(lambda module, mesh: module)
    with pytest.raises(NotImplementedError, match="does not support setting"):
        parallel.checkpoint_io = torch_io
    strategy = package.strategies.SingleDeviceStrategy()
    strategy.checkpoint_io = torch_io
    assert type(strategy) is package.strategies.SingleDeviceStrategy
    assert strategy.checkpoint_io is torch_io
    with pytest.raises(UsageError, match=r"FSDP1.*ModelParallelStrategy"):
        package.strategies.FSDPStrategy().checkpoint_io = ShardedCheckpointIO()


@pytest.mark.multiprocess
def test_a_sharded_tensor_is_told_by_its_memory_too() -> None:
    """Where a DTensor's part lies, and its version, count as for a plain tensor, or a save would be left out."""
    assert ranks.world(2).run(fabric_cases.fingerprints) == [[True, True, True]] * 2
