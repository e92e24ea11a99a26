"""Random pipelines, and what must hold of each."""

import random
from tempfile import gettempdir
from typing import Any

from tests.gpu_model import deepspeed_program, megatron_program, torch_program
from tests.gpu_model.machine import Machine
from tests.gpu_model.program import Case, Steps

PROGRAMS = {"deepspeed": deepspeed_program.run, "torch": torch_program.run, "megatron": megatron_program.run}


REFRESH = 2
"""Messages, of a codec that learns."""


class AllocationError(AssertionError):
    """A step allocated memory that it did not have before."""


def draw_case(number: int) -> Case:
    """The case of a number."""
    draw = random.Random(number)
    host = draw.choice(["deepspeed", "deepspeed", "torch", "megatron"])
    num_stages = draw.choices(range(2, 9), [16, 8, 4, 1, 1, 1, 1])[0]
    num_slots = draw.randint(1, draw.choice([3, 4, 4, 16]))
    case = Case(
        num_stages,
        num_slots,
        host=host,
        num_steps=draw.choices([2, 3, 5], [6, 3, 1])[0],
        block=_draw_block(draw),
    )
    case.syncs = draw.choice([0.0, 0.0, 0.1, 0.5])
    case.has_one_queue = draw.random() < 0.3
    case.backend = draw.choices(["nccl", "gloo"], [9, 1])[0]
    _draw_for_host(draw, case)
    if learns(case):
        case.shape = (64, *case.shape[1:])  # so that a message is smaller than what it is of
    return case


def learns(case: Case) -> bool:
    return LEARNING in case.block["activations"].values()


def _draw_for_host(draw: random.Random, case: Case) -> None:
    if case.host == "deepspeed":
        case.has_static_outputs = draw.random() < 0.3
        case.is_dynamic = draw.random() < 0.1
        case.steps_per_print = draw.choice([0, 0, 0, 2])
        case.block["in_flight"] = draw.choice([0, 1, 2, 3] * 4 + ["auto"])
        if not case.block["overlap"]:
            case.block["in_flight"] = 0
        if case.block["in_flight"] == "auto":
            case.num_steps = 7
        else:
            case.block["in_flight"] = min(case.block["in_flight"], case.num_slots)
    elif case.host == "torch":
        case.schedule = draw.choice(list(torch_program.STAGES_PER_RANK))
        case.num_stages = min(case.num_stages, 4)
        case.num_slots = _round_up(max(case.num_slots, 2 * case.num_stages), 2 * case.num_stages)
    else:
        case.schedule = draw.choice(["", "interleaved", "overlap"])
        case.shape = (4, 1, 64)
        case.num_stages = min(case.num_stages, 6)
        case.frees_outputs = draw.random() < 0.5
        case.is_dynamic = case.block["overlap"] and draw.random() < 0.1
        if case.schedule:
            case.num_slots = _round_up(case.num_slots, case.num_stages)


PLACES = ({}, {"device": "cpu"}, {"device": "disk", "folder": gettempdir()})
LEARNING = {"name": "transform", "bits": 2, "basis": "eigen", "anchors": 4, "refresh": REFRESH}


def _draw_block(draw: random.Random) -> dict[str, Any]:
    overlap = draw.random() < 0.85
    if draw.random() < 0.9:
        return {**_both(codec="none"), "overlap": overlap}
    if draw.random() < 0.2:
        return {**_both(codec=LEARNING, min_numel=16), "overlap": overlap}
    delta = draw.choice(
        [
            {"name": "int8", "group_size": 16},
            {"name": "fp8_e4m3", "group_size": 64},
            {"name": "transform", "bits": 2},
            LEARNING,
        ]
    )
    place = draw.choice(PLACES)
    lazy = {"pool": draw.choice([1, 2]), "p_new": 0.5, "refresh": draw.choice(["step", "slot", "cycle"])}
    return {
        "strategy": "key_delta",
        "lazy": lazy,
        "overlap": overlap,
        "memory": place,
        **_both(key="none", delta=delta, min_numel=16),
    }


def _both(**direction: Any) -> dict[str, Any]:
    return {"activations": direction, "gradients": direction}


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def check(case: Case, seed: int) -> list[Steps]:
    """Runs a case. Raises ModelError for a deadlock, a race, or a wait of the host in a step that has no
    cause for one; AllocationError for one that allocates after the third."""
    machine = Machine(case.num_stages, seed, case.has_one_queue)
    found = PROGRAMS[case.host](machine, case)
    for rank, steps in enumerate(found):
        late = [step for step in _list_late_steps(case, steps) if steps.allocated[step]]
        if late:
            raise AllocationError(f"rank {rank}: steps {late} allocated: {steps.allocated}")
    return found


def _list_late_steps(case: Case, steps: Steps) -> list[int]:
    """From the third after the start or a change, with a codec that learns from its fifth period. (A tossed
    coin may bring the first delta at any time, a user's wait its own tensors.)"""
    if case.syncs or case.block.get("lazy", {}).get("refresh", "cycle") != "cycle":
        return []
    last_change = max(step for step in range(case.num_steps) if not steps.is_steady[step])
    first = 5 * REFRESH // case.num_slots if learns(case) else 0
    return list(range(max(first, last_change) + 3, case.num_steps))
