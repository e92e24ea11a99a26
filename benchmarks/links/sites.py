"""A bilevel solver of two sites, for one of the ranks, that tells what its steps took."""

import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from clapping_ds import bilevel
from clapping_ds.bilevel import Directions, Losses, Plan, RankGossip, Sparkle
from clapping_ds.codecs import Eden, Raw

NUM_SAMPLES, WIDTH, NUM_CLASSES = 8192, 256, 10


class Timed:
    """Central differences, and how long they took."""

    def __init__(self) -> None:
        self.differences = bilevel.CentralDifference()
        self.find_s = 0.0

    def __repr__(self) -> str:
        """By which ranks compare what they were given."""
        return f"Timed({self.differences})"

    def start(self, y: torch.Tensor) -> torch.Tensor:
        return self.differences.start(y)

    def find(self, *given: Any) -> Directions:
        start = time.perf_counter()
        found = self.differences.find(*given)
        self.find_s = time.perf_counter() - start
        return found


class Sites:
    """The weights of training samples (x) by which a network (y) is good at others."""

    def __init__(self, strategy: str, codec: str) -> None:
        torch.manual_seed(dist.get_rank())
        images, held_out = torch.randn(2, NUM_SAMPLES, WIDTH)
        labels, expected = torch.randint(NUM_CLASSES, (2, NUM_SAMPLES))
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, NUM_CLASSES))
        y, classify = bilevel.flatten(network)
        self.losses = Losses(
            lambda x, y: F.cross_entropy(classify(y, held_out), expected),
            lambda x, y: (
                x.sigmoid() * F.cross_entropy(classify(y, images), labels, reduction="none")
            ).mean(),
        )
        self.curvature = Timed()
        gossip = RankGossip(
            bilevel.full(2), Raw() if codec == "none" else Eden.model_validate({"name": codec})
        )
        plan = Plan.model_validate(
            {**dict.fromkeys("xyz", strategy), "x_step": 0.1, "y_step": 0.01, "z_step": 0.01}
        )
        self.solver = Sparkle(gossip, torch.zeros(NUM_SAMPLES), y, plan, self.curvature)

    def step(self) -> dict[str, Any]:
        """num_bytes: that this site sent; find_s: what its directions took."""
        (site,) = self.solver.gossip.sites
        before = site.bytes_sent
        dist.barrier()
        start = time.perf_counter()
        self.solver.step(self.losses)
        step_s = time.perf_counter() - start
        return {"step_s": step_s, "find_s": self.curvature.find_s, "num_bytes": site.bytes_sent - before}
