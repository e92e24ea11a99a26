"""Resident memory of a long run is flat.

    python -m tests.commands.soak --steps 5000

trains a small pipeline of two stages and prints each rank's resident memory on the way, for ours and for
stock DeepSpeed.
"""

import argparse
from pathlib import Path
from typing import Any

from tests import models
from tests.cluster import Cluster
from tests.commands.stress import BLOCK


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def run(block: dict[str, Any] | None, steps: int) -> list[tuple[int, float]]:
    """(step, MiB) at step 100 and ten times after it."""
    engine = models.make_engine(block, stock=block is None)
    data = models.batches(length=16)
    found = []
    for step in range(1, steps + 1):
        engine.train_batch(data_iter=data)
        if step == 100 or step % (steps // 10) == 0:
            found.append((step, resident_mib()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    options = parser.parse_args()
    for name, block in (("stock", None), ("ours", BLOCK)):
        ranks = Cluster(2, timeout_s=3600)
        for rank, found in enumerate(ranks.run(run, block, options.steps)):
            print(name, f"rank {rank}:", ", ".join(f"step {step} {mib:.1f} MiB" for step, mib in found))
        ranks.close()


if __name__ == "__main__":
    main()
