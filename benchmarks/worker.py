"""One rank of a job of a suite; `benchmarks.__main__` starts it under torchrun.

python -m benchmarks.worker OPTIONS ARGUMENTS RESULT
"""

import datetime
import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.bench import Bench, device
from benchmarks.options import Options
from benchmarks.suites import suite


def main() -> None:
    options, arguments, result = Options.of_text(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    warnings.filterwarnings("ignore", module=r"torch\..*")  # dcp's, of its own deprecated parts
    logging.getLogger("torch").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(minutes=10)
    )
    torch.serialization.set_crc32_options(compute_crc32=False)  # slows torch.save and DCP, as their documentation says
    bench = Bench(options)
    suite(options.suite).work(bench, **arguments)
    if bench.rank == 0:
        found = {"measurements": [asdict(one) for one in bench.measured], "skipped": bench.skipped}
        result.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
