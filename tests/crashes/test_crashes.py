"""Whoever is killed, at whatever point: the last committed checkpoint loads, and nothing else passes for one.

Set ``SHARDCKPT_EVERY_CRASH=1`` for every point, which takes minutes; otherwise a part is tried, always the same.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ranks
from crashes import worlds
from crashes.scenarios import SCENARIOS
from crashes.worlds import Point

pytestmark = pytest.mark.multiprocess

SAMPLE = None if os.environ.get("SHARDCKPT_EVERY_CRASH") else 5
"""Points of each scenario and kind of death; None for all of them."""


class Server:
    def __init__(self, root: Path) -> None:
        context = ranks.context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=worlds.serve, args=(theirs, str(root)), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, call: str, *arguments: Any) -> Any:
        self._pipe.send((call, arguments))
        failed, answer = self._pipe.recv()
        assert failed is None, failed
        return answer

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(5)
        self._process.kill()
        self._process.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("crashes"))
    yield started
    started.stop()


@pytest.mark.timeout(1800 if SAMPLE is None else 180)
@pytest.mark.parametrize("death", ["one", "all", "power"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_no_death_loses_or_invents_a_checkpoint(name: str, death: worlds.Death, server: Server) -> None:
    """SIGKILL of one rank, of all at once, or a loss of power, before each call that matters and amid each write."""
    numbers = [len(seen) for seen in server.ask("count", name)]
    points = [Point(rank, one, death) for rank, last in enumerate(numbers) for one in range(1, last + 1)]
    stride = 1 if SAMPLE is None else max(1, len(points) // SAMPLE)
    # First, so that all is lost that was not made to last: when the calls have returned, what they promised must be.
    after = [Point(0, worlds.NEVER, death)] if death == "power" else []
    wrong = server.ask("crash", name, after + points[stride // 2 :: stride])
    assert not wrong, "\n".join(wrong)
