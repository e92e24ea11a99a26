"""Exchanges of gradients in which every rank is a replica."""

import time
from collections.abc import Sequence
from math import inf, isfinite
from typing import NamedTuple

import torch

from clapping_ds.config import DataParallelConfig
from clapping_ds.doctor.steps import find_error
from clapping_ds.doctor.visit import Check, Finding, Visit, fail, ok, skip
from clapping_ds.gradients.exchange import Exchange
from clapping_ds.gradients.layout import Parameter
from clapping_ds.link.collective import make_collective
from clapping_ds.link.verification import checksum

SHAPES = (torch.Size((512, 256)), torch.Size((64, 4, 128)), torch.Size((256,)))
NUM_STEPS = 2


class Exchanged(NamedTuple):
    """What one rank is left with."""

    checksums: tuple[int, ...]
    """Of all means."""
    error: float
    """Of the last step's, relative."""
    took_s: float


def check_replicas(visit: Visit) -> Finding:
    """With the block's `data_parallel`, or its defaults; all ranks on one level. Facts: `Exchanged`."""
    if visit.is_alone:
        return skip("one rank has no replica")
    given = None if visit.config is None else visit.config.data_parallel
    plan = (given or DataParallelConfig()).model_copy(update={"node_size": None})
    everyone = tuple(range(visit.launch.world_size))
    collective = make_collective([everyone], visit.device, max(1.0, visit.timeout_s), "replicas")
    parameters = [Parameter(f"weight {number}", shape) for number, shape in enumerate(SHAPES)]
    exchange = Exchange(plan, parameters, collective)
    checksums, error, took_s = [], inf, 0.0
    for step in range(NUM_STEPS):
        drawn = [_draw(step, replica) for replica in everyone]
        exact = [sum(of[1:], of[0]) / len(of) for of in zip(*drawn, strict=True)]
        mine = {number: value.to(visit.device) for number, value in enumerate(drawn[visit.launch.rank])}
        start_s = time.perf_counter()
        exchange.begin_step(step)
        exchange.start(mine).finish()
        exchange.end_step()
        means = [mine[number].cpu() for number in mine]
        took_s = time.perf_counter() - start_s
        checksums += [checksum(mean) for mean in means]
        error = find_error(*(torch.cat([each.flatten() for each in of]) for of in (means, exact)))
    return ok("", Exchanged(tuple(checksums), error, took_s))


def compare_replicas(facts: Sequence[Exchanged | None]) -> Finding | None:
    """All replicas hold the same bits."""
    told = [of_rank for of_rank in facts if of_rank is not None]
    if not told:
        return None
    if len({of_rank.checksums for of_rank in told}) > 1:
        return fail("replicas hold different means of the same gradients", "please report it")
    error, took_s = max(of_rank.error for of_rank in told), max(of_rank.took_s for of_rank in told)
    if not isfinite(error):
        return fail("the mean of finite gradients is not finite", "please report it")
    return ok(
        f"{len(facts)} replicas, {NUM_STEPS} exchanges of gradients: means equal on all, error {error:.3f}, "
        f"{took_s * 1e3:.1f} ms"
    )


def _draw(step: int, replica: int) -> list[torch.Tensor]:
    """A replica's gradients: what all have alike, and noise."""
    shared = torch.Generator().manual_seed(step)
    own = torch.Generator().manual_seed(1000 * (step + 1) + replica)
    return [torch.randn(each, generator=shared) + torch.randn(each, generator=own) for each in SHAPES]


REPLICAS = Check("replicas", check_replicas, after=("groups",), compare=compare_replicas)
