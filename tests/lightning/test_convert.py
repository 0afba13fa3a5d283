"""Moving in and out: stock Lightning's files and directories become ours, and ours theirs, and training goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy

import ranks
from multirank import foreign_cases
from shardckpt.tools import convert


def position(trainer: Any) -> tuple[int, int]:
    return trainer.current_epoch, trainer.global_step


def test_a_stock_file_moves_in_and_out(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """A run that began with stock Lightning goes on with the plugin, and then without, as if it had never changed."""
    stock = toy.trainer(lightning, tmp_path, plugins=[], max_epochs=1, enable_checkpointing=False)
    stock.fit(Toy(), toy.loader())
    stock.save_checkpoint(tmp_path / "stock.ckpt")
    convert(tmp_path / "stock.ckpt", tmp_path / "ours.ckpt")
    assert (tmp_path / "ours.ckpt/manifest.json").exists()
    first = toy.recorder(lightning)
    ours = toy.trainer(lightning, tmp_path, callbacks=[first], enable_checkpointing=False)
    ours.fit(Toy(), toy.loader(), ckpt_path=tmp_path / "ours.ckpt")
    assert first.start == toy.digests(stock)
    ours.save_checkpoint(tmp_path / "later.ckpt")
    ours.strategy.checkpoint_io.teardown()
    convert(tmp_path / "later.ckpt", tmp_path / "out.ckpt")
    second = toy.recorder(lightning)
    again = toy.trainer(lightning, tmp_path, callbacks=[second], plugins=[], max_epochs=3, enable_checkpointing=False)
    again.fit(Toy(), toy.loader(), ckpt_path=tmp_path / "out.ckpt")
    assert second.start == toy.digests(ours)
    assert position(again) == (3, 36)
    loaded = Toy.load_from_checkpoint(tmp_path / "out.ckpt")
    assert loaded.hparams == Toy().hparams


@pytest.mark.multiprocess
def test_a_directory_of_shards_becomes_one_file(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """What Lightning's consolidation does, in bounded memory; and the file, unlike that one's, is resumed from."""
    directory = tmp_path / "sharded.ckpt"
    ranks.world(2).run(foreign_cases.train_stock, str(directory), 2)
    convert(directory, tmp_path / "one.ckpt", to="torch")
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    whole = _load_distributed_checkpoint(directory)
    found = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert found.keys() == (whole.keys() - {"optimizer_0"}) | {"optimizer_states"}
    assert all(value.equal(whole["state_dict"][name]) for name, value in found["state_dict"].items())
    for name, slots in whole["optimizer_0"]["state"].items():
        assert all(value.equal(found["optimizer_states"][0]["state"][name][key]) for key, value in slots.items())
    for source in ("one.ckpt", "ours.ckpt"):
        if source == "ours.ckpt":
            convert(directory, tmp_path / source, to="shardckpt")
        record = toy.recorder(lightning)
        run = toy.trainer(lightning, tmp_path, callbacks=[record], **({"plugins": []} if source == "one.ckpt" else {}))
        run.fit(Toy(), toy.loader(), ckpt_path=tmp_path / source)
        assert record.position == (1, 6)
        assert toy.digest(whole["state_dict"]["net.0.weight"]) == record.start["model.net.0.weight"]
        assert (
            toy.digest(whole["optimizer_0"]["state"]["net.0.weight"]["exp_avg"])
            == record.start["optimizer0.net.0.weight.exp_avg"]
        )
