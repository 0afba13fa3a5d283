"""The figures of checkpoints among those of training, where the user asks for them."""

from pathlib import Path
from typing import Any

import toy

from shardckpt.lightning import ShardedCheckpointIO


def test_loggers_get_the_figures_of_every_save_and_load(tmp_path: Path, lightning: Any, Toy: Any) -> None:
    """What a checkpoint costs stands beside the loss, in the Trainer's own thread, and only if that was asked for."""
    from lightning.pytorch.loggers import CSVLogger

    heard: list[Any] = []
    for asked in (True, False):
        folder = tmp_path / str(asked)
        options = {"log_reports": asked, "on_report": heard.append} if asked else {}
        for epochs in (1, 2):
            logger = CSVLogger(folder, name="csv", version=str(epochs))
            run = toy.trainer(
                lightning,
                folder,
                checkpoint={"every_n_train_steps": 4, "save_last": True, "save_top_k": -1},
                plugins=[ShardedCheckpointIO(timeout=30, commit_timeout=60, **options)],
                logger=logger,
                log_every_n_steps=4,
                max_epochs=epochs,
            )
            run.fit(Toy(), toy.loader(), ckpt_path="last" if epochs == 2 else None)
        text = (folder / "csv/2/metrics.csv").read_text()
        header, *rows = text.splitlines()
        assert ("checkpoint/save/stall_seconds" in header) == asked
        assert ("checkpoint/load/seconds" in header) == asked
        if asked:
            at = header.split(",").index("checkpoint/save/bytes")
            assert sum(bool(row.split(",")[at]) for row in rows) >= 3
    assert len(heard) >= 2 * 6 + 1
