"""Resuming on a single device: everything comes back, and nothing more is read than is needed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn

from shardckpt import CheckpointNotFoundError, StateMismatchError, UnsafeLoadError
from shardckpt.lightning import ShardedCheckpointIO
from shardckpt.loading import OpenCheckpoint


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of the state that are read, each as text."""
    seen: list[str] = []
    materialise, restore = OpenCheckpoint.materialise, OpenCheckpoint.restore

    def spying_materialise(self: OpenCheckpoint, prefix: Any = (), **options: Any) -> Any:
        seen.append("new " + ".".join(map(str, prefix)))
        return materialise(self, prefix, **options)

    def spying_restore(self: OpenCheckpoint, state: Any, **options: Any) -> Any:
        seen.extend(f"live {key}" for key in state)
        return restore(self, state, **options)

    monkeypatch.setattr(OpenCheckpoint, "materialise", spying_materialise)
    monkeypatch.setattr(OpenCheckpoint, "restore", spying_restore)
    return seen


@pytest.fixture
def saved(tmp_path: Path, lightning: Any, Toy: Any) -> Path:
    """A checkpoint of a finished run of one epoch."""
    lightning.seed_everything(3, verbose=False)
    run = toy.trainer(lightning, tmp_path / "run", checkpoint={"filename": "one"}, max_epochs=1)
    run.fit(Toy(), toy.loader(), toy.loader(32))
    return tmp_path / "run" / "one.ckpt"


def test_resumed_at_an_epoch_boundary_equals_uninterrupted(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """Two epochs, and one epoch resumed for another, end with the same bits in model, optimizer and scheduler."""

    def fit(epochs: int, folder: str, ckpt_path: str | None = None) -> Any:
        lightning.seed_everything(1, verbose=False)
        record = toy.recorder(lightning)
        options = {"checkpoint": {"save_last": True}, "callbacks": [record], "max_epochs": epochs}
        toy.trainer(lightning, tmp_path / folder, **options).fit(
            Toy(), toy.loader(), toy.loader(32), ckpt_path=ckpt_path
        )
        return record

    whole = fit(3, "whole")
    first = fit(1, "parts")
    second = fit(3, "parts", "last")
    assert second.position == (1, 12)
    assert second.start == first.end
    assert second.end == whole.end != first.end


class RemembersItsPlace:
    """A data loader with a shuffled order of its own per epoch, which can go on in the middle of one."""

    def __init__(self) -> None:
        self.batches = list(toy.loader())
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < len(self):
            self.position += 1
            yield self.batches[order[self.position - 1]]
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]


def test_resumed_in_mid_epoch_equals_uninterrupted_with_loader_and_rng(
    tmp_path: Path, lightning: Any, Toy: Any
) -> None:
    """With a stateful data loader and the random state saved, the middle of an epoch is as good as its end."""

    class KeepsRandomState(lightning.callbacks.Callback):  # type: ignore[misc]
        restored: torch.Tensor | None = None

        def state_dict(self) -> dict[str, Any]:
            return {"rng": torch.get_rng_state()}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.restored = state_dict["rng"]

        def on_train_batch_start(self, *_: Any) -> None:
            if self.restored is not None:
                torch.set_rng_state(self.restored)
                self.restored = None

    class Noisy(Toy):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*self.net[:3], nn.Dropout(0.5), self.net[3])

    def fit(folder: str, ckpt_path: Path | None = None) -> Any:
        lightning.seed_everything(1 if ckpt_path is None else 2, verbose=False)
        record = toy.recorder(lightning)
        run = toy.trainer(
            lightning,
            tmp_path / folder,
            checkpoint={"every_n_train_steps": 7, "save_top_k": -1, "filename": "{step}"},
            callbacks=[record, KeepsRandomState()],
        )
        run.fit(Noisy(), RemembersItsPlace(), ckpt_path=ckpt_path)
        return record

    whole = fit("whole")
    resumed = fit("resumed", tmp_path / "whole" / "step=7.ckpt")
    assert resumed.position == (0, 7)
    assert resumed.end == whole.end != resumed.start


def test_everything_that_lightning_saves_comes_back(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """Callbacks, datamodule, precision state, loops, hyper-parameters and what hooks add survive a resume."""

    class Stateful(lightning.callbacks.Callback):  # type: ignore[misc]
        def __init__(self, value: Any = None) -> None:
            self.value = value

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.value = state_dict["value"]

    class Scaled(lightning.plugins.Precision):  # type: ignore[misc]
        scale = 1.0

        def state_dict(self) -> dict[str, Any]:
            return {"scale": self.scale, "growth": torch.tensor([2.0])}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.scale, self.growth = state_dict["scale"], state_dict["growth"]

    class Hooked(Toy):  # type: ignore[misc, valid-type]
        seen = None

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["cool"] = {"things": [1, torch.ones(2)], 3: (4, None)}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen = checkpoint["cool"], checkpoint["hyper_parameters"], checkpoint["pytorch-lightning_version"]

    def run(value: Any, precision: Any, epochs: int, ckpt_path: str | None) -> Any:
        callback, model, data = Stateful(value), Hooked(lr=0.02), toy.counting_class(lightning)()
        trainer = toy.trainer(
            lightning,
            tmp_path,
            checkpoint={"monitor": "val_loss", "save_top_k": 2, "save_last": True},
            callbacks=[callback],
            plugins=[precision, ShardedCheckpointIO()],
            max_epochs=epochs,
        )
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return trainer, callback, model, data

    precision = Scaled()
    precision.scale = 64.0
    before, *_ = run({"t": torch.arange(5), "n": float("inf")}, precision, 2, None)
    fresh = Scaled()
    after, callback, model, data = run(None, fresh, 2, str(tmp_path / "last.ckpt"))

    assert (after.current_epoch, after.global_step) == (2, 24)
    assert torch.equal(callback.value["t"], torch.arange(5))
    assert callback.value["n"] == float("inf")
    assert (fresh.scale, fresh.growth.tolist()) == (64.0, [2.0])
    assert data.handed_out >= 1
    assert data.shown.tolist() == [0, 1, 2]
    cool, hparams, version = model.seen
    assert cool["things"][1].tolist() == [1, 1]
    assert cool[3] == (4, None)
    assert hparams == {"width": 24, "lr": 0.02, "note": None}
    assert version == lightning.__version__
    best, again = before.checkpoint_callback, after.checkpoint_callback
    assert again.best_k_models == best.best_k_models
    assert torch.equal(again.best_model_score, best.best_model_score)


def test_several_optimizers_by_hand(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """Manual optimization with two optimizers of different kinds and their schedulers resumes bit for bit."""

    class ByHand(Toy):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(toy.FEATURES, toy.CLASSES)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, output in zip(self.optimizers(), (self.net, self.other), strict=True):
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(output(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            first = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
            second = torch.optim.Adam(self.other.parameters(), lr=0.01, amsgrad=True)
            return [first, second], [torch.optim.lr_scheduler.ExponentialLR(second, 0.5)]

    def fit(epochs: int, ckpt_path: str | None = None) -> Any:
        lightning.seed_everything(1, verbose=False)
        record = toy.recorder(lightning)
        run = toy.trainer(lightning, tmp_path, checkpoint={"filename": "a"}, callbacks=[record], max_epochs=epochs)
        run.fit(ByHand(), toy.loader(), ckpt_path=ckpt_path)
        return record

    first = fit(1)
    assert fit(2, str(tmp_path / "a.ckpt")).start == first.end
    assert any(name.endswith("max_exp_avg_sq") for name in first.end)


def test_tensors_are_read_in_place_and_once(saved: Path, lightning: Any, Toy: Any, reads: list[str]) -> None:
    """A resume reads model and optimizer straight into the live ones and builds no copy of either."""
    model = Toy()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    toy.trainer(lightning, saved.parent, max_epochs=1).fit(model, toy.loader(), ckpt_path=saved)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert [read for read in reads if read.startswith("live")] == ["live state_dict", "live optimizer_states"]
    assert not [read for read in reads if read.startswith(("new state_dict", "new optimizer_states"))]


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_evaluation_does_not_read_the_optimizers(
    call: str, saved: Path, lightning: Any, Toy: Any, reads: list[str]
) -> None:
    """``validate``, ``test`` and ``predict`` restore the weights, and leave two thirds of the bytes where they are."""
    model = Toy()
    run = toy.trainer(lightning, saved.parent)
    getattr(run, call)(model, toy.loader(32), ckpt_path=str(saved))
    expected = Toy.load_from_checkpoint(saved).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert "live optimizer_states" not in reads
    assert not any(read.startswith("new optimizer_states") for read in reads)


def test_a_hook_may_change_the_weights(saved: Path, lightning: Any, Toy: Any) -> None:
    """What ``on_load_checkpoint`` does to the state dict is what the model gets, as in stock Lightning."""

    class Renamed(Toy):  # type: ignore[misc, valid-type]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.body = self.net
            del self.net

        def loss(self, batch: Any) -> torch.Tensor:
            return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            old = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name.replace("net.", "body."): value * 2 for name, value in old.items()}

    model = Renamed()
    toy.trainer(lightning, saved.parent).validate(model, toy.loader(32), ckpt_path=saved)
    plain = Toy.load_from_checkpoint(saved)
    assert torch.equal(model.body[0].weight, plain.net[0].weight * 2)


def test_a_hook_may_change_the_weights_in_place(saved: Path, lightning: Any, Toy: Any) -> None:
    """A hook that writes into the dict that it was shown is honoured too."""

    class Doubling(Toy):  # type: ignore[misc, valid-type]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["net.0.weight"].mul_(2)
            checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = 0.125

    model = Doubling()
    record = toy.recorder(lightning)
    run = toy.trainer(lightning, saved.parent, callbacks=[record], max_epochs=1)
    run.fit(model, toy.loader(), ckpt_path=saved)
    plain = Toy.load_from_checkpoint(saved)
    assert torch.equal(model.net[0].weight, plain.net[0].weight * 2)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.125
    assert "param_names" not in run.optimizers[0].param_groups[0]


def test_another_shape_is_refused_before_anything_changes(saved: Path, lightning: Any, Toy: Any) -> None:
    """A model that does not fit is left as it was, and the error names every difference."""
    model = Toy(width=25)
    before = {name: toy.digest(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(StateMismatchError, match=r"net\.0\.weight.*\n.*net\.0\.bias"):
        toy.trainer(lightning, saved.parent).fit(model, toy.loader(), ckpt_path=saved)
    assert {name: toy.digest(tensor) for name, tensor in model.state_dict().items()} == before


def test_strict_loading_can_be_turned_off(saved: Path, lightning: Any, Toy: Any) -> None:
    """``strict_loading = False`` restores what matches and leaves the rest."""

    class Larger(Toy):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

    with pytest.raises(StateMismatchError, match=r"missing.*head\.weight"):
        toy.trainer(lightning, saved.parent).validate(Larger(), toy.loader(32), ckpt_path=saved)
    model = Larger()
    model.strict_loading = False
    toy.trainer(lightning, saved.parent).validate(model, toy.loader(32), ckpt_path=saved)
    assert torch.equal(model.net[0].weight, Toy.load_from_checkpoint(saved).net[0].weight)


def test_a_model_with_its_own_loading_is_asked(saved: Path, lightning: Any, Toy: Any) -> None:
    """A module that overrides ``load_state_dict`` gets the whole dict and decides by itself."""

    class Own(Toy):  # type: ignore[misc, valid-type]
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            self.given = sorted(state_dict)
            kept = {name: value for name, value in state_dict.items() if "running" not in name}
            return super().load_state_dict(kept, strict=False)

    model = Own()
    toy.trainer(lightning, saved.parent).validate(model, toy.loader(32), ckpt_path=saved)
    assert model.given == sorted(Toy().state_dict())
    assert model.net[1].running_mean.eq(0).all()
    assert model.net[0].weight.equal(Toy.load_from_checkpoint(saved).net[0].weight)


def test_best_and_last_are_found(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """``ckpt_path="best"`` and ``"last"`` name what the callback kept."""
    options = {"monitor": "val_loss", "save_top_k": 1, "save_last": True}
    run = toy.trainer(lightning, tmp_path, checkpoint=options)
    model = Toy()
    run.fit(model, toy.loader(), toy.loader(32))
    trained = {name: toy.digest(value) for name, value in model.state_dict().items()}
    run.test(ckpt_path="best", dataloaders=toy.loader(32))
    fresh = Toy()
    run.test(fresh, ckpt_path="last", dataloaders=toy.loader(32))
    assert {name: toy.digest(value) for name, value in fresh.state_dict().items()} == trained


def test_weights_alone_do_not_resume(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """``save_weights_only`` is honoured: validating works, resuming fails as it does in stock Lightning."""
    run = toy.trainer(lightning, tmp_path, checkpoint={"filename": "w", "save_weights_only": True}, max_epochs=1)
    run.fit(Toy(), toy.loader())
    toy.trainer(lightning, tmp_path).validate(Toy(), toy.loader(32), ckpt_path=tmp_path / "w.ckpt")
    with pytest.raises(KeyError, match="only the model"):
        toy.trainer(lightning, tmp_path).fit(Toy(), toy.loader(), ckpt_path=tmp_path / "w.ckpt")


def test_pickled_objects_need_leave(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """A hyper-parameter that is an object of the user's is refused until ``weights_only=False``, as torch has it."""
    run = toy.trainer(lightning, tmp_path, checkpoint={"filename": "o"}, max_epochs=1)
    run.fit(Toy(note=Path), toy.loader())
    with pytest.raises(UnsafeLoadError, match="hyper_parameters.note"):
        toy.trainer(lightning, tmp_path).validate(Toy(), toy.loader(32), ckpt_path=tmp_path / "o.ckpt")
    path = tmp_path / "o.ckpt"
    toy.trainer(lightning, tmp_path).validate(Toy(), toy.loader(32), ckpt_path=path, weights_only=False)


def test_a_missing_checkpoint_is_named_with_its_neighbour(saved: Path, lightning: Any, Toy: Any) -> None:
    """A directory without a manifest is no checkpoint, and the error says which complete one lies beside it."""
    broken = saved.with_name("broken.ckpt")
    broken.mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"broken\.ckpt.*one\.ckpt"):
        toy.trainer(lightning, saved.parent).fit(Toy(), toy.loader(), ckpt_path=broken)
    with pytest.raises(FileNotFoundError, match="nothing is there"):
        toy.trainer(lightning, saved.parent).fit(Toy(), toy.loader(), ckpt_path=saved.with_name("none.ckpt"))


def test_the_manifest_stands_for_its_checkpoint(saved: Path, lightning: Any, Toy: Any) -> None:
    """A path that a file dialogue can give, that of the manifest, is taken for the checkpoint's."""
    run = toy.trainer(lightning, saved.parent, max_epochs=1)
    run.fit(Toy(), toy.loader(), ckpt_path=saved / "manifest.json")
    assert run.global_step == 12


def test_averaged_weights_resume(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """A callback that swaps the state dict for averaged weights resumes to the same bits."""
    averaging = lightning.callbacks.weight_averaging.EMAWeightAveraging

    def fit(epochs: int, folder: str, ckpt_path: str | None = None) -> Any:
        lightning.seed_everything(1, verbose=False)
        record = toy.recorder(lightning)
        options = {"checkpoint": {"filename": "e"}, "callbacks": [averaging(decay=0.9), record], "max_epochs": epochs}
        toy.trainer(lightning, tmp_path / folder, **options).fit(Toy(), toy.loader(), ckpt_path=ckpt_path)
        return record

    whole = fit(2, "whole")
    first = fit(1, "parts")
    second = fit(2, "parts", str(tmp_path / "parts" / "e.ckpt"))
    assert {name for name in first.end if name.startswith("optimizer")} <= second.start.keys()
    assert second.end == whole.end


def test_a_hook_may_put_one_part_in_the_place_of_another(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """Of two copies of the weights in a checkpoint a hook may choose, without looking into either."""

    class Choosing(Toy):  # type: ignore[misc, valid-type]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    averaging = lightning.callbacks.weight_averaging.EMAWeightAveraging(decay=0.9)
    trainer = toy.trainer(lightning, tmp_path, checkpoint={"filename": "e"}, callbacks=[averaging], max_epochs=1)
    trainer.fit(Toy(), toy.loader())
    model = Choosing()
    toy.trainer(lightning, tmp_path).validate(model, toy.loader(32), ckpt_path=tmp_path / "e.ckpt")
    loaded = ShardedCheckpointIO().load_checkpoint(tmp_path / "e.ckpt")
    assert loaded is not None
    current, averaged = loaded["current_model_state"], loaded["state_dict"]
    assert torch.equal(model.net[0].weight, current["net.0.weight"])
    assert not torch.equal(current["net.0.weight"], averaged["net.0.weight"])


def test_the_learning_rate_finder_restores(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """The tuner saves, trains and loads again within one fit: the load waits for the save in flight."""
    lightning.seed_everything(1, verbose=False)
    model = Toy()
    before = {name: toy.digest(value) for name, value in model.state_dict().items()}
    run = toy.trainer(lightning, tmp_path, max_epochs=1)
    finder = lightning.tuner.Tuner(run).lr_find(model, toy.loader(), num_training=8, update_attr=False)
    assert len(finder.results["lr"]) > 2
    assert {name: toy.digest(value) for name, value in model.state_dict().items()} == before
    assert toy.complete(tmp_path) == set()


def test_another_optimizer_is_refused_as_torch_does(saved: Path, lightning: Any, Toy: Any) -> None:
    """An optimizer with other param groups than the saved one's is an error, as in stock Lightning, and no guess."""

    class Other(Toy):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="parameter group"):
        toy.trainer(lightning, saved.parent, max_epochs=2).fit(Other(), toy.loader(), ckpt_path=saved)


def test_no_shape_differs_even_if_names_may(saved: Path, lightning: Any, Toy: Any) -> None:
    """``strict_loading=False`` lets names differ, never shapes: training would go on from random weights unsaid."""
    model = Toy(width=25)
    model.strict_loading = False
    before = {name: toy.digest(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(StateMismatchError, match=r"size mismatch(.|\n)*net\.0\.weight"):
        toy.trainer(lightning, saved.parent).validate(model, toy.loader(32), ckpt_path=saved)
    assert {name: toy.digest(tensor) for name, tensor in model.state_dict().items()} == before


@pytest.mark.parametrize("version", [1, 2])
def test_versions_of_modules_survive_a_hook(version: int, tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """A module that converts what older versions of it saved is told the version, whoever looked at the dict before."""

    class Converting(nn.Module):
        _version = version

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            if metadata.get("version") is None or metadata["version"] < version:
                state_dict[prefix + "w"] = state_dict[prefix + "w"] * 100
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    class Versioned(Toy):  # type: ignore[misc, valid-type]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.old = Converting()

    class Looking(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            assert "old.w" in checkpoint["state_dict"]

    class Own(Versioned):
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(state_dict, *args, **kwargs)

    run = toy.trainer(lightning, tmp_path, max_epochs=1)
    run.fit(Versioned(), toy.loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    for model, callbacks in ((Versioned(), [Looking()]), (Own(), [])):
        with torch.no_grad():
            model.old.w.zero_()
        toy.trainer(lightning, tmp_path, callbacks=callbacks).validate(
            model, toy.loader(32), ckpt_path=tmp_path / "a.ckpt"
        )
        assert model.old.w.tolist() == [1, 1, 1]
    assert Versioned.load_from_checkpoint(tmp_path / "a.ckpt").old.w.tolist() == [1, 1, 1]
    io, model = ShardedCheckpointIO(), Versioned()
    io.save_checkpoint(model.state_dict(), tmp_path / "raw.ckpt")
    model.load_state_dict(io.load_checkpoint(tmp_path / "raw.ckpt"))
    assert model.old.w.tolist() == [1, 1, 1]


@pytest.mark.parametrize("left", ["half", "nothing"])
def test_an_ordinary_file_whose_replacement_was_cut_short(left: str, tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """A job that dies while an ordinary ``last.ckpt`` is being replaced is resumed from that, not from scratch."""
    options = {"checkpoint": {"save_last": True, "filename": "a"}, "max_epochs": 1}
    toy.trainer(lightning, tmp_path, plugins=[], **options).fit(Toy(), toy.loader())
    (tmp_path / "a.ckpt").unlink()
    last = tmp_path / "last.ckpt"
    last.rename(tmp_path / "kept")
    if left == "half":
        run = toy.trainer(lightning, tmp_path, max_epochs=1)
        run.fit(Toy(), toy.loader())
        run.save_checkpoint(last)
        (last / "manifest.json").unlink()
    (tmp_path / "kept").rename(tmp_path / "last.ckpt.replaced")
    loaded = ShardedCheckpointIO().load_checkpoint(last)
    assert loaded is not None
    assert loaded["global_step"] == 12
    again = toy.trainer(lightning, tmp_path, **options | {"max_epochs": 2})
    record = toy.recorder(lightning)
    again.callbacks.append(record)
    again.fit(Toy(), toy.loader(), ckpt_path="last")
    assert record.position == (1, 12)
    assert "last.ckpt" in toy.complete(tmp_path)
    assert not list(tmp_path.glob("*.replaced"))


def test_slurm_takes_no_half_checkpoint(tmp_path: Path, lightning: Any, Toy: Any, monkeypatch: Any) -> None:
    """A requeued job whose newest ``hpc_ckpt`` was cut short resumes from the newest complete one."""
    first = toy.trainer(lightning, tmp_path, max_epochs=1)
    first.fit(Toy(), toy.loader())
    for number in (1, 2):
        first.save_checkpoint(tmp_path / f"hpc_ckpt_{number}.ckpt")
    (tmp_path / "hpc_ckpt_2.ckpt" / "manifest.json").unlink()
    again = toy.trainer(lightning, tmp_path, max_epochs=2)
    again.fit(Toy(), toy.loader(), ckpt_path="hpc")
    assert again.ckpt_path == str(tmp_path / "hpc_ckpt_1.ckpt")


def test_a_hook_may_save_optimizers_in_a_dict(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """``optimizer_states`` that a hook keyed by itself comes back as it was, for its counterpart to undo."""
    seen = []

    class Keyed(Toy):  # type: ignore[misc, valid-type]
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["optimizer_states"] = dict(enumerate(checkpoint["optimizer_states"]))

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append(type(checkpoint["optimizer_states"]))
            checkpoint["optimizer_states"] = list(checkpoint["optimizer_states"].values())

    first, second = (toy.recorder(lightning) for _ in range(2))
    run = toy.trainer(lightning, tmp_path, checkpoint={"filename": "a"}, callbacks=[first], max_epochs=1)
    run.fit(Keyed(), toy.loader())
    again = toy.trainer(lightning, tmp_path, callbacks=[second], max_epochs=2)
    again.fit(Keyed(), toy.loader(), ckpt_path=tmp_path / "a.ckpt")
    assert seen == [dict]
    assert second.start == first.end
