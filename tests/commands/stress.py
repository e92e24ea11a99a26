"""Delays at random moments on random ranks: nothing may deadlock, change its order or change a loss.

    python -m tests.commands.stress --steps 2000

runs a pipeline of four stages twice, with and without delays, and compares every loss and all memories.
"""

import argparse
import random
import time
from itertools import pairwise
from typing import Any

from tests import models
from tests.cluster import Cluster

IN_FLIGHT = 2
INT2 = {"delta": "int2", "min_numel": 1024}
BLOCK = {
    "strategy": "fc",
    "lazy": {"refresh": "slot"},
    "in_flight": IN_FLIGHT,
    "activations": INT2,
    "gradients": INT2,
}


def run(steps: int, delayed: bool) -> tuple[list[float], Any, int]:
    """Losses, memories and the most payloads that a wire held."""
    engine = models.make_engine(BLOCK, num_stages=4, ds={"gradient_accumulation_steps": 8})
    endpoint = engine._endpoint
    if delayed:
        for name in ("send", "receive"):
            setattr(endpoint, name, _delayed(getattr(endpoint, name), engine._endpoints, engine.global_rank))
    losses = models.train(engine, steps, length=16)
    return losses, models.memories(engine), max(wire.most_payloads for wire in endpoint.wires.values())


def _delayed(call: Any, endpoints: Any, rank: int) -> Any:
    """In every fourth step of a rank, drawn at random, each message waits up to 4 ms."""

    def wrapped(*args: Any, **options: Any) -> Any:
        is_slow = random.Random(endpoints.step * 64 + rank).random() < 0.25
        if is_slow:
            time.sleep(random.random() * 0.004)
        return call(*args, **options)

    return wrapped


def check(ranks: Any, steps: int) -> None:
    """Raises AssertionError, or TimeoutError where a rank hangs."""
    calm, delayed = (ranks.run(run, steps, delays) for delays in (False, True))
    for (losses, memories, _), (delayed_losses, delayed_memories, most_payloads) in zip(
        calm, delayed, strict=True
    ):
        assert losses == delayed_losses
        assert memories == delayed_memories
        assert most_payloads <= IN_FLIGHT + 2
    for (_, one, _), (_, other, _) in pairwise(delayed):
        shared = one.keys() & other.keys()
        assert shared
        assert all(one[channel] == other[channel] for channel in shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    ranks = Cluster(4, timeout_s=3600)
    start = time.perf_counter()
    check(ranks, options.steps)
    print(f"{options.steps} steps, with and without delays: equal. {time.perf_counter() - start:.0f} s")
    ranks.close()


if __name__ == "__main__":
    main()
