"""One rank of a job under strategies that shard their state: ``sharded_worker.py <flavour> <folder> <case>...``.

Started by `ddp_job.run`. Arguments of a case follow it after colons.
"""

import logging
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ddp_worker
import torch
import toy
from ddp_worker import RANK, WORLD
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardckpt
from shardckpt import loading
from shardckpt.lightning import strategies

L: Any = None
FOLDER = Path()


def module_class() -> Any:
    """The toy classifier without BatchNorm, whose statistics differ by rank, and with rows that two do not divide."""
    base = toy.module_class(L)

    class Net(base):  # type: ignore[misc, valid-type]
        kind = ""

        def __init__(self, width: int = 26, **options: Any) -> None:
            super().__init__(width, **options)
            self.net = nn.Sequential(nn.Linear(toy.FEATURES, width), nn.Tanh(), nn.Linear(width, 5))
            self.register_buffer("seen", torch.zeros(3))

        def configure_model(self) -> None:
            mesh = getattr(self, "_device_mesh", None)
            if self.kind in ("tp", "2d"):
                parallelize_module(self.net, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
            if self.kind in ("fsdp2", "2d"):
                fully_shard(self.net[0], mesh=mesh["data_parallel"])
                fully_shard(self.net, mesh=mesh["data_parallel"])

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen += 1
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            if self.kind == "fsdp1-flat":
                optimizer = torch.optim.AdamW(self.trainer.model.parameters(), lr=self.hparams["lr"])
            else:
                optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    return Net


def strategy(kind: str) -> Any:
    """A stock strategy, or as little changed as FSDP1 needs to run on the CPU."""
    if kind in ("ddp", "single"):
        return "auto" if kind == "single" else "ddp"
    if kind == "fsdp2":
        return L.strategies.ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    if kind == "tp":
        return L.strategies.ModelParallelStrategy(
            data_parallel_size=1, tensor_parallel_size=WORLD, save_distributed_checkpoint=False
        )

    if kind == "2d":
        return L.strategies.ModelParallelStrategy(data_parallel_size=WORLD // 2, tensor_parallel_size=2)

    class OnCPU(L.strategies.FSDPStrategy):  # type: ignore[misc]
        def setup_environment(self) -> None:
            super().setup_environment()
            if kind == "fsdp1-mesh":
                self.kwargs["device_mesh"] = init_device_mesh("cpu", (WORLD,))

        def _setup_model(self, model: Any) -> Any:
            return FullyShardedDataParallel(
                model, device_id=torch.device("cpu"), sharding_strategy=self.sharding_strategy, **self.kwargs
            )

    options: dict[str, Any] = {"auto_wrap_policy": {nn.Linear}} if kind == "fsdp1" else {}
    if kind == "fsdp1-flat":
        options["use_orig_params"] = False
    if kind == "fsdp1-whole":
        options["sharding_strategy"] = "NO_SHARD"
    return OnCPU(state_dict_type="sharded" if kind == "fsdp1" else "full", **options)


def digests(trainer: Any) -> dict[str, str]:
    """On rank 0 a digest of everything that a resumed run must have back, by the names of the plain model."""
    model = trainer.strategy.model
    module = trainer.lightning_module
    optimizers: list[Mapping[str, Any]] = []
    if isinstance(trainer.strategy, L.strategies.FSDPStrategy):
        kind, *configs = StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()
        if module.kind == "fsdp1-whole":
            kind, *configs = StateDictType.FULL_STATE_DICT, FullStateDictConfig(), FullOptimStateDictConfig()
        with FullyShardedDataParallel.state_dict_type(model, kind, *configs):
            state_dict = model.state_dict()
            optimizers = [FullyShardedDataParallel.optim_state_dict(model, o) for o in trainer.optimizers]
    else:
        state_dict = module.state_dict()
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for optimizer in trainer.optimizers:
            state = {names[id(parameter)]: values for parameter, values in optimizer.state.items()}
            optimizers.append({"state": state, "param_groups": optimizer.param_groups})
    found = {f"model.{name}": toy.digest(full(value)) for name, value in state_dict.items()}
    for number, saved in enumerate(optimizers):
        for name, values in saved["state"].items():
            found |= {f"optimizer{number}.{name}.{key}": toy.digest(full(value)) for key, value in values.items()}
        for index, group in enumerate(saved["param_groups"]):
            options = {key: group[key] for key in sorted(group) if key != "params"}
            found[f"optimizer{number}.group{index}"] = toy.digest(options)
    for index, config in enumerate(trainer.lr_scheduler_configs):
        found[f"scheduler{index}"] = toy.digest(config.scheduler.state_dict())
    return found if RANK == 0 else {}


def full(value: Any) -> Any:
    """The whole tensor; of one that FSDP1 has sharded, on rank 0 alone."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, ShardedTensor):
        whole = torch.empty(value.size(), dtype=value.dtype) if RANK == 0 else None
        value.gather(0, whole)
        return whole
    return value


def fit(kind: str, folder: Path | str, *, model: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    L.seed_everything(1, verbose=False)
    record = toy.recorder(L, digests)
    weights_only = options.pop("weights_only", None)
    callbacks = [*options.pop("callbacks", []), record]
    options = {"strategy": strategy(kind), "devices": WORLD} | options
    trainer = toy.trainer(L, folder, **options, callbacks=callbacks)
    trainer.record = record
    model = module_class()() if model is None else model
    model.kind = kind
    trainer.fit(model, toy.loader(96), toy.loader(32), ckpt_path=ckpt_path, weights_only=weights_only)
    return trainer


def write(kind: str) -> Any:
    """Leave a checkpoint, and the digests of what it holds."""
    trainer = fit(kind, FOLDER / "written", checkpoint={"filename": kind}, max_epochs=1)
    return trainer.record.end, type(trainer.strategy).__name__


def resume(kind: str, source: str = "*") -> Any:
    """Resume everything that was written under any strategy, or under one, and go on."""
    found = {}
    for path in sorted((FOLDER / "written").glob(f"{source}.ckpt")):
        trainer = fit(kind, FOLDER / "resumed", ckpt_path=path, max_epochs=2, limit_train_batches=2)
        found[path.stem] = [trainer.record.start, trainer.record.position, trainer.current_epoch]
    return found


def continued(kind: str) -> Any:
    """Two epochs, and one resumed by the name of its last checkpoint for one more; and who wrote what of that."""
    options = {"filename": "{epoch}", "save_last": True, "save_top_k": 1}
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    strategies.log.addHandler(handler)
    strategies.log.setLevel(logging.DEBUG)
    whole = fit(kind, FOLDER / f"whole-{kind}", checkpoint=options, max_epochs=2)
    folder = FOLDER / f"parts-{kind}"
    fit(kind, folder, checkpoint=options, max_epochs=1)
    whole.strategy.barrier()  # as each fit's end does not: files are looked at that another rank may yet replace
    links = [shard.stat().st_nlink for shard in toy.shards(folder / "last.ckpt")]
    sizes = [len(toy.tensors(shard)) for shard in toy.shards(folder / "last.ckpt")]
    whole.strategy.barrier()
    second = fit(kind, folder, checkpoint=options, max_epochs=2, ckpt_path="last")
    second.strategy.barrier()
    return {
        "same": whole.record.end == second.record.end,
        "links": links,
        "shards": sizes,
        "kept": sorted(toy.complete(folder)),
        "said": said,
    }


def touched(kind: str) -> Any:
    """Hooks look at the model's and the optimizer's states, on all ranks or on one, and change neither."""
    starts = []
    for ranks in (range(WORLD), range(1)):

        class Looking(L.callbacks.Callback):  # type: ignore[misc]
            ranks = range(0)

            def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
                if RANK in self.ranks:
                    assert checkpoint["state_dict"]["net.0.weight"].shape == (26, toy.FEATURES)
                    assert len(checkpoint["optimizer_states"][0]["state"]) == 4

        looking = Looking()
        looking.ranks = ranks
        path = FOLDER / "written" / f"{kind}.ckpt"
        starts.append(fit(kind, FOLDER, callbacks=[looking], ckpt_path=path, max_epochs=2).record.start)
    return starts


def replaced(kind: str) -> Any:
    """A hook hands other weights on to be saved, under the old names and whole; and one keeps a part of its own."""

    class Halving(L.callbacks.Callback):  # type: ignore[misc]
        kept: Any = None

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: value / 2 for name, value in weights.items()}

        def state_dict(self) -> dict[str, Any]:
            return {} if self.kept is None else {"kept": [{}, self.kept]}

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.kept = pl_module.net[0].weight.detach().clone()

    halving = Halving()
    trainer = fit(kind, FOLDER / f"halved-{kind}", callbacks=[halving], checkpoint={"filename": "a"}, max_epochs=1)
    weight = full(trainer.lightning_module.net[0].weight.detach())
    kept = full(halving.kept)
    loaded = shardckpt.load(FOLDER / f"halved-{kind}" / "a.ckpt")
    saved = next(value["kept"][1] for value in loaded["callbacks"].values() if "kept" in value)
    return torch.equal(loaded["state_dict"]["net.0.weight"], weight / 2), torch.equal(saved, kept)


def marked(kind: str) -> Any:
    """A callback marks what differs by rank: each rank's is saved, and whoever loads gets them all, by rank."""
    seen = []

    class Marking(L.callbacks.Callback):  # type: ignore[misc]
        def state_dict(self) -> dict[str, Any]:
            return {"own": shardckpt.PerRank({"rng": torch.full((2,), float(RANK)), "at": RANK})}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            seen.extend([value["rng"].tolist(), value["at"]] for value in state["own"])

    folder = FOLDER / f"marked-{kind}"
    fit(kind, folder, callbacks=[Marking()], checkpoint={"filename": "a"}, max_epochs=1)
    fit(kind, folder, callbacks=[Marking()], ckpt_path=folder / "a.ckpt", max_epochs=2, limit_train_batches=2)
    return seen


def stock(kind: str) -> Any:
    """What Lightning wrote without the plugin, in its own way, resumes with it."""
    folder = FOLDER / f"stock-{kind}"
    first = fit(kind, folder, plugins=[], checkpoint={"filename": "a"}, max_epochs=1)
    first.strategy.barrier()
    path = folder / "a.ckpt"
    assert not (path / "manifest.json").exists()
    ours = fit(kind, folder, ckpt_path=path, max_epochs=2)
    return first.record.end == ours.record.start, path.is_dir(), ours.record.position, type(ours.strategy).__name__


def ordinary(kind: str) -> Any:
    """A file that DDP wrote without the plugin resumes with groups in another order than the module's, of one shape."""

    class Crossed(module_class()):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            size = toy.FEATURES
            self.net = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, 5))
            self.scale = nn.Parameter(torch.ones(4))  # which FSDP2 does not shard here

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * self.scale.mean()

        def configure_optimizers(self) -> Any:
            groups = [list(self.net[index].parameters()) for index in (1, 0, 2)] + [[self.scale]]
            return torch.optim.AdamW([{"params": group, "lr": 0.01 * (i + 1)} for i, group in enumerate(groups)])

    folder = FOLDER / f"ordinary-{kind}"
    first = fit("ddp", folder, model=Crossed(), plugins=[], checkpoint={"filename": "a"}, max_epochs=1)
    first.strategy.barrier()
    second = fit(kind, folder, model=Crossed(), ckpt_path=folder / "a.ckpt", max_epochs=2)
    values = [value for state in second.optimizers[0].state.values() for value in state.values()]
    mapped = [value for value in values if type(value) is torch.Tensor and value.untyped_storage().filename]
    return first.record.end == second.record.start, second.record.position, len(mapped)


def hostile(kind: str) -> Any:
    """A directory like those of the strategy itself, the metadata of which would run code, on every rank alike."""
    path, ran = FOLDER / f"hostile-{kind}.ckpt", FOLDER / f"ran-{kind}"
    if RANK == 0:
        shutil.copytree(FOLDER / f"stock-{kind}" / "a.ckpt", path)
        (path / ".metadata").write_bytes(pickle.dumps(Running(str(ran))))
    torch.distributed.barrier()
    try:
        fit(kind, FOLDER, ckpt_path=path, max_epochs=2)
    except shardckpt.UnsafeLoadError as error:
        return ran.exists(), str(error)
    return ran.exists(), ""


class Running:
    """Something that leaves a trace when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def evaluated(kind: str) -> Any:
    """``validate`` and ``test`` take the weights of a checkpoint, and one saved by hand is there on return."""
    trainer = fit(kind, FOLDER, max_epochs=1)
    path = FOLDER / f"by-hand-{kind}" / "a.ckpt"
    trainer.save_checkpoint(path, storage_options={"auto_mkdir": True})
    there = shardckpt.is_checkpoint(path)
    trainer.save_checkpoint(FOLDER / f"by-hand-{kind}" / "weights.ckpt", weights_only=True)
    found = []
    for evaluate, checkpoint in (("validate", path), ("test", path.with_name("weights.ckpt"))):
        run = toy.trainer(L, FOLDER, strategy=strategy(kind), devices=WORLD)
        model = module_class()()
        model.kind = kind
        getattr(run, evaluate)(model, toy.loader(32), ckpt_path=checkpoint, verbose=False)
        found.append(digests(run))
    end = {name: value for name, value in trainer.record.end.items() if name.startswith("model.")}
    return there, [weights == end for weights in found]


def mismatched(kind: str) -> Any:
    """A model that does not fit is refused by all ranks; ``strict_loading=False`` takes what fits."""

    class More(module_class()):  # type: ignore[misc]
        def __init__(self, width: int = 26) -> None:
            super().__init__(width)
            self.more = nn.Linear(2, 2)

    path = FOLDER / "written" / f"{kind}.ckpt"
    messages = []
    for model in (module_class()(width=20), More()):
        model.kind = kind
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            toy.trainer(L, FOLDER, strategy=strategy(kind), devices=WORLD).validate(
                model, toy.loader(32), ckpt_path=path, verbose=False
            )
        except shardckpt.StateMismatchError as error:
            messages.append(str(error))
        if kind != "fsdp1":  # which has taken the parameters out of the module
            assert all(torch.equal(full(value), before[name]) for name, value in model.state_dict().items())
    lenient = More()
    lenient.kind, lenient.strict_loading = kind, False
    run = toy.trainer(L, FOLDER, strategy=strategy(kind), devices=WORLD)
    run.validate(lenient, toy.loader(32), ckpt_path=path, verbose=False)
    return messages, digests(run)


def averaged(kind: str) -> Any:
    """A moving average of the weights is saved and resumed beside them."""

    def average(callback: Any) -> dict[str, str]:
        return {name: toy.digest(value) for name, value in callback._average_model.state_dict().items()}

    class Keeping(L.callbacks.weight_averaging.EMAWeightAveraging):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            self.start = average(self)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.end = average(self)

    folder = FOLDER / f"averaged-{kind}"
    first, second = Keeping(), Keeping()
    run = fit(kind, folder, callbacks=[first], checkpoint={"filename": "a"}, max_epochs=1)
    again = fit(kind, folder, callbacks=[second], ckpt_path=folder / "a.ckpt", max_epochs=2)
    weights, average_of = (shardckpt.read_tensor(folder / "a.ckpt", f"{k}.net.0.weight") for k in AVERAGED)
    return run.record.end == again.record.start, first.end == second.start, torch.equal(weights, average_of)


AVERAGED = ("current_model_state", "state_dict")


def compiled(kind: str) -> Any:
    """A compiled model's checkpoint has the plain one's names, and each resumes it and ends alike."""

    class Compiled(module_class()):  # type: ignore[misc]
        def configure_model(self) -> None:
            super().configure_model()
            self.net = torch.compile(self.net, backend="eager")

    def plain(found: dict[str, str]) -> dict[str, str]:
        return {name.replace("_orig_mod.", ""): value for name, value in found.items()}

    folder = FOLDER / f"compiled-{kind}"
    first = fit(kind, folder, model=Compiled(), checkpoint={"filename": "a"}, max_epochs=1)
    bare, again = (
        fit(kind, folder, model=model(), ckpt_path=folder / "a.ckpt", max_epochs=2, limit_train_batches=2).record
        for model in (module_class(), Compiled)
    )
    written = plain(first.record.end)
    return [written == bare.start, written == plain(again.start), bare.end == plain(again.end)]


def by_hand(kind: str) -> Any:
    """Two optimizers that the module steps itself, one of them not every time."""

    class Manual(module_class()):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            loss = self.loss(batch)
            self.manual_backward(loss)
            first.step()
            if batch_idx % 2:
                second.step()
            first.zero_grad()
            second.zero_grad()

        def configure_optimizers(self) -> Any:
            first = torch.optim.SGD(self.net[0].parameters(), lr=0.1, momentum=0.9)
            return first, torch.optim.AdamW(self.net[2].parameters(), lr=0.01, fused=True)

    first = fit(kind, FOLDER / f"by-hand-{kind}", model=Manual(), checkpoint={"filename": "b"}, max_epochs=1)
    path = FOLDER / f"by-hand-{kind}" / "b.ckpt"
    second = fit(kind, FOLDER, model=Manual(), ckpt_path=path, max_epochs=2)
    return first.record.end == second.record.start, len(first.record.end), second.record.position


def objects(kind: str) -> Any:
    """``fit(weights_only=False)`` reaches strategies that load after setup, and without it objects are refused."""
    note = module_class()(note=[Unlisted()])
    fit(kind, FOLDER / f"objects-{kind}", model=note, checkpoint={"filename": "a"}, max_epochs=1).strategy.barrier()
    path = FOLDER / f"objects-{kind}" / "a.ckpt"
    fit(kind, FOLDER, ckpt_path=path, max_epochs=2, weights_only=False)
    try:
        fit(kind, FOLDER, ckpt_path=path, max_epochs=2)
    except shardckpt.UnsafeLoadError as error:
        return str(error)
    return ""


class Unlisted:
    """Something that only pickle can store."""


def unreadable(kind: str) -> Any:
    """One rank cannot read its part: all hear of it, and none waits in a collective for the other."""
    read = loading.read_together

    def refusing(reading: Any, heard: Any, operation: Any, **options: Any) -> None:
        if RANK == 1 and operation.world_size > 1:  # plain values have been read before, by each rank alone
            raise OSError(5, "the disk of this node is gone")
        read(reading, heard, operation, **options)

    loading.read_together = refusing
    try:
        fit(kind, FOLDER, ckpt_path=FOLDER / "written" / f"{kind}.ckpt", max_epochs=2)
    except shardckpt.ShardckptError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        loading.read_together = read
    return "nothing was raised"


def failing(kind: str) -> Any:
    """One rank cannot write: all are told, and the checkpoint before it stays."""
    undo = ddp_worker.fail_on_rank_one("epoch=1")
    folder = FOLDER / f"failing-{kind}"
    try:
        fit(kind, folder, checkpoint={"filename": "{epoch}"}, max_epochs=3)
    except shardckpt.SaveFailedError as error:
        return str(error), sorted(toy.complete(folder))
    finally:
        undo()
    return "nothing was raised", []


def exception(kind: str) -> Any:
    """``OnExceptionCheckpoint`` saves when training fails on every rank, and its checkpoint resumes."""

    class Failing(module_class()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 2:
                raise ZeroDivisionError("on every rank")
            return super().training_step(batch, batch_idx)

    folder = FOLDER / f"exception-{kind}"
    kept = L.callbacks.OnExceptionCheckpoint(folder, "crash")
    kept.teardown = lambda *_: None  # which removes it
    try:
        fit(kind, folder, model=Failing(), callbacks=[kept], max_epochs=1)
    except ZeroDivisionError:
        return fit(kind, folder, ckpt_path=folder / "crash.ckpt", max_epochs=1).record.position
    return None


def on_s3(kind: str) -> Any:
    """A bucket as ``dirpath``."""
    folder = f"{os.environ['TEST_S3_URL']}/{kind}"
    options = {"filename": "{epoch}", "save_last": True, "save_top_k": 1}
    first = fit(kind, folder, checkpoint=options, max_epochs=1)
    second = fit(kind, folder, checkpoint=options, max_epochs=2, ckpt_path="last")
    return first.record.end == second.record.start, second.record.position, second.ckpt_path


CASES: dict[str, Callable[..., Any]] = {
    case.__name__: case
    for case in (
        write,
        resume,
        continued,
        touched,
        replaced,
        marked,
        stock,
        ordinary,
        hostile,
        evaluated,
        mismatched,
        averaged,
        compiled,
        by_hand,
        objects,
        unreadable,
        failing,
        exception,
        on_s3,
    )
}


def main() -> None:
    ddp_worker.main(CASES, prepare)


def prepare(lightning: Any, folder: Path) -> None:
    global L, FOLDER
    L, FOLDER = lightning, folder
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
