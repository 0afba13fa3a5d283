"""What the ranks do in the tests of checkpoints that are not ours: Lightning's Trainer, with and without the plugin."""

import sys
from pathlib import Path
from typing import Any

import torch

from multirank.fabric_cases import environment, quiet

sys.path.insert(0, str(Path(__file__).parents[1] / "lightning"))  # the helpers beside the tests of the adapter


def _sharded(toy: Any, lightning: Any) -> Any:
    class Sharded(toy.module_class(lightning)):  # type: ignore[misc]
        def configure_model(self) -> None:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for part in (self.net[0], self.net[3]):
                fully_shard(part, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    return Sharded


def train_stock(rank: int, path: str, world_size: int) -> None:
    """Train under a stock ``ModelParallelStrategy`` and save as it does: a directory of DCP files."""
    import toy

    lightning = toy.package("lightning.pytorch")
    strategy = lightning.strategies.ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    with quiet():
        torch.manual_seed(0)
        run = toy.trainer(
            lightning,
            Path(path).parent,
            strategy=strategy,
            devices=world_size,
            plugins=[environment("lightning.fabric")],
            max_epochs=1,
            use_distributed_sampler=True,
        )
        run.fit(_sharded(toy, lightning)(), toy.loader())
        run.save_checkpoint(path)


def resume_ddp(rank: int, path: str, world_size: int) -> dict[str, str]:
    """Resume under DDP with the plugin; what is restored, by name."""
    import toy

    from shardckpt.lightning import ShardedCheckpointIO

    lightning = toy.package("lightning.pytorch")
    with quiet():
        record = toy.recorder(lightning)
        run = toy.trainer(
            lightning,
            Path(path).parent,
            strategy="ddp",
            devices=world_size,
            plugins=[environment("lightning.fabric"), ShardedCheckpointIO(timeout=40)],
            callbacks=[record],
            max_epochs=2,
        )
        run.fit(toy.module_class(lightning)(), toy.loader(), ckpt_path=path)
    assert record.position[0] == 1
    found: dict[str, str] = record.start
    return found
