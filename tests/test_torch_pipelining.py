"""The host torch.distributed.pipelining, on real ranks and with torch's own schedules."""

import torch
from torch import nn
from torch.distributed import pipelining

from clapping_ds.engines.torch_pipelining import ClappingPipeline, ClappingStage
from tests import models

NONE = {"strategy": "fu", "p_new": 1, "activations": {"delta": "none"}, "gradients": {"delta": "none"}}
INT2 = {"strategy": "fc", "refresh": "slot", "activations": {"delta": "int2"}, "gradients": {"delta": "int2"}}
MICRO_BATCHES = 4
# Stages per rank, and whether they lie as a V.
SCHEDULES = {
    "ScheduleGPipe": (1, False),
    "Schedule1F1B": (1, False),
    "ScheduleInterleaved1F1B": (2, False),
    "ScheduleInterleavedZeroBubble": (2, False),
    "ScheduleZBVZeroBubble": (2, True),
    "ScheduleDualPipeV": (2, True),
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


def make_schedule(name, stage_class=ClappingStage, micro_batches=MICRO_BATCHES):
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    num_stages = num_ranks * SCHEDULES[name][0]
    size = 8 // num_stages
    stages = [
        stage_class(layers(index * size, index * size + size), index, num_stages, torch.device("cpu"))
        for index in stage_indexes(name, rank, num_ranks)
    ]
    schedule_class = getattr(pipelining, name)
    several = issubclass(schedule_class, pipelining.schedules.PipelineScheduleMulti)
    schedule = schedule_class(stages if several else stages[0], micro_batches, loss_fn=models._loss)
    return schedule, stages


class Run:
    """A schedule with its optimizer and data; `block` None: all of torch's own."""

    def __init__(self, name, block, micro_batches=MICRO_BATCHES):
        stage_class = pipelining.PipelineStage if block is None else ClappingStage
        self.schedule, self.stages = make_schedule(name, stage_class, micro_batches)
        self.pipeline = None if block is None else ClappingPipeline({"clapping": block}, self.schedule)
        self.weights = [p for stage in self.stages for p in stage.submod.parameters()]
        self.optimizer = torch.optim.AdamW(self.weights, lr=3e-3)
        self.data = models.batches()
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
        return float(sum(losses) / len(losses)) if losses else None

    def train(self, steps):
        return [self.step() for _ in range(steps)]

    def bits(self):
        return [weight.detach().numpy().tobytes() for weight in self.weights]


def compare(name, blocks, steps=4):
    """Losses and final weights of torch's own stage, and of ours."""
    found = []
    for block in (None, *blocks):
        run = Run(name, block)
        found.append((run.train(steps), run.bits()))
    return found
