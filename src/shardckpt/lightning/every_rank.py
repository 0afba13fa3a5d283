"""A Trainer's checkpoint from every rank: each writes its part, to the path that rank 0 was given."""

from collections.abc import Mapping
from typing import Any

import msgspec

from shardckpt import coordinator
from shardckpt.background import PendingSave
from shardckpt.checkpointer import Checkpointer
from shardckpt.commit import checkpoint_path
from shardckpt.lightning import agreement
from shardckpt.lightning.ordinary import Displaced
from shardckpt.lightning.sharing import Running, Twins
from shardckpt.lightning.snapshot import Layout, layout_of, share_of, split_off


class _Destination(msgspec.Struct):
    """Rank 0's decision, which all ranks follow, since their own metrics may have given another file name."""

    path: str
    layout: Layout


def save(
    engine: Checkpointer,
    checkpoint: Mapping[str, Any],
    path: Any,
    storage_options: Any | None,
    running: Running,
    *,
    displaced: Displaced,
    twins: Twins,
    with_buffers: bool,
    timeout: float,
) -> tuple[str, PendingSave | None]:
    """Save together with all ranks; returns where to, and the save if it goes on beside training.

    ``with_buffers``: ranks other than 0 take part in writing buffers too. ``timeout``, in seconds, is for the decision.
    """
    rank, _ = coordinator.rank_and_world_size()
    state = split_off(checkpoint, running.produced)
    with displaced.making_way() as way:

        def decide() -> _Destination:
            text = checkpoint_path(path)
            way.make(text)
            return _Destination(text, layout_of(state) if running.replicas_agree else {})

        decision = agreement.from_rank_zero("Trainer.save_checkpoint", decide, _Destination, timeout=timeout)
        if rank != 0:
            state = share_of(state, decision.layout, with_buffers=with_buffers)
        version = twins.version(checkpoint, running.position, may_share=running.asynchronous)
        options: dict[str, Any] = {"storage_options": storage_options, "state_version": version}
        if running.asynchronous:
            way.pending = engine.async_save(state, decision.path, **options)
        else:
            engine.save(state, decision.path, **options)
    return decision.path, way.pending
