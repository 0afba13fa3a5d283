"""One rank of a DDP job on the CPU: ``ddp_worker.py <flavour> <folder> <case>...``. Started by `ddp_job.run`.

A case returns something that JSON can say. One that raises ends this rank, since the others may be waiting for it.
"""

import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import toy
from ddp_job import report_path

import shardckpt
from shardckpt import PerRank, commit
from shardckpt.lightning import ShardedCheckpointIO, binding, plugin

RANK = int(os.environ["LOCAL_RANK"])
WORLD = int(os.environ["WORLD_SIZE"])
L: Any = None
Toy: Any = None
FOLDER = Path()


def ddp(folder: Path | str, **options: Any) -> Any:
    return toy.trainer(L, folder, **({"strategy": "ddp", "devices": WORLD, "use_distributed_sampler": True} | options))


def data() -> Any:
    return toy.loader(96, shuffle=True)


def fit(folder: Path | str, *, model: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    """Train a fresh model from one seed; returns the Trainer, with the recorder as ``trainer.record``."""
    L.seed_everything(1, verbose=False)
    record = toy.recorder(L)
    trainer = ddp(folder, callbacks=[*options.pop("callbacks", []), record], **options)
    trainer.record = record
    trainer.fit(Toy() if model is None else model, data(), toy.loader(32), ckpt_path=ckpt_path)
    return trainer


def even_parts() -> Any:
    """Every rank writes, and a tensor larger than its part is divided."""
    trainer = fit(FOLDER / "even", model=Toy(width=60_000), checkpoint={"filename": "a"}, max_epochs=1)
    trainer.strategy.barrier()
    sizes = [shard.stat().st_size for shard in toy.shards(FOLDER / "even" / "a.ckpt")]
    manifest = json.loads((FOLDER / "even" / "a.ckpt" / "manifest.json").read_text())
    return sizes, [name for name, tensor in manifest["tensors"].items() if len(tensor["file"]) > 1]


def uninterrupted() -> Any:
    """Three epochs, and one resumed for two more; and what ``last.ckpt`` shares with its like."""
    whole = fit(FOLDER / "whole", checkpoint={"save_last": True}, max_epochs=3)
    options = {"filename": "{epoch}", "save_last": True, "save_top_k": -1}
    first = fit(FOLDER / "parts", checkpoint=options, max_epochs=1)
    links = [shard.stat().st_nlink for shard in toy.shards(FOLDER / "parts" / "last.ckpt")]
    first.strategy.barrier()
    second = fit(FOLDER / "parts", checkpoint=options, max_epochs=3, ckpt_path="last")
    return {
        "whole": whole.record.end,
        "first": first.record.end,
        "start": second.record.start,
        "second": second.record.end,
        "position": second.record.position,
        "links": links,
    }


def write() -> Any:
    """Leave a checkpoint, and the digests of what it holds."""
    trainer = fit(FOLDER / "written", checkpoint={"filename": f"by-{WORLD}"}, max_epochs=1)
    return trainer.record.end


def resume() -> Any:
    """Resume what another world wrote, and go on."""
    trainer = fit(
        FOLDER / "resumed", ckpt_path=FOLDER / "written" / "by-2.ckpt", max_epochs=2, checkpoint={"filename": "on"}
    )
    return trainer.record.start, trainer.record.position, trainer.current_epoch


def other_names() -> Any:
    """Ranks whose metrics give them another file name follow rank 0."""

    class Local(Toy):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("mine", float(self.global_rank))
            return super().training_step(batch, batch_idx)

    fit(FOLDER / "names", model=Local(), checkpoint={"filename": "{mine}"}, max_epochs=1).strategy.barrier()
    return sorted(toy.complete(FOLDER / "names")), sorted(p.name for p in (FOLDER / "names").iterdir())


def rank_zeros_word() -> Any:
    """What differs by rank, in shape even, is rank 0's in the checkpoint: buffers, callbacks' tensors, plain values."""

    class Local(L.callbacks.Callback):  # type: ignore[misc]
        def state_dict(self) -> dict[str, Any]:
            return {"mine": torch.full((RANK + 1,), float(RANK)), "rank": RANK, "extra": [0] * RANK}

    trainer = fit(FOLDER / "word", checkpoint={"filename": "a"}, callbacks=[Local()], max_epochs=1)
    trainer.strategy.barrier()
    loaded = ShardedCheckpointIO().load_checkpoint(FOLDER / "word" / "a.ckpt")
    assert loaded is not None
    state = (
        loaded["callbacks"]["Local"]
        if "Local" in loaded["callbacks"]
        else next(value for value in loaded["callbacks"].values() if "rank" in value)
    )
    mean = toy.digest(loaded["state_dict"]["net.1.running_mean"])
    return state["mine"].tolist(), state["rank"], state["extra"], mean, trainer.record.end["model.net.1.running_mean"]


def marked_by_rank() -> Any:
    """What hooks mark with PerRank, of another structure on each rank, is every rank's; hooks that load get a list."""
    seen: dict[str, Any] = {}

    class Marking(L.callbacks.Callback):  # type: ignore[misc]
        def state_dict(self) -> dict[str, Any]:
            own = PerRank({"rng": torch.full((RANK + 2,), float(RANK)), "at": [RANK] * RANK})
            return {"own": own, "rank": RANK, "deep": [{"x": PerRank(Path(str(RANK)))}]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            seen["callback"] = state

    class Hooked(Toy):  # type: ignore[misc, valid-type]
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["position"] = PerRank(10 + RANK)
            checkpoint["some"] = {"of 1": PerRank("here")} if RANK == 1 and not seen else {}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen["module"] = [checkpoint["position"], checkpoint["some"]]

    options = {"filename": "{epoch}", "save_last": True, "save_top_k": -1}
    trainer = fit(FOLDER / "marked", model=Hooked(), checkpoint=options, callbacks=[Marking()], max_epochs=1)
    trainer.strategy.barrier()
    path = FOLDER / "marked" / "last.ckpt"
    trainer = fit(
        FOLDER / "again", model=Hooked(), checkpoint=options, callbacks=[Marking()], max_epochs=2, ckpt_path=path
    )
    trainer.strategy.barrier()
    own = [[value["rng"].tolist(), value["at"]] for value in seen["callback"]["own"]]
    words = [json.loads(file.read_text()) for file in sorted(path.glob("rank-*.json"))]
    return {
        "own": own,
        "rank": seen["callback"]["rank"],
        "deep": [[str(path) for path in item["x"]] for item in seen["callback"]["deep"]],
        "module": seen["module"],
        "links": [shard.stat().st_nlink for shard in toy.shards(FOLDER / "again" / "last.ckpt")],
        "tensors": ["own" in str(word["entries"].keys()) for word in words],
    }


def fail_on_rank_one(name: str) -> Callable[[], None]:
    """Have rank 1 fail to write checkpoints of that name; returns what undoes it."""
    put = commit.put_rank_manifest

    def refusing(storage: Any, manifest: Any) -> Any:
        if RANK == 1 and name in storage.url:
            raise OSError(28, "no room on this node")
        return put(storage, manifest)

    commit.put_rank_manifest = refusing
    return lambda: setattr(commit, "put_rank_manifest", put)


def zero_redundancy() -> Any:
    """An optimizer that shards its own state, and gathers it on rank 0 to be saved."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    class Sharding(Toy):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            return ZeroRedundancyOptimizer(self.parameters(), optimizer_class=torch.optim.Adam, lr=0.01)

    ends = []
    for name, options in (("ours", {}), ("stock", {"plugins": []})):
        folder = FOLDER / f"zero-{name}"
        fit(folder, model=Sharding(), checkpoint={"filename": "a"}, max_epochs=1, **options)
        again = fit(folder, model=Sharding(), ckpt_path=folder / "a.ckpt", max_epochs=2, **options)
        ends.append({key: value for key, value in again.record.end.items() if key.startswith("model")})
    return ends


def failing_rank() -> Any:
    """One rank cannot write: all are told at the next save, and the checkpoint before it stays."""
    undo = fail_on_rank_one("epoch=1")
    try:
        fit(FOLDER / "failing", checkpoint={"filename": "{epoch}"}, max_epochs=4)
    except shardckpt.SaveFailedError as error:
        return str(error), sorted(toy.complete(FOLDER / "failing"))
    finally:
        undo()
    return "nothing was raised", []


def failing_at_the_end() -> Any:
    """The very last save fails on one rank: fit fails on all."""
    undo = fail_on_rank_one("epoch=0")
    try:
        fit(FOLDER / "failing-late", checkpoint={"filename": "{epoch}"}, max_epochs=1)
    except shardckpt.SaveFailedError as error:
        return str(error)
    finally:
        undo()
    return "nothing was raised"


def going_on() -> Any:
    """One rank cannot write, and the run is to go on: what is complete at the end, and how many saves have failed."""
    undo = fail_on_rank_one("epoch=1")
    io = ShardedCheckpointIO(on_save_error="warn", timeout=20, commit_timeout=60)
    folder = FOLDER / "going-on"
    there = []

    class Looking(L.callbacks.Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            io.wait()
            trainer.strategy.barrier()
            there.append(sorted(toy.complete(folder)))
            trainer.strategy.barrier()

    try:
        fit(folder, checkpoint={"filename": "{epoch}"}, callbacks=[Looking()], max_epochs=4, plugins=[io])
        torch.distributed.barrier()
    finally:
        undo()
    return there[1:], io.failed_saves, sorted(path.name for path in folder.iterdir())


def taking_the_latest() -> Any:
    """``last.ckpt`` is cut short: the error of each rank, and where each goes on with ``resume="latest"``."""
    folder = FOLDER / "cut-short"
    options = {"filename": "{epoch}", "save_top_k": -1, "save_last": True}
    fit(folder, checkpoint=options, max_epochs=2)
    trainer = fit(folder, ckpt_path=folder / "epoch=1.ckpt", max_epochs=2)
    start = trainer.record.start
    trainer.strategy.barrier()
    if RANK == 0:
        (folder / "last.ckpt" / "manifest.json").unlink()
    trainer.strategy.barrier()
    told = []
    for path in ("last", folder / "last.ckpt"):
        try:
            fit(folder, checkpoint=options, ckpt_path=path, max_epochs=3)
        except shardckpt.CheckpointNotFoundError as error:
            told.append("epoch=1.ckpt" in str(error) and 'resume="latest"' in str(error))
        trainer.strategy.barrier()
        io = ShardedCheckpointIO(resume="latest", timeout=20, commit_timeout=60)
        again = fit(folder, checkpoint=options, ckpt_path=path, max_epochs=2, plugins=[io])
        told.append(again.record.start == start)
    return told


def terminated() -> Any:
    """SIGTERM to all ranks while a save is in flight: how the run ends, and what rank 0 finds then."""
    folder, publish = FOLDER / "terminated", commit.publish

    def slowly(*args: Any) -> None:
        time.sleep(0.5)
        publish(*args)

    class Saving(L.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(folder / "a.ckpt")
                os.kill(os.getpid(), signal.SIGTERM)

    commit.publish = slowly
    try:
        fit(folder, callbacks=[Saving()], max_epochs=1)
    except SystemExit as error:
        ended = type(error).__name__
    else:
        ended = "not at all"
    finally:
        commit.publish = publish
    return ended, sorted(toy.complete(folder)), RANK or len(list((folder / "a.ckpt").iterdir()))


def evaluate() -> Any:
    """``validate`` under DDP takes the weights of a checkpoint."""
    model = Toy()
    ddp(FOLDER).validate(model, toy.loader(32), ckpt_path=FOLDER / "written" / f"by-{WORLD}.ckpt")
    return {f"model.{name}": toy.digest(value) for name, value in model.state_dict().items()}


def missing() -> Any:
    """A path where nothing is, and a model that does not fit, fail on every rank alike."""
    messages = []
    for model, path in ((Toy(), FOLDER / "nowhere.ckpt"), (Toy(width=5), FOLDER / "written" / f"by-{WORLD}.ckpt")):
        try:
            ddp(FOLDER).fit(model, data(), ckpt_path=path)
        except shardckpt.ShardckptError as error:
            messages.append(type(error).__name__)
    return messages


def on_s3() -> Any:
    """A bucket as ``dirpath``: save, find the last one, resume."""
    folder = os.environ["TEST_S3_URL"]
    options = {"filename": "{epoch}", "save_last": True, "save_top_k": 1}
    first = fit(folder, checkpoint=options, max_epochs=2)
    second = fit(folder, checkpoint=options, max_epochs=3, ckpt_path="last")
    return first.record.end, second.record.start, second.record.position, second.ckpt_path


def unbound() -> Any:
    """Without the entry point one rank writes, says so, and the checkpoint is as good."""
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    plugin.log.addHandler(handler)
    callbacks, binding._callbacks = binding._callbacks, lambda flavour: []
    try:
        trainer = fit(FOLDER / "unbound", checkpoint={"filename": "a"}, max_epochs=1)
        end = trainer.record.end
        trainer.strategy.barrier()
        again = fit(FOLDER / "unbound", ckpt_path=FOLDER / "unbound" / "a.ckpt", max_epochs=2)
    finally:
        binding._callbacks = callbacks
        plugin.log.removeHandler(handler)
    return (
        len(toy.shards(FOLDER / "unbound" / "a.ckpt")),
        warned,
        end == again.record.start,
        type(trainer.strategy).__name__,
    )


def alone() -> Any:
    """A save that one rank alone asks for fails there, in bounded time. The job's order is broken after it."""
    trainer = ddp(FOLDER / "alone", plugins=[ShardedCheckpointIO(timeout=2)])
    trainer.fit(Toy(), data())
    started = time.monotonic()
    message = ""
    if RANK == 0:
        try:
            trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(), FOLDER / "alone" / "a")
        except shardckpt.ShardckptError as error:
            message = f"{type(error).__name__}: {error}"
    trainer.strategy.barrier()
    return message, time.monotonic() - started


def touched_on_one_rank() -> Any:
    """Hooks that run on rank 0 alone look at the model's and the optimizers' state; the others do not."""

    class Looking(L.callbacks.Callback):  # type: ignore[misc]
        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            if RANK == 0:
                assert len(checkpoint["state_dict"]) > 0
                assert len(checkpoint["optimizer_states"][0]) > 0

    path = FOLDER / "written" / f"by-{WORLD}.ckpt"
    return fit(FOLDER / "touched", callbacks=[Looking()], ckpt_path=path, max_epochs=2).record.start


def options_of_a_call() -> Any:
    """The storage options of one call, as every rank remembers them for that path."""
    trainer = ddp(FOLDER / "options")
    trainer.fit(Toy(), data())
    path = FOLDER / "options" / "a.ckpt"
    trainer.save_checkpoint(path, storage_options={"auto_mkdir": True})
    return trainer.strategy.checkpoint_io.places.options_for(str(path))


def failing_wait() -> Any:
    """One rank alone is told of a failed save as it begins to load."""
    io = ShardedCheckpointIO(timeout=20)
    if RANK == 1:

        def wait() -> None:
            raise shardckpt.SaveFailedError("the one before")

        io.wait = wait  # type: ignore[method-assign]
    try:
        ddp(FOLDER, plugins=[io], max_epochs=2).fit(Toy(), data(), ckpt_path=FOLDER / "written" / f"by-{WORLD}.ckpt")
    except shardckpt.ShardckptError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


CASES: dict[str, Callable[[], Any]] = {
    case.__name__: case
    for case in (
        even_parts,
        uninterrupted,
        write,
        resume,
        other_names,
        rank_zeros_word,
        marked_by_rank,
        zero_redundancy,
        failing_rank,
        going_on,
        taking_the_latest,
        terminated,
        failing_at_the_end,
        evaluate,
        missing,
        on_s3,
        unbound,
        touched_on_one_rank,
        options_of_a_call,
        failing_wait,
        alone,
    )
}


def main(cases: Mapping[str, Callable[..., Any]] = CASES, prepare: Callable[[Any, Path], None] | None = None) -> None:
    """Run the cases that the command line names; ``prepare`` gets the flavour's package and the folder first."""
    global L, Toy, FOLDER
    flavour, folder, *names = sys.argv[1:]
    warnings.simplefilter("ignore")
    L, FOLDER = toy.package(flavour), Path(folder)
    Toy = toy.module_class(L)
    if prepare is not None:
        prepare(L, FOLDER)
    for name in names:
        report = report_path(FOLDER, name, WORLD, RANK)
        started = time.monotonic()
        case, *arguments = name.split(":")
        try:
            answer: dict[str, Any] = {"result": cases[case](*arguments)}
        except BaseException:  # noqa: BLE001 - the report is how the test hears of it
            answer = {"error": traceback.format_exc()}
        report.write_text(json.dumps(answer))
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)  # noqa: T201 - the log of this rank
        if "error" in answer:
            os._exit(1)


if __name__ == "__main__":
    main()
