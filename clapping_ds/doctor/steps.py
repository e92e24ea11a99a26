"""Training steps of a pipeline in which every rank is a stage; a rank that is alone starts two for it."""

import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
from torch import multiprocessing

from clapping_ds.autotune.depth import find_leads, order_work
from clapping_ds.doctor.ranks import GROUPS, RANKS, make_endpoints
from clapping_ds.doctor.visit import Check, Finding, Launch, Status, Visit, fail, ok, run_checks
from clapping_ds.link.groups import end_groups
from clapping_ds.link.message import Spec
from clapping_ds.link.verification import checksum
from clapping_ds.stage.endpoint import (
    ACTIVATIONS_FROM_PREVIOUS,
    ACTIVATIONS_TO_NEXT,
    GRADIENTS_FROM_NEXT,
    GRADIENTS_TO_PREVIOUS,
    End,
    Endpoint,
)
from clapping_ds.stage.endpoints import Endpoints

LOOPBACK, LOOPBACK_ADDRESS = "lo", "127.0.0.1"
START_S = 30.0
"""For two processes to start."""

KEY_DELTA: Mapping[str, Any] = {
    "in_flight": 1,
    "strategy": "key_delta",
    "activations": {"key": "int8", "delta": "eden4"},
    "gradients": {"key": "int8", "delta": "eden4"},
    "lazy": {"p_new": 0.5, "refresh": "cycle"},
}
BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "direct": {},
    "key_delta": KEY_DELTA,
    "key_delta with verify": {**KEY_DELTA, "verify": True},
}
"""By name, those of the steps that are taken."""
NUM_STEPS = 2
"""In the second one half the slots are reused, and receives are announced from the start."""
NUM_SLOTS = 4
SPEC = Spec(torch.Size((64, 128)), torch.bfloat16)
WAYS = {
    "forward": (ACTIVATIONS_FROM_PREVIOUS, ACTIVATIONS_TO_NEXT),
    "backward": (GRADIENTS_FROM_NEXT, GRADIENTS_TO_PREVIOUS),
}
LARGEST_ERROR = 0.12
"""Relative. Of normal values eden4 leaves 0.098, the root of a Lloyd-Max code's 0.0095; bfloat16 0.002."""


class Held(NamedTuple):
    """What one end of a channel is left with."""

    block: str
    link: int
    direction: str
    sends: bool
    checksums: tuple[int, ...]


def check_steps(visit: Visit) -> Finding:
    """Steps of a pipeline of all ranks, with each of `BLOCKS`. Facts: (what ends hold, largest error)."""
    if visit.is_alone:
        return _spawn_two(visit.timeout_s)
    held, errors = [], []
    for name, block in BLOCKS.items():
        endpoints = make_endpoints(visit, block)
        errors += [take_step(endpoints, visit, step) for step in range(NUM_STEPS)]
        held += list(list_held(name, endpoints.stages[0]))
    return ok("", (held, max(errors)))


def compare_steps(facts: Sequence[tuple[Sequence[Held], float] | None]) -> Finding | None:
    """Both ends of every channel hold the same, and what arrived is close to what was sent."""
    told = [of_rank for of_rank in facts if of_rank is not None]
    if not told:
        return None
    ends: dict[tuple[str, int, str], set[tuple[int, ...]]] = {}
    for end in (end for held, _ in told for end in held):
        ends.setdefault(end[:3], set()).add(end.checksums)
    error = max(error for _, error in told)
    differing = [f"{name}, link {link}-{link + 1}, {direction}"
                 for (name, link, direction), found in ends.items() if len(found) > 1]  # fmt: skip
    if differing:
        return fail(f"the ends hold different memories: {'; '.join(differing)}", "please report it")
    if error > LARGEST_ERROR:
        return fail(f"what arrived is off by {error:.3g}, relative", f"expected: below {LARGEST_ERROR}")
    return ok(
        f"{len(facts)} stages, {NUM_STEPS} steps each of {', '.join(BLOCKS)}: memories equal at "
        f"both ends, largest error {error:.3f}"
    )


def take_step(endpoints: Endpoints, visit: Visit, step: int) -> float:
    """In DeepSpeed's order of work. The largest relative error of what arrived."""
    (stage,) = endpoints.stages
    endpoints.begin_step(NUM_SLOTS, [None])
    sizes = NUM_SLOTS, visit.launch.world_size, stage.stage_id, stage.in_flight
    stage.leads = find_leads(*sizes)
    for end in stage.leads if step > 0 else ():
        if end in stage.channels:
            stage.look_ahead(end, [SPEC])
    arrived = []
    for kind, slot in order_work(*sizes):
        receives, sends = WAYS[kind]
        if receives in stage.channels:
            (value,) = stage.receive(receives, [SPEC])
            arrived.append((value, _make_value(receives, stage.stage_id, step, slot)))
        if sends in stage.channels:
            stage.send(sends, [_make_value(sends, stage.stage_id, step, slot).to(visit.device)])
    endpoints.end_step()
    return max(find_error(value, sent) for value, sent in arrived)


def _make_value(end: End, stage_id: int, step: int, slot: int) -> torch.Tensor:
    """What is sent on a link in a slot: in the next step a little different."""
    number = 2 * end.link(stage_id) + (end.direction == "gradients")
    sample, change = (
        torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(seed))
        for seed in (number * NUM_SLOTS + slot, (1 << 32) + step)
    )
    return (sample + 0.1 * step * change).to(SPEC.dtype)


def find_error(value: torch.Tensor, sent: torch.Tensor) -> float:
    """Relative; infinite where it is no number, which `max` would pass over."""
    error = float((value.cpu().float() - sent.float()).norm() / sent.float().norm())
    return error if isfinite(error) else inf


def list_held(name: str, stage: Endpoint) -> Iterable[Held]:
    for end, channel in stage.channels.items():
        held = [
            channel.held[slot][index] for slot in sorted(channel.held) for index in sorted(channel.held[slot])
        ]
        checksums = tuple(checksum(each.memory) for each in held if each.memory is not None)
        yield Held(name, end.link(stage.stage_id), end.direction, end.sends, checksums)


# Two ranks of one that is alone


def _spawn_two(timeout_s: float) -> Finding:
    """The same on two CPU ranks, which are started for it."""
    with socket.socket() as free:
        free.bind((LOOPBACK_ADDRESS, 0))
        port = free.getsockname()[1]
    told = multiprocessing.get_context("spawn").SimpleQueue()
    started = multiprocessing.spawn(_run_spawned, (port, timeout_s, told), nprocs=2, join=False)
    deadline_s = time.monotonic() + START_S + timeout_s
    while not started.join(timeout=1.0):
        if time.monotonic() > deadline_s:
            for process in started.processes:
                process.kill()
            return fail("two CPU ranks that were started here did not end", "see what they printed")
    return told.get()._replace(facts=None)


def _run_spawned(number: int, port: int, timeout_s: float, told: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    visit = Visit(Launch(number, number, 2, LOOPBACK_ADDRESS, port), timeout_s)
    run_checks((RANKS, GROUPS, STEPS), visit, lambda line: None)
    if number == 0:
        worst = max(visit.findings.values(), key=lambda finding: finding.status)
        last = visit.findings.get(STEPS.name, worst)
        told.put(worst if worst.status is Status.FAIL else last._replace(text=f"on CPU ranks: {last.text}"))
    visit.board.leave()
    end_groups()


STEPS = Check("steps", check_steps, after=("groups",), compare=compare_steps)
