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
        "module 'torch' has no attribute 'float4_e2m1fn_x2'": "a dtype of torch 2.8",
        "dtype 'float8_e8m0fnu', which torch 2.6": "a dtype of torch 2.7, refused as it should be",
        "module 'torch.optim' has no attribute 'Muon'": "an optimizer of torch 2.9",
        "KeyError: 'decoupled_weight_decay'": "an option of Adam's in newer torch",
        "unexpected keyword argument 'init_sync'": "an option of DDP's in newer torch",
        "'botocore.exceptions.UnknownTokenProviderError'": "a class of newer botocore, known to us by its name",
    }


def pytest_configure(config: pytest.Config) -> None:
    """Let warnings pass that torch 2.6 gives for what the tests themselves have it do."""
    if CANNOT:
        config.addinivalue_line("filterwarnings", "ignore:torch.distributed is unavailable or uninit:UserWarning")
        config.addinivalue_line("filterwarnings", r"ignore:The epoch parameter in .scheduler.step:UserWarning")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Have a test be skipped whose failure has such words in it, of whichever process."""
    report = yield
    if report.failed:
        for words, reason in CANNOT.items():
            if words in report.longreprtext.replace("\\'", "'"):
                report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1], reason)
    return report
