"""The examples for Lightning and Fabric, as they stand in the README and the pages, but for the number of devices."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from pages import blocks

pytest.importorskip("lightning")


def here(block: str) -> str:
    """A block for this machine: one process on the CPU, a few steps."""
    block = re.sub(r'strategy="ddp",\s*devices=\d', 'accelerator="cpu", devices=1', block)
    few = "max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False"
    block = block.replace("Trainer(accelerator", f"Trainer({few}, accelerator")
    block = re.sub(r"Trainer\(\n", f"Trainer({few},\n", block)
    return block.replace("every_n_train_steps=1000", "every_n_train_steps=4")


@pytest.mark.parametrize("page", ("README.md", "quickstart.md", "lightning.md"))
def test_the_examples_run(page: str, tmp_path: Path, Toy: Any, lightning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader pastes them, with a model, data and an optimizer of their own."""
    monkeypatch.chdir(tmp_path)
    model = Toy()
    names: dict[str, Any] = {
        "model": model,
        "datamodule": toy.counting_class(lightning)(),
        "optimizer": torch.optim.AdamW(model.parameters()),
        "step": 1000,
    }
    run = 0
    for block in blocks(page, "python"):
        if "Trainer" in block or "Fabric" in block:
            if "fabric" in block:
                names["model"] = model = Toy()
                names["optimizer"] = torch.optim.AdamW(model.parameters())
            exec(compile(here(block), page, "exec"), names)
            run += 1
    assert run == {"README.md": 3, "quickstart.md": 1, "lightning.md": 1}[page]
    if "trainer" in names:
        assert names["trainer"].global_step == 24
        assert (tmp_path / "checkpoints/last.ckpt/manifest.json").exists()


def test_the_loop_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun or alone, and once more from where it ended."""
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks("README.md", "python") if "train_one_step" in block]
    for _ in range(2):
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

        def train_one_step(model: Any, optimizer: Any, scheduler: Any) -> None:
            model(torch.ones(3)).sum().backward()
            optimizer.step()
            scheduler.step()

        names: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            "scheduler": scheduler,
            "train_one_step": train_one_step,
            "steps": 1500,
            "path": "ck",
        }
        exec(compile(block, "README.md", "exec"), names)
        assert names["state"]["step"] == 1500
        assert names["report"].world_size == 1
