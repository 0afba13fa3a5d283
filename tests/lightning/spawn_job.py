"""Trains with a strategy that starts its processes itself: ``spawn_job.py <strategy> <folder>``, report in JSON."""

import json
import sys
import warnings
from pathlib import Path

import toy

L = toy.package("lightning.pytorch")
Toy = toy.module_class(L)
# Spawned processes find the class by its name in this module.
Toy.__module__, Toy.__qualname__ = __name__, "Toy"


def main() -> None:
    warnings.simplefilter("ignore")
    strategy, folder = sys.argv[1], Path(sys.argv[2])
    L.seed_everything(1, verbose=False)
    model = Toy()
    options = {"checkpoint": {"filename": "a", "save_last": True}, "strategy": strategy, "devices": 2, "max_epochs": 1}
    trainer = toy.trainer(L, folder, **options)
    trainer.fit(model, toy.loader())
    # The launcher hands the trained weights back to this process through the plugin, on one rank.
    saved = Toy.load_from_checkpoint(folder / "last.ckpt").state_dict()
    report = {
        "shards": [len(toy.shards(folder / name)) for name in ("a.ckpt", "last.ckpt")],
        "same": all(toy.digest(value) == toy.digest(saved[name]) for name, value in model.state_dict().items()),
        "best": trainer.checkpoint_callback.best_model_path,
    }
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
