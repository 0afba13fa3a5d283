"""What older releases that the package works with cannot do: tests that meet that are skipped, and say so."""

from collections.abc import Generator

import pytest
import torch

CANNOT: dict[str, str] = {}
"""Why, by the words in which the release itself fails; nothing for the newest, whose every failure is one."""
if torch.__version__ < "2.7":
    CANNOT = {
        "'Stream' object has no attribute 'record_event'": "FSDP2 of torch 2.6 does not run on a CPU",
        "_StridedShard currently only allows even sharding": "torch 2.6 cuts strided shards evenly, or not at all",
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Have a test be skipped whose failure has such words in it, of whichever process."""
    report = yield
    if report.failed:
        for words, reason in CANNOT.items():
            if words in report.longreprtext:
                report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1], reason)
    return report
