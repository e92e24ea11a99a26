"""A run that is killed again and again, each time at a random moment, ends as if it never had been.

    python -m tests.commands.killed --kills 20

trains a pipeline of two stages for 60 steps with a checkpoint every third, with a pool of mini-batches and
memories on disk, once in peace and once for each rank with SIGKILL at random moments. After each kill the
other rank must end by itself; then both start again from `latest`. Every loss that any of the runs wrote
must be that of the run in peace.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

STEPS = 60
SAVE_INTERVAL = 3
TIMEOUT_S = 10.0
LONGEST_S = 600.0
BLOCK = {
    "strategy": "fc", "lazy": {"pool": 2, "refresh": "slot"}, "timeout_s": TIMEOUT_S,
    "activations": {"delta": "int2"}, "gradients": {"delta": "eden2"},
}  # fmt: skip
MEMORIES = "memories"
"""The folder, in that of the run, that memories are in files of."""


def train(folder: Path) -> None:
    """One rank of the run: goes on from the last checkpoint, and appends each step's loss to a file."""
    from launch.pretrain_gpt import start_distributed
    from tests import models

    start_distributed()
    (folder / MEMORIES).mkdir(exist_ok=True)
    memory = {"device": "disk", "folder": str(folder / MEMORIES)}
    engine = models.make_engine({**BLOCK, "memory": memory})
    if (folder / "latest").exists():
        engine.load_checkpoint(str(folder))
    data = islice(models.batches(), engine.clapping_num_drawn, None)
    with (folder / f"losses_{engine.global_rank}").open("a") as losses:
        while engine.global_steps < STEPS:
            loss = float(engine.train_batch(data_iter=data))
            print(engine.global_steps, loss.hex(), file=losses, flush=True)
            if engine.global_steps % SAVE_INTERVAL == 0:
                engine.save_checkpoint(str(folder))


class Run:
    """Both ranks, started once."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "tests.commands.killed", "--train", str(folder)]
        self.folder = folder
        self.ranks = [
            subprocess.Popen(
                command,
                env={
                    **os.environ,
                    **common,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "OMP_NUM_THREADS": "1",
                },
                stdout=subprocess.DEVNULL,
                stderr=(folder / f"errors_{rank}").open("a"),
            )
            for rank in range(2)
        ]

    def wait(self) -> list[int]:
        """Exit statuses. Raises TimeoutExpired when a rank hangs."""
        deadline = time.monotonic() + LONGEST_S
        return [rank.wait(max(0.1, deadline - time.monotonic())) for rank in self.ranks]

    def kill(self, victim: int, generator: random.Random) -> float:
        """Some steps after the start, anywhere in a step or a checkpoint; seconds until the other ended."""
        last = len(losses(self.folder, victim)) + generator.randrange(1, 9)
        while len(losses(self.folder, victim)) < last and self.ranks[victim].poll() is None:
            time.sleep(0.001)
        time.sleep(generator.random() * 0.1)
        self.ranks[victim].send_signal(signal.SIGKILL)
        start = time.monotonic()
        self.wait()
        return time.monotonic() - start


def losses(folder: Path, rank: int) -> list[tuple[int, str]]:
    """(step, loss) as they were written, repeated steps included."""
    file = folder / f"losses_{rank}"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(int(line.split()[0]), line.split()[1]) for line in lines if len(line.split()) == 2]


def check(folder: Path, kills: int, seed: int = 0, victims: Sequence[int] = (0, 1)) -> list[str]:
    """What happened, in lines. Raises AssertionError where a loss differs."""
    peace = folder / "peace"
    peace.mkdir()
    assert Run(peace).wait() == [0, 0]
    expected = dict(losses(peace, 0))
    assert sorted(expected) == list(range(1, STEPS + 1))
    report = []
    for victim in victims:
        generator = random.Random(seed + victim)
        war = folder / f"war_{victim}"
        war.mkdir()
        ended_s = [Run(war).kill(victim, generator) for _ in range(kills)]
        assert Run(war).wait() == [0, 0]
        for rank in range(2):
            found = losses(war, rank)
            assert found[-1][0] == STEPS
            assert all(expected[step] == loss for step, loss in found)
        assert max(ended_s) < TIMEOUT_S * 2
        assert not list((war / MEMORIES).iterdir())
        report.append(
            f"rank {victim} killed {kills} times: {len(losses(war, 0))} losses written, all equal; "
            f"the other rank ended within {max(ended_s):.1f} s"
        )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=Path, default=None, help="what the ranks are started with")
    options = parser.parse_args()
    if options.train is not None:
        train(options.train)
        return
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(check(Path(folder), options.kills, options.seed)))


if __name__ == "__main__":
    main()
