"""A Trainer on one process that keeps its checkpoints in a bucket, served by a real HTTP server."""

from typing import Any

import pytest
import toy

import shardckpt
from shardckpt import CheckpointNotFoundError, filenames
from shardckpt.lightning import ShardedCheckpointIO, model_checkpoint
from shardckpt.storage import connection, retry
from storage.proxy import Proxy

pytestmark = pytest.mark.s3


def checkpoints(place: Any) -> set[str]:
    """The complete checkpoints in the bucket, seen past the code under test."""
    listed = place.client.list_objects_v2(Bucket=place.bucket, Prefix="run/").get("Contents", [])
    return {key.split("/")[1] for entry in listed if (key := entry["Key"]).endswith("/manifest.json")}


def test_training_from_and_to_a_bucket(s3_place: Any, lightning: Any, Toy: Any) -> None:
    """``dirpath`` on ``s3://``: top-k, last, best, a resume from "last", and inference, without other options."""
    options = {"filename": "{epoch}", "monitor": "val_loss", "save_top_k": 1, "mode": "min", "save_last": True}
    record = toy.recorder(lightning)
    first = toy.trainer(lightning, s3_place.url, checkpoint=options, callbacks=[record], max_epochs=3)
    first.fit(Toy(), toy.loader(), toy.loader(32))
    best = first.checkpoint_callback.best_model_path.rpartition("/")[2]
    assert checkpoints(s3_place) == {best, "last.ckpt"}

    again = toy.recorder(lightning)
    second = toy.trainer(lightning, s3_place.url, checkpoint=options, callbacks=[again], max_epochs=4)
    second.fit(Toy(), toy.loader(), toy.loader(32), ckpt_path="last")
    assert again.position == (3, 36)
    assert again.start == record.end
    second.test(ckpt_path="best", dataloaders=toy.loader(32), verbose=False)
    model = Toy.load_from_checkpoint(f"{s3_place.url}/last.ckpt")
    assert {f"model.{n}": toy.digest(v) for n, v in model.state_dict().items()}.items() <= again.end.items()


def test_a_name_in_use_gets_a_version(s3_place: Any, lightning: Any, Toy: Any) -> None:
    """Lightning looks at the path right after a save: cached listings must not hide it."""
    options = {"filename": "same", "save_top_k": -1}
    for _ in range(2):
        run = toy.trainer(lightning, s3_place.url, checkpoint=options, max_epochs=1)
        run.fit(Toy(), toy.loader())
    assert checkpoints(s3_place) == {"same.ckpt", "same-v1.ckpt"}


def test_what_was_resumed_from_stays(s3_place: Any, lightning: Any, Toy: Any) -> None:
    """Retention does not delete the checkpoint that the run was resumed from, as it does not on a local disk."""
    options = {"filename": "{epoch}", "save_top_k": 1}
    toy.trainer(lightning, s3_place.url, checkpoint=options, max_epochs=1).fit(Toy(), toy.loader())
    run = toy.trainer(lightning, s3_place.url, checkpoint=options, max_epochs=3)
    run.fit(Toy(), toy.loader(), ckpt_path=f"{s3_place.url}/epoch=0.ckpt")
    assert checkpoints(s3_place) == {"epoch=0.ckpt", "epoch=2.ckpt"}


def test_last_takes_only_what_is_complete(s3_place: Any, lightning: Any, Toy: Any, caplog: Any) -> None:
    """A ``last.ckpt`` without a manifest is not resumed from: with ``resume="latest"`` the newest complete one is."""
    options = {"filename": "{epoch}", "save_top_k": -1, "save_last": True}
    toy.trainer(lightning, s3_place.url, checkpoint=options).fit(Toy(), toy.loader())
    s3_place.client.delete_object(Bucket=s3_place.bucket, Key="run/last.ckpt/manifest.json")
    model_checkpoint.forget_listing(f"{s3_place.url}/last.ckpt")
    with pytest.raises(CheckpointNotFoundError, match="newest complete checkpoint beside it is s3://.*epoch=1.ckpt"):
        toy.trainer(lightning, s3_place.url, checkpoint=options).fit(Toy(), toy.loader(), ckpt_path="last")
    plugins = [ShardedCheckpointIO(resume="latest")]
    run = toy.trainer(lightning, s3_place.url, checkpoint=options, plugins=plugins)
    run.fit(Toy(), toy.loader(), ckpt_path="last")
    assert run.ckpt_path == f"{s3_place.url}/epoch=1.ckpt/manifest.json"
    assert "last.ckpt is not complete" in caplog.text


def test_exceptions_leave_a_checkpoint_in_the_bucket(s3_place: Any, lightning: Any, Toy: Any) -> None:
    """``OnExceptionCheckpoint`` on S3 resumes: a prefix has no date of its own, and Lightning asks for it."""

    class Raising(lightning.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 12:
                raise ZeroDivisionError

    def run(*callbacks: Any) -> Any:
        on_exception = lightning.callbacks.OnExceptionCheckpoint(s3_place.url)
        return toy.trainer(lightning, s3_place.url, callbacks=[on_exception, *callbacks])

    with pytest.raises(ZeroDivisionError):
        run(Raising()).fit(Toy(), toy.loader())
    assert checkpoints(s3_place) == {"on_exception.ckpt"}
    again = run()
    again.fit(Toy(), toy.loader())
    assert again.global_step == 24
    assert checkpoints(s3_place) == set()


@pytest.mark.parametrize("fault", ["403", "503", "reset"])
def test_never_from_scratch(
    s3_place: Any, lightning: Any, Toy: Any, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the store cannot be asked for "last" or "best", the run fails, and does not train from the beginning."""
    options = {"filename": "{epoch}", "save_last": True}
    toy.trainer(lightning, s3_place.url, checkpoint=options, max_epochs=1).fit(Toy(), toy.loader())
    before = checkpoints(s3_place)
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(connection, "RETRIES", 0)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with Proxy(s3_place.storage_options["client_kwargs"]["endpoint_url"], lambda *_: fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        given = {**s3_place.storage_options, "client_kwargs": {"endpoint_url": proxy.endpoint}}
        for path in ("last", f"{s3_place.url}/last.ckpt"):
            plugin = ShardedCheckpointIO(storage_options=given)
            run = toy.trainer(lightning, s3_place.url, checkpoint=options, plugins=[plugin], max_epochs=2)
            with pytest.raises((OSError, shardckpt.ShardckptError)):
                run.fit(Toy(), toy.loader(), ckpt_path=path)
            assert run.global_step == 0
    assert checkpoints(s3_place) == before


def test_many_objects_are_removed_by_few_requests(s3_place: Any, lightning: Any, Toy: Any) -> None:
    """What top-k retention no longer wants goes by DeleteObjects, however many ranks saved it, its manifest first."""
    options = {"filename": "{epoch}"}
    run = toy.trainer(lightning, s3_place.url, checkpoint=options, max_epochs=1)
    run.fit(Toy(), toy.loader())
    for rank in range(1, 200):  # as if so many had saved
        key = f"run/epoch=0.ckpt/{filenames.shard_name(rank, 'aaaaaaaaaaaaaa1')}"
        s3_place.client.put_object(Bucket=s3_place.bucket, Key=key, Body=b"x")
    lines: list[str] = []

    def noting(line: str, headers: dict[str, str]) -> None:
        if line.startswith("DELETE") or "?delete" in line:
            lines.append(line)

    with Proxy(s3_place.storage_options["client_kwargs"]["endpoint_url"], noting) as proxy:
        given = {**s3_place.storage_options, "client_kwargs": {"endpoint_url": proxy.endpoint}}
        ShardedCheckpointIO(storage_options=given).remove_checkpoint(f"{s3_place.url}/epoch=0.ckpt")
    assert 2 <= len(lines) <= 4
    assert s3_place.client.list_objects_v2(Bucket=s3_place.bucket, Prefix="run/epoch=0.ckpt/")["KeyCount"] == 0


def test_links_are_refused_by_lightning(s3_place: Any, lightning: Any, Toy: Any) -> None:
    """An object store has no links, and stock Lightning says so before training starts."""
    with pytest.raises(ValueError, match="only supported for local"):
        toy.trainer(lightning, s3_place.url, checkpoint={"save_last": "link"}).fit(Toy(), toy.loader())


def test_options_of_the_plugin_and_of_the_call(
    s3_place: Any, lightning: Any, Toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``storage_options`` work on the plugin, and per call through ``Trainer.save_checkpoint``, for removal too."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "wrong")
    run = toy.trainer(lightning, s3_place.url, plugins=[ShardedCheckpointIO()], max_epochs=1)
    run.fit(Toy(), toy.loader())
    run.save_checkpoint(f"{s3_place.url}/call.ckpt", storage_options=s3_place.storage_options)
    assert checkpoints(s3_place) == {"call.ckpt"}
    run.strategy.remove_checkpoint(f"{s3_place.url}/call.ckpt")
    assert checkpoints(s3_place) == set()
    io = ShardedCheckpointIO(storage_options=s3_place.storage_options)
    io.save_checkpoint({"a": 1}, f"{s3_place.url}/plugin.ckpt")
    assert io.load_checkpoint(f"{s3_place.url}/plugin.ckpt") == {"a": 1}


def test_an_ordinary_object_loads(s3_place: Any, lightning: Any, Toy: Any) -> None:
    """A ``.ckpt`` object that stock Lightning wrote to the bucket resumes with the plugin."""
    stock = toy.trainer(lightning, s3_place.url, checkpoint={"filename": "old"}, plugins=[], max_epochs=1)
    stock.fit(Toy(), toy.loader())
    run = toy.trainer(lightning, s3_place.url, max_epochs=2)
    run.fit(Toy(), toy.loader(), ckpt_path=f"{s3_place.url}/old.ckpt")
    assert run.global_step == 24
