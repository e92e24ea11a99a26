"""Schedules of torch's own stages, made and stepped as code does that does not know of this package."""

from copy import deepcopy

import pytest
import torch
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from clapping_ds import ClappingPipeline, ClappingStage
from tests.cluster import assert_replicas_are_equal, assert_same_error
from tests.models import DIRECT, NONE
from tests.torch.runs import SCHEDULES, Run

STEPS = 3


class OwnStage(PipelineStage):
    """Counts its passes."""

    num_passes = 0

    def forward_one_chunk(self, *args, **kwargs):
        self.num_passes += 1
        return super().forward_one_chunk(*args, **kwargs)


def train(name, block):
    """Of stock stages, of attached ones, and by `ClappingPipeline.step`: losses of training and evaluation,
    and final weights."""
    found, is_v = {}, SCHEDULES[name][1]  # where `eval` of torch 2.13 fails with its own stages
    for kind in ("stock", "attached", "own"):
        run = Run(name, block if kind == "own" else None)
        if kind == "attached":
            ClappingPipeline.attach({"clapping": block}, run.schedule)
        losses = [(run.step(), None if is_v else run.evaluate()) for _ in range(STEPS)]
        found[kind] = losses, run.bits()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_of_the_schedule_itself(two_ranks, name):
    for block in (NONE, DIRECT):
        for found in two_ranks.run(train, name, block):
            assert found["attached"] == found["own"]
            assert (found["stock"] == found["own"]) is (block is NONE)


def reported(block):
    run = Run("Schedule1F1B", None)
    (stage,) = run.stages
    stage.__class__ = OwnStage
    pipeline = ClappingPipeline.attach({"clapping": block}, run.schedule)
    run.train(2)
    saved = pipeline.state_dict()
    again = Run("Schedule1F1B", None)
    for mine, other in zip(again.weights, run.weights, strict=True):
        mine.data.copy_(other.data)
    again.optimizer.load_state_dict(deepcopy(run.optimizer.state_dict()))
    resumed = ClappingPipeline.attach({"clapping": block}, again.schedule)
    why = resumed.load_state_dict(saved)
    for _ in range(2):
        again.whole_batch()
    is_same = (run.train(2), run.bits()) == (again.train(2), again.bits())
    kinds = isinstance(stage, OwnStage), isinstance(stage, ClappingStage), type(stage).__name__
    return kinds, stage.num_passes, len(pipeline.report()), why, is_same


def test_a_stage_stays_one_of_its_class_and_a_run_resumes(two_ranks):
    for kinds, num_passes, num_channels, why, is_same in two_ranks.run(reported, DIRECT):
        assert kinds == (True, True, "OwnStage")
        assert (num_passes, num_channels, why, is_same) == (16, 2, None, True)
    for kinds, num_passes, num_channels, _, is_same in two_ranks.run(reported, {"enabled": False}):
        assert kinds == (True, False, "OwnStage")
        assert (num_passes, num_channels, is_same) == (16, 0, True)


def refused(what):
    run = Run("Schedule1F1B", None)
    block = {"strategy": "fc"} if what == "strategy" else {"strategie": "fc"} if what == "key" else DIRECT
    try:
        ClappingPipeline.attach({"clapping": block}, run.schedule)
    finally:
        if what != "twice":
            assert type(run.stages[0]) is PipelineStage
            assert "step" not in vars(run.schedule)
    ClappingPipeline.attach({"clapping": block}, run.schedule)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("strategy", "clapping.strategy = 'fc' with ClappingPipeline.attach"),
        ("key", "clapping.strategie = 'fc': unknown key"),
        ("twice", "ClappingPipeline.attach to a schedule that is attached"),
    ],
)
def test_what_cannot_be_attached_is_one_error(two_ranks, what, message):
    assert_same_error(two_ranks.outcomes(refused, what), "ValueError", message)


def replicated():
    """Two replicas of two stages: refused with a strategy that replays, then attached."""
    rank = torch.distributed.get_rank()
    groups = [torch.distributed.new_group(ranks) for ranks in ([0, 2], [1, 3], [0, 1], [2, 3])]
    run = Run("Schedule1F1B", None, group=groups[rank % 2], seed=rank % 2)
    (stage,) = run.stages
    stage.submod = DistributedDataParallel(stage.submod, process_group=groups[2 + rank // 2])
    with pytest.raises(ValueError, match="where each step has a batch of its own"):
        ClappingPipeline.attach({"clapping": {"strategy": "fc", "data_parallel": {}}}, run.schedule)
    pipeline = ClappingPipeline.attach({"clapping": {"data_parallel": {"min_numel": 512}}}, run.schedule)
    with pytest.raises(ValueError, match="a schedule that is attached"):
        ClappingPipeline.attach({"clapping": {"data_parallel": {}}}, run.schedule)
    run.train(2)
    return rank // 2, run.bits(), len(pipeline.report())


def test_replicas_that_compress_their_gradients(four_ranks):
    outcomes = four_ranks.run(replicated)
    assert_replicas_are_equal([(stage, weights) for stage, weights, _ in outcomes])
    assert all(num_rows > 4 for *_, num_rows in outcomes)
