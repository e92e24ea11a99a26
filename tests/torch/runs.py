"""What ranks run with torch.distributed.pipelining. Imported by them."""

from itertools import islice

import torch
from torch import nn
from torch.distributed import pipelining

from clapping_ds import ClappingPipeline, ClappingStage
from tests import models
from tests.models import DIRECT, INT2, INT8_INT2, NONE

MODES = {"none": NONE, "fc int2": INT2, "int8 key + int2 delta": INT8_INT2, "direct int4": DIRECT}
MICRO_BATCHES = 4
# Stages per rank, and whether they lie as a V.
SCHEDULES = {
    "ScheduleGPipe": (1, False),
    "Schedule1F1B": (1, False),
    "ScheduleInterleaved1F1B": (2, False),
    "ScheduleInterleavedZeroBubble": (2, False),
    "ScheduleZBVZeroBubble": (2, True),
    "ScheduleDualPipeV": (2, True),
    "ScheduleLoopedBFS": (2, False),
}


def layers(first, last):
    """Those of `models.pipeline`, with the weights that it gives them."""
    makers = [models.Embed, *[models.Mix] * 6, lambda: nn.Linear(models.WIDTH, models.VOCABULARY)]
    made = []
    for index in range(first, last):
        torch.manual_seed(7 + index)
        made.append(makers[index]())
    return nn.Sequential(*made)


def stage_indexes(name, rank, num_ranks):
    per_rank, is_v = SCHEDULES[name]
    if is_v:
        return [rank, 2 * num_ranks - 1 - rank]
    return [rank + turn * num_ranks for turn in range(per_rank)]


def make_schedule(name, stage_class=ClappingStage, micro_batches=MICRO_BATCHES, group=None):
    rank, num_ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    num_stages = num_ranks * SCHEDULES[name][0]
    size = 8 // num_stages
    stages = [
        stage_class(
            layers(index * size, index * size + size), index, num_stages, torch.device("cpu"), group=group
        )
        for index in stage_indexes(name, rank, num_ranks)
    ]
    schedule_class = getattr(pipelining, name)
    several = issubclass(schedule_class, pipelining.schedules.PipelineScheduleMulti)
    schedule = schedule_class(stages if several else stages[0], micro_batches, loss_fn=models._loss)
    return schedule, stages


class Run:
    """A schedule with its optimizer and data; `block` None: all of torch's own."""

    def __init__(self, name, block, micro_batches=MICRO_BATCHES, group=None, seed=0):
        stage_class = pipelining.PipelineStage if block is None else ClappingStage
        self.schedule, self.stages = make_schedule(name, stage_class, micro_batches, group)
        self.pipeline = None if block is None else ClappingPipeline({"clapping": block}, self.schedule)
        self.weights = [p for stage in self.stages for p in stage.submod.parameters()]
        self.optimizer = torch.optim.AdamW(self.weights, lr=3e-3)
        self.data = models.batches(seed)
        self.num_micro_batches = micro_batches

    def whole_batch(self):
        parts = [next(self.data) for _ in range(self.num_micro_batches)]
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    def step(self):
        """The loss, where the last stage is."""
        losses = []
        if self.pipeline is not None:
            self.pipeline.step(self.data, losses=losses)
        else:
            tokens, labels = self.whole_batch()
            inputs = [tokens] if any(stage.is_first for stage in self.stages) else []
            self.schedule.step(*inputs, target=labels, losses=losses)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(sum(loss.detach() for loss in losses) / len(losses)) if losses else None

    def train(self, steps):
        return [self.step() for _ in range(steps)]

    def evaluate(self):
        """The loss on held-out data, where the last stage is."""
        parts = list(islice(models.batches(seed=9), self.num_micro_batches))
        tokens, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        inputs = [tokens] if any(stage.is_first for stage in self.stages) else []
        losses = []
        self.schedule.eval(*inputs, target=labels, losses=losses)
        return float(sum(losses) / len(losses)) if losses else None

    def bits(self):
        return [weight.detach().numpy().tobytes() for weight in self.weights]

    def memories(self):
        """By (replica, link, direction, whether it sends): what this rank's ends hold, bit for bit."""
        return {
            (stage.replica, *channel, end.sends): bits
            for stage in self.pipeline.endpoints.stages
            for end in stage.channels
            for channel, bits in models.channel_memories([stage.channels[end]]).items()
        }


def only(values):
    """The one value that is not None: what the rank of the last stage found."""
    (found,) = [value for value in values if value is not None]
    return found


def ends_of(by_rank):
    """By (replica, link, direction): what the sending and what the receiving end hold."""
    ends = {}
    for memories in by_rank:
        for (*channel, sends), bits in memories.items():
            ends.setdefault(tuple(channel), {})[sends] = bits
    return ends


def assert_ends_are_equal(by_rank, num_links, num_memories):
    ends = ends_of(by_rank)
    assert len(ends) == 2 * num_links
    for channel, held in ends.items():
        assert held[True] == held[False], f"{channel} differs"
        assert sum(map(bool, [bits for bits in held[True].values() if bits])) == num_memories
