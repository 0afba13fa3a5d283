"""Collectives of ours in a background thread would cross those of training, and hang a job: there are none."""

import pytest

import ranks
from multirank import collective_cases as cases

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("layout", ("ddp", "fsdp2", "tensor parallel"))
def test_all_collectives_run_in_the_main_thread(tmp_path, layout):
    """Saves beside training, prepared, with and without overlap, shared shards, and shared reads: all there."""
    for found in ranks.world(2).run(cases.training_beside_saves, str(tmp_path), layout):
        assert {thread for _, thread in found["seen"]} == {"MainThread"}
        names = {name for name, _ in found["seen"]}
        # Training's, and those of the exchange.
        assert {"ProcessGroup.allreduce", "distributed.all_reduce"} <= names
        assert {"distributed.isend", "distributed.irecv"} <= names
        assert found["received"] > 0


def test_the_recorder_sees_threads():
    """Were there a collective in a thread, in whichever way it is called, the test above would fail."""
    for seen in ranks.world(2).run(cases.in_a_thread):
        assert {name.partition(".")[0] for name, thread in seen if thread == "bad"} == {
            *("distributed", "_functional_collectives", "ProcessGroup")
        }
