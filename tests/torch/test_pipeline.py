"""The host torch.distributed.pipelining, on real ranks and with torch's own schedules: as torch's own stages,
and as the DeepSpeed engine."""

import pytest
import torch

from tests import models
from tests.cluster import free_groups
from tests.models import INT2, NONE
from tests.torch.runs import MICRO_BATCHES, MODES, SCHEDULES, Run, assert_ends_are_equal, only

# As torch's own


def compare(name, blocks, steps=3):
    """Losses and final weights of torch's own stage, and of ours."""
    found = []
    for block in (None, *blocks):
        run = Run(name, block)
        found.append((run.train(steps), run.bits()))
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_losses_and_weights_of_two_ranks_are_those_of_the_stock_stage(two_ranks, name):
    for stock, none, int2 in two_ranks.run(compare, name, [NONE, INT2]):
        assert stock == none
        assert stock[1] != int2[1]


@pytest.mark.parametrize("name", list(SCHEDULES)[:5])
def test_losses_and_weights_of_four_ranks_are_those_of_the_stock_stage(four_ranks, name):
    for stock, none in four_ranks.run(compare, name, [NONE]):
        assert stock == none


@pytest.mark.parametrize("name", ["Schedule1F1B", "ScheduleZBVZeroBubble"])
def test_sends_that_block_and_a_block_that_is_off_change_nothing(two_ranks, name):
    blocks = [{**NONE, "overlap": False}, {"enabled": False, "strategy": "fu"}]
    for stock, blocking, disabled in two_ranks.run(compare, name, blocks):
        assert stock == blocking == disabled


def compare_replicas(block):
    """Two pipelines of ranks (0, 2) and (1, 3), each with data of its own."""
    groups = [torch.distributed.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    replica = torch.distributed.get_rank() % 2
    found = []
    for its in (None, block, INT2):
        run = Run("Schedule1F1B", its, group=groups[replica], seed=replica)
        found.append((run.train(3), run.bits(), None if its is None else run.memories()))
    return found


def test_two_pipelines_side_by_side(four_ranks):
    by_rank = four_ranks.run(compare_replicas, NONE)
    for stock, none, int2 in by_rank:
        assert stock[:2] == none[:2]
        assert stock[1] != int2[1]
    assert_ends_are_equal([int2[2] for *_, int2 in by_rank], num_links=2, num_memories=4)


# As the DeepSpeed engine


def train_torch(name, modes, steps):
    found = {}
    for mode in modes:
        run = Run(name, {**MODES[mode], "in_flight": 0})
        found[mode] = (run.train(steps), run.memories())
    return found


def train_deepspeed(num_stages, modes, steps):
    found = {}
    for mode in modes:
        block = {**MODES[mode], "in_flight": 0}
        engine = models.make_engine(block, num_stages, ds={"gradient_clipping": 0.0})
        found[mode] = models.train(engine, steps)
        del engine
        free_groups()
    return found


STEPS = {2: 50, 4: 20}  # by number of stages
COMPRESSED = [mode for mode in MODES if mode != "none"]


@pytest.fixture(scope="module")
def deepspeed_losses(two_ranks, four_ranks):
    """By number of stages and mode."""
    return {
        2: two_ranks.run(train_deepspeed, 2, COMPRESSED, STEPS[2])[0],
        4: four_ranks.run(train_deepspeed, 4, COMPRESSED, STEPS[4])[0],
    }


@pytest.mark.parametrize(
    ("ranks", "name", "num_stages"),
    [("two_ranks", "Schedule1F1B", 2),
     ("two_ranks", "ScheduleInterleaved1F1B", 4),
     ("four_ranks", "ScheduleGPipe", 4)],
)  # fmt: skip
def test_losses_are_those_of_the_deepspeed_engine_and_memories_stay_equal(
    request, deepspeed_losses, ranks, name, num_stages
):
    """Bit for bit, by this: with four micro-batches DeepSpeed divides each loss by 4 before the backward
    pass, and torch the weights' gradients after it. A product with a power of two is exact in fp32, and
    the codecs' codes do not change with it, as their scales do: all else is the same arithmetic."""
    by_rank = request.getfixturevalue(ranks).run(train_torch, name, COMPRESSED, STEPS[num_stages])
    for mode in COMPRESSED:
        losses = [only(step) for step in zip(*(found[mode][0] for found in by_rank), strict=True)]
        assert losses == deepspeed_losses[num_stages][mode], mode
        num_memories = 0 if mode == "direct int4" else MICRO_BATCHES
        assert_ends_are_equal([found[mode][1] for found in by_rank], num_stages - 1, num_memories)


@pytest.mark.parametrize(
    "name", ["ScheduleInterleavedZeroBubble", "ScheduleZBVZeroBubble", "ScheduleLoopedBFS"]
)
def test_memories_stay_equal_on_the_other_schedules(two_ranks, name):
    by_rank = two_ranks.run(train_torch, name, ["int8 key + int2 delta"], 50)
    num_links = 2 if SCHEDULES[name][1] else 3  # a V has a link within a rank
    assert_ends_are_equal([found["int8 key + int2 delta"][1] for found in by_rank], num_links, MICRO_BATCHES)


# Evaluation and steps of torch's own


def with_evaluation(name, block, evaluates):
    run = Run(name, block)
    losses, evaluations = [], []
    for _ in range(3):
        losses.append(run.step())
        if evaluates:
            before = None if block is None else run.memories()
            evaluations.append(run.evaluate())
            assert block is None or run.memories() == before
    return losses, evaluations, run.bits()


# Not the V schedules: `eval` of torch 2.13 fails there, with its own stage ("can't steal_bwd_input").
@pytest.mark.parametrize("name", ["Schedule1F1B", "ScheduleInterleavedZeroBubble"])
def test_evaluation_is_raw_and_changes_nothing(two_ranks, name):
    stock = two_ranks.run(with_evaluation, name, None, True)
    assert two_ranks.run(with_evaluation, name, NONE, True) == stock
    alone = two_ranks.run(with_evaluation, name, INT2, False)
    between = two_ranks.run(with_evaluation, name, INT2, True)
    for (losses, _, weights), (also, _, same) in zip(alone, between, strict=True):
        assert (losses, weights) == (also, same)


def direct_step(block):
    """Two steps through the pipeline, one past it."""
    run = Run("Schedule1F1B", block)
    losses = run.train(2)
    pipeline, held = run.pipeline, None if block is None else run.memories()
    run.pipeline = None
    losses.append(run.step())
    run.pipeline = pipeline
    assert block is None or run.memories() == held
    return losses, run.bits()


def test_a_step_that_bypasses_the_pipeline_is_torchs_own(two_ranks):
    assert two_ranks.run(direct_step, NONE) == two_ranks.run(direct_step, None)
