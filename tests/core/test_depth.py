"""The order of work, and how deep it runs."""

import random
from collections import Counter, deque
from itertools import product

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

from clapping_ds.autotune.depth import count_warmup, find_hiding_depth, find_leads, order_work
from clapping_ds.hosts.deepspeed.schedule import InFlightSchedule
from clapping_ds.stage.endpoint import ACTIVATIONS_FROM_PREVIOUS, GRADIENTS_FROM_NEXT

SHAPES = [(m, s) for m in (1, 2, 3, 8, 16) for s in (2, 3, 4, 8)]


def passes(schedule):
    instructions = [instruction for step in schedule.steps() for instruction in step]
    return [type(each) for each in instructions if isinstance(each, ForwardPass | BackwardPass)]


@pytest.mark.parametrize(("num_micro_batches", "num_stages"), SHAPES)
def test_depth_zero_is_the_stock_order(num_micro_batches, num_stages):
    for stage in range(num_stages):
        ours = InFlightSchedule(num_micro_batches, num_stages, stage, 0)
        stock = TrainSchedule(num_micro_batches, num_stages, stage)
        assert passes(ours) == passes(stock)


@pytest.mark.parametrize(("num_micro_batches", "num_stages"), SHAPES)
@pytest.mark.parametrize("in_flight", [0, 1, 3, 16])
def test_every_micro_batch_goes_forward_then_backward_in_order(num_micro_batches, num_stages, in_flight):
    for stage in range(num_stages):
        work = list(order_work(num_micro_batches, num_stages, stage, in_flight))
        for kind in ("forward", "backward"):
            assert [number for each, number in work if each == kind] == list(range(num_micro_batches))
        stored = most = 0
        for kind, _ in work:
            stored += 1 if kind == "forward" else -1
            assert stored >= 0
            most = max(most, stored)
        assert most == count_warmup(num_micro_batches, num_stages, stage, in_flight)
        schedule = InFlightSchedule(num_micro_batches, num_stages, stage, in_flight)
        assert schedule.num_pipe_buffers() == max(2, most)


def test_buffers_are_never_taken_twice():
    schedule = InFlightSchedule(16, 4, 1, 2)
    taken = set()
    for step in schedule.steps():
        for instruction in step:
            if isinstance(instruction, ForwardPass):
                assert instruction.buffer_id not in taken
                taken.add(instruction.buffer_id)
            elif isinstance(instruction, BackwardPass):
                taken.remove(instruction.buffer_id)


def test_depth_that_hides_a_link():
    assert find_hiding_depth(1.0, 1.0, [0.0], 0) == 0
    assert find_hiding_depth(1.0, 1.0, [0.01], 0.05) == 0
    assert find_hiding_depth(1.0, 1.0, [0.8], 0) == 1
    assert find_hiding_depth(1.0, 1.0, [2.5], 0) == 3
    assert find_hiding_depth(1.0, 8.0, [16.0], 0) == 1
    assert find_hiding_depth(1.0, 1.0, [0.0, 2.0, 0.0], 0) == 1, "shared with the links beside it"


def test_depth_hides_random_links():
    """As many micro-batches as Little's law asks for, from every stage."""
    generator = random.Random(0)
    for _ in range(200):
        delays_s = [generator.expovariate(1) for _ in range(generator.randint(1, 7))]
        depth = find_hiding_depth(1.0, 1.0, delays_s, 0)
        num_stages = len(delays_s) + 1
        for stage in range(num_stages):
            needed = num_stages - stage + sum(delays_s[stage:])
            assert count_warmup(10**6, num_stages, stage, depth) >= needed


def list_blocking_acts(num_slots, num_stages, stage, in_flight):
    """What a stage sends and announces in a step, in its order, with the leads that it has on NCCL."""
    leads = find_leads(num_slots, num_stages, stage, in_flight)
    links = {
        "activations": (stage > 0, leads[ACTIVATIONS_FROM_PREVIOUS], "gradients"),
        "gradients": (stage < num_stages - 1, leads[GRADIENTS_FROM_NEXT], "activations"),
    }
    acts, sent, announced = [], Counter(), Counter()

    def announce(direction, at_least=0):
        exists, lead, way_back = links[direction]
        may = num_slots if sent[way_back] == num_slots else lead + sent[way_back]
        while exists and announced[direction] < min(num_slots, max(may, at_least)):
            acts.append(("receive", direction, announced[direction]))
            announced[direction] += 1

    announce("activations")
    announce("gradients")
    for kind, slot in order_work(num_slots, num_stages, stage, in_flight):
        arrives, leaves = ("activations", "gradients") if kind == "forward" else ("gradients", "activations")
        announce(arrives, slot + 1)
        sends = stage < num_stages - 1 if kind == "forward" else stage > 0
        if sends:
            acts.append(("send", arrives, slot))
            sent[arrives] += 1
            announce(leaves)
    return acts


def runs_when_all_block(acts):
    """Whether stages whose every send and receive waits for its counterpart come to an end."""
    left = [deque(stage) for stage in acts]
    while any(left):
        for stage, mine in enumerate(left):
            kind, direction, slot = mine[0] if mine else (None, None, None)
            to = stage + (1 if direction == "activations" else -1)
            if kind == "send" and left[to] and left[to][0] == ("receive", direction, slot):
                mine.popleft()
                left[to].popleft()
                break
        else:
            return False
    return True


@pytest.mark.parametrize("num_stages", [2, 3, 4, 5, 8])
def test_with_their_leads_stages_could_block_on_every_message(num_stages):
    for num_slots, in_flight in product((1, 2, 3, 4, 7, 12), (0, 1, 2, 3, 5)):
        acts = [list_blocking_acts(num_slots, num_stages, s, in_flight) for s in range(num_stages)]
        assert runs_when_all_block(acts), (num_slots, in_flight)
