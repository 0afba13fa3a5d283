"""What the tests of the Lightning adapter share."""

import sys
from pathlib import Path
from typing import Any

import pytest

# The helpers beside this file are for scripts too, which have their own folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

import toy

from shardckpt import commit
from shardckpt.errors import StorageError


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.lightning)
            # Lightning warns about CPUs, workers and folders, none of which is under test.
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::FutureWarning"))


@pytest.fixture(scope="session")
def lightning() -> Any:
    pytest.importorskip("lightning")
    return toy.package("lightning.pytorch")


@pytest.fixture(scope="session")
def Toy(lightning: Any) -> Any:  # noqa: N802 - it is a class
    return toy.module_class(lightning)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commits to a path that holds one of these names fail, as on a full disk."""
    names: list[str] = []
    publish = commit.publish

    def refusing(storage: Any, *args: Any) -> None:
        if any(name in storage.url for name in names):
            raise StorageError(f"no room for {storage.url}")
        publish(storage, *args)

    monkeypatch.setattr(commit, "publish", refusing)
    return names
