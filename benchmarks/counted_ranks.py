"""experiment_accelerate/train.py, which also counts the micro-batches of rank 0. Run by scaling.py.

The count is written to the file micro_batches in --log-dir.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiment_accelerate"))

import train  # noqa: E402
import tyro  # noqa: E402
from ranks import Ranks, process_group  # noqa: E402

micro_batches = Ranks.micro_batches
counts = []


def counted(self, *arguments) -> list:
    share = micro_batches(self, *arguments)
    counts.append(len(share))
    if self.is_first:
        (Path(config.log_dir) / "micro_batches").write_text(str(sum(counts)))
    return share


Ranks.micro_batches = counted
config = tyro.cli(train.Config)
with process_group():
    train.main(config)
