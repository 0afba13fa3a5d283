"""Saves and restores with real gloo processes, on 1 to 4 ranks."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import ranks
from multirank import cases

pytestmark = pytest.mark.multiprocess

SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[str, str]]:
    """One DDP checkpoint per world size, with the digest of what was saved."""
    root = tmp_path_factory.mktemp("written")
    found = {}
    for size in SIZES:
        path = str(root / f"by-{size}")
        results = ranks.world(size).run(cases.save_ddp, path, "save" if size % 2 else "async")
        assert len({result["digest"] for result in results}) == 1
        found[size] = (path, results[0]["digest"])
    return found


def test_processes_are_as_users_have_them(monkeypatch):
    """Ranks of one world order sets each in its own way, and processes have the environment of when they start."""
    hashes = [found for found, _ in ranks.world(ranks.SPAWNED).run(cases.surroundings, "")]
    assert len(set(hashes)) == ranks.SPAWNED
    for value in ("first", None):
        monkeypatch.delenv("SHARDCKPT_TEST", raising=False)
        if value is not None:
            monkeypatch.setenv("SHARDCKPT_TEST", value)
        alone = ranks.World(1)
        try:
            assert alone.run(cases.surroundings, "SHARDCKPT_TEST")[0][1] == value
        finally:
            alone.stop()


@pytest.mark.parametrize("target", SIZES)
@pytest.mark.parametrize("source", SIZES)
def test_any_world_size_restores_any_other_bitwise(written, source, target):
    """A job resumes on the machines it gets: every rank has every bit, in the live tensors."""
    path, digest = written[source]
    for result in ranks.world(target).run(cases.load_ddp, path):
        assert result["digest"] == digest
        assert result["rank_value"] == 0
        assert result["world_size"] == source


@pytest.mark.parametrize("size", (2, 4))
def test_every_rank_writes_an_even_part(tmp_path, size):
    """Replicated data is written once, split inside a big tensor too, to the mean plus 1 MiB."""
    results = ranks.world(size).run(cases.save_big_replicated, str(tmp_path / "ck"), 16)
    mean = sum(result["rank_nbytes"] for result in results) / size
    assert results[0]["nbytes"] == sum(result["rank_nbytes"] for result in results)
    assert results[0]["nbytes"] < (16 << 20) + size * (64 << 10)
    assert max(result["rank_nbytes"] for result in results) <= mean + (1 << 20)


def test_zstd_restores_on_another_world_size(tmp_path):
    """Compression in frames changes nothing about who may read what."""
    path = str(tmp_path / "ck")
    digest = ranks.world(3).run(cases.save_ddp, path, "save", compression=("zstd", 3))[0]["digest"]
    assert {result["digest"] for result in ranks.world(2).run(cases.load_ddp, path)} == {digest}


def test_shards_open_with_stock_safetensors(written):
    """A user without us can still get at the bytes."""
    path, _ = written[2]
    keys = set()
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - a safe_open is no dict
                assert key not in keys
                keys.add(key)
                shard.get_tensor(key)
    names = set(json.loads(Path(path, "manifest.json").read_bytes())["tensors"])
    assert {key.partition("[")[0] for key in keys} == names


@pytest.mark.parametrize("source", (2, 4))
def test_fsdp2_shard0_restores_anywhere(tmp_path, source):
    """Rows sharded by fully_shard come back on another mesh, and on one process without any."""
    path = str(tmp_path / "ck")
    digest = ranks.world(source).run(cases.save_fsdp, path)[0]
    for target in (2, 3):
        assert set(ranks.world(target).run(cases.load_fsdp, path)) == {digest}
    assert ranks.world(1).run(cases.load_plain, path) == [digest]
    assert set(ranks.world(2).run(cases.load_plain, path, 2)) == {digest}


def test_ddp_restores_into_fsdp2(tmp_path, written):
    """Names are the same whichever wrapper was around the model."""
    path, digest = written[3]
    assert digest in {result["digest"] for result in ranks.world(1).run(cases.load_ddp, path)}
    ranks.world(2).run(cases.load_fsdp, path)


@pytest.mark.parametrize("size", (1, 2))
def test_snapshot_is_one_instant(tmp_path, size):
    """What the training loop does after async_save returned is not in the checkpoint."""
    assert all(ranks.world(size).run(cases.snapshot_is_one_instant, str(tmp_path / "ck")))


def test_conflicting_tensors_name_tensor_and_ranks(tmp_path):
    """Ranks that disagree about a tensor's shape are told so, and nothing is written."""
    for failed in ranks.world(2).outcomes(cases.conflicting_shapes, str(tmp_path / "ck")):
        assert failed.kind == "ConflictingStateError"
        assert "'t'" in failed.text
        assert "rank 0" in failed.text
        assert "rank 1" in failed.text
    assert not (tmp_path / "ck").exists()


def test_different_paths_are_told_apart(tmp_path):
    """Ranks that save to different places hear who called what, instead of hanging or mixing checkpoints."""
    for failed in ranks.world(2).outcomes(cases.different_paths, str(tmp_path / "ck")):
        assert failed.kind == "ConflictingStateError"
        assert "ck-0" in failed.text
        assert "ck-1" in failed.text


@pytest.mark.parametrize("caller", (0, 1))
def test_save_on_one_rank_only_is_an_error_not_a_hang(tmp_path, caller):
    """`if rank == 0: save(...)` is the commonest mistake: the message names who was silent, and later calls work."""
    told = ranks.world(2).run(cases.missed_call, str(tmp_path / "ck"), caller)[caller]
    assert f"rank {1 - caller} did not reach save(" in told
    assert "Every rank must make this call" in told


def test_words_of_any_length_cross_the_store(tmp_path):
    """A TCPStore drops the job's own connection at a value past 8 MiB, so long ones go in parts."""
    total = ranks.world(2).run(cases.long_words, str(tmp_path / "ck"))
    assert total[0] == total[1] > 9 << 20


def test_interrupt_while_staging_is_every_ranks_failure(tmp_path):
    """Ctrl-C on one rank leaves no other waiting for the commit timeout."""
    for told in ranks.world(2).run(cases.interrupted, str(tmp_path / "ck")):
        assert "interrupted by KeyboardInterrupt" in told


def test_tied_dtensors_with_an_empty_shard(tmp_path):
    """A rank that holds nothing cannot see that two tensors are tied, and must not undo what the others saw."""
    assert all(ranks.world(2).run(cases.tied_dtensors, str(tmp_path / "ck")))


def test_unserialisable_value_on_one_rank(tmp_path):
    """The rank that has it raises with the path; the others raise the same error and name that rank."""
    first, second = ranks.world(2).outcomes(cases.unserialisable_on_one, str(tmp_path / "ck"))
    assert first.kind == second.kind == "UnserialisableError"
    assert "'odd'" in second.text
    assert "rank 1" in first.text
    assert not (tmp_path / "ck").exists()


@pytest.mark.parametrize("failing", (0, 1))
def test_background_failure_is_every_ranks_and_harms_nothing(tmp_path, failing):
    """A full disk on one rank: every rank gets SaveFailedError, at result() or the next save; the old one survives."""
    for told in ranks.world(2).run(cases.failing_background, str(tmp_path / "ck"), failing):
        assert "no space left" in told["result"]
        assert f"rank {failing}" in told["result"] or told["result"].endswith("no space left on device")
        assert "no space left" in told["next"]
        assert told["survivor"] == [1.0] * 4
        assert told["after"] == [2.0] * 4
        assert len([name for name in told["files"] if name.endswith(".safetensors")]) == 2


def test_second_save_waits_for_the_first(tmp_path):
    """At most one save is in flight, and both are committed."""
    assert all(ranks.world(2).run(cases.in_flight, str(tmp_path)))


def test_mismatch_on_one_rank_changes_nothing_anywhere(tmp_path):
    """Strict errors come before the first byte, on all ranks."""
    for told in ranks.world(2).run(cases.mismatch_on_one_rank, str(tmp_path / "ck")):
        message, total = told
        assert "b: shape (5,) here, (4,) in the checkpoint" in message
        assert total == 0.0


def test_missing_checkpoint_is_missing_on_every_rank(tmp_path):
    """Rank 0 looks, and every rank raises."""
    for message in ranks.world(2).run(cases.missing_on_load, str(tmp_path / "none")):
        assert "nothing is there" in message


def test_stages_keep_the_options_of_their_param_groups(tmp_path):
    """A stage's learning rate or weight decay is its own: never that of what rank 0 has in the group so numbered."""
    told = ranks.world(3).run(cases.options_of_stages, str(tmp_path / "ck"))
    for rank, groups in enumerate(told):
        decayed = (1.0 + rank, 7, [f"decayed{rank}.weight", f"decayed{rank}.bias"])
        plain = (1.0 + rank, 5, [f"plain{rank}.weight", f"plain{rank}.bias"])
        assert groups == ([plain, decayed] if rank % 2 else [decayed, plain])


def test_pipeline_stages_are_one_checkpoint(tmp_path):
    """A rank that lacks a tensor is legal: containers of all ranks are merged, tensors come from their holders."""
    for told in ranks.world(3).run(cases.pipeline, str(tmp_path / "ck")):
        assert told["weights"] == [0.0, 1.0, 2.0]
        assert told["only"] == {"on0": 0, "on1": 1, "on2": 2}


def test_training_collectives_run_beside_saves(tmp_path):
    """No collective of ours runs in the background, so training's can never be crossed."""
    assert all(ranks.world(2).run(cases.beside_training, str(tmp_path / "ck")))


def test_idle_processes_have_no_threads_of_ours(tmp_path):
    """A closed Checkpointer leaves nothing running."""
    assert ranks.world(2).run(cases.threads_left, str(tmp_path / "ck")) == [[], []]


def test_overwriting_leaves_one_checkpoint(tmp_path):
    """Files of what was replaced go once the new manifest is there, and nothing else is left."""
    suffixes = ranks.world(2).run(cases.overwrite, str(tmp_path / "ck"))[0]
    assert suffixes == [".json", ".json", ".json", ".safetensors", ".safetensors"]


def test_equal_state_version_shares_the_shards(tmp_path):
    """`save_last` beside `save_top_k` costs no second write: hard links and a manifest of its own."""
    for told in ranks.world(2).run(cases.alias, str(tmp_path)):
        assert told["aliases"] == [False, True, False]
        assert told["same_inodes"]
        assert told["names"] == ["first", "second"]
        assert told["equal"]
        assert told["third"] == "third"
