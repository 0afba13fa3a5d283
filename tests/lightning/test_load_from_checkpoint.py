"""``MyModel.load_from_checkpoint`` as its documentation describes it, on a sharded path."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn

from shardckpt import CheckpointNotFoundError
from shardckpt.lightning import ShardedCheckpointIO, from_checkpoint, model_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, lightning: Any, Toy: Any) -> Path:
    """A checkpoint of a module with other hyper-parameters than the default, and of a datamodule."""
    folder = tmp_path_factory.mktemp("run")
    run = toy.trainer(lightning, folder, checkpoint={"filename": "one"}, max_epochs=1)
    run.fit(Toy(width=12, lr=0.03), datamodule=toy.counting_class(lightning)(size=48))
    return folder / "one.ckpt"


def test_hyper_parameters_and_weights(saved: Path, Toy: Any) -> None:
    """The model is made with the arguments it was saved with, and has the weights, for paths of either type."""
    models = [Toy.load_from_checkpoint(path) for path in (saved, str(saved), saved / "manifest.json")]
    assert all(dict(model.hparams) == {"width": 12, "lr": 0.03, "note": None} for model in models)
    loaded = ShardedCheckpointIO().load_checkpoint(saved)
    assert loaded is not None
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, loaded["state_dict"][name])


def test_arguments_override_hyper_parameters(saved: Path, tmp_path: Path, Toy: Any) -> None:
    """Keyword arguments win over what was saved, and ``hparams_file`` replaces it."""
    assert Toy.load_from_checkpoint(saved, lr=0.5).hparams["lr"] == 0.5
    (tmp_path / "hparams.yaml").write_text("lr: 0.25\nwidth: 12\n")
    assert Toy.load_from_checkpoint(saved, hparams_file=tmp_path / "hparams.yaml").hparams["lr"] == 0.25


def test_strict(saved: Path, Toy: Any) -> None:
    """``strict`` decides about missing and unexpected names, as in stock Lightning."""

    class Larger(Toy):  # type: ignore[misc, valid-type]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.head = nn.Linear(2, 2)

    with pytest.raises(RuntimeError, match=r"head\.weight"):
        Larger.load_from_checkpoint(saved)
    model = Larger.load_from_checkpoint(saved, strict=False)
    assert torch.equal(model.net[0].weight, Toy.load_from_checkpoint(saved).net[0].weight)


@pytest.mark.parametrize(
    "map_location",
    [
        "meta",
        torch.device("meta"),
        {"cpu": "meta"},
        lambda storage, tag: torch.UntypedStorage(storage.nbytes(), device="meta"),
    ],
    ids=["str", "device", "dict", "callable"],
)
def test_map_location(saved: Path, map_location: Any) -> None:
    """Every form that ``torch.load`` takes moves the tensors, by the location tag they were saved with."""
    from lightning.pytorch.core import saving

    loaded = saving.pl_load(saved, map_location=map_location)
    assert {value.device.type for value in loaded["state_dict"].values()} == {"meta"}


def test_a_datamodule(saved: Path, lightning: Any) -> None:
    """A datamodule comes back with its arguments and its state."""
    data = toy.counting_class(lightning).load_from_checkpoint(saved)
    assert data.hparams["size"] == 48
    assert data.handed_out == 1


def test_weights_for_a_plain_module(saved: Path) -> None:
    """The documents' way to a submodule's weights works: filter the state dict by its prefix."""
    checkpoint = ShardedCheckpointIO().load_checkpoint(saved)
    assert checkpoint is not None
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    plain = nn.Sequential(nn.Linear(toy.FEATURES, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, toy.CLASSES))
    plain.load_state_dict(weights)


def test_other_sources_are_lightnings(saved: Path, tmp_path: Path, Toy: Any) -> None:
    """File-like objects and ordinary files go to Lightning's own loading, unchanged."""
    loaded = ShardedCheckpointIO().load_checkpoint(saved)
    torch.save(loaded, tmp_path / "plain.ckpt")
    buffer = io.BytesIO((tmp_path / "plain.ckpt").read_bytes())
    for source in (tmp_path / "plain.ckpt", buffer):
        model = Toy.load_from_checkpoint(source)
        assert torch.equal(model.net[0].weight, Toy.load_from_checkpoint(saved).net[0].weight)
    with pytest.raises(FileNotFoundError):
        Toy.load_from_checkpoint(tmp_path / "none.ckpt")


def test_half_a_checkpoint_is_named(saved: Path, tmp_path: Path, Toy: Any) -> None:
    """Shards without a manifest are no checkpoint, and the error says so in place of "is a directory"."""
    (tmp_path / "half.ckpt").mkdir()
    for shard in toy.shards(saved):
        (tmp_path / "half.ckpt" / shard.name).hardlink_to(shard)
    with pytest.raises(CheckpointNotFoundError, match="cut short"):
        Toy.load_from_checkpoint(tmp_path / "half.ckpt")


def test_wrapping_twice_is_wrapping_once(lightning: Any) -> None:
    """Each plugin and each Trainer sees to it that Lightning's functions are wrapped, and they are wrapped once."""
    from lightning.pytorch.core import saving

    before = saving.pl_load
    from_checkpoint.install()
    model_checkpoint.install()
    assert saving.pl_load is before
    assert not hasattr(before._shardckpt_wraps, "_shardckpt_wraps")
