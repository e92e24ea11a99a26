"""Gradients of DistributedDataParallel replicas, on real ranks, alone and in pipelines."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from torch.nn.parallel import DistributedDataParallel

import clapping_ds
from clapping_ds.link.verification import checksum
from tests import models
from tests.cluster import assert_same_error
from tests.models import NONE
from tests.torch.runs import layers

EDEN4 = {"name": "eden4", "scale": "unbiased"}
SIGN = {"scatter": "sign", "gather": "sign"}
SMALL_BUCKET_MB = 0.02
"""So that there are several; DDP makes them anew after the first backward pass."""


def block_of(plan):
    return {"clapping": {**NONE, "data_parallel": {"min_numel": 512, **plan}}}


class Run:
    """A model with its optimizer and data; `config` None: stock."""

    def __init__(self, config, **options):
        self.model = DistributedDataParallel(layers(0, 8), bucket_cap_mb=SMALL_BUCKET_MB)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, **options)
        self.gradients = config and clapping_ds.compress_gradients(self.model, config, self.scaler)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.data = models.batches(dist.get_rank())

    def step(self, num_accumulated=2, breaks=False):
        total = 0.0
        for number in range(num_accumulated):
            tokens, labels = next(self.data)
            self.model.require_backward_grad_sync = number == num_accumulated - 1
            loss = models._loss(self.model(tokens), labels) / num_accumulated
            self.scaler.scale(loss * (torch.inf if breaks else 1.0)).backward()
            total += float(loss.detach())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return total

    def train(self, steps):
        return [self.step() for _ in range(steps)]

    def weights(self):
        return [checksum(weight.detach()) for weight in self.model.parameters()]


def compared(plans, steps):
    stock = Run(None)
    found = [(stock.train(steps), stock.weights(), None)]
    for plan in plans:
        run = Run(block_of(plan))
        found.append((run.train(steps), run.weights(), run.gradients.clapping_report()))
    return found


def test_replicas(four_ranks):
    near = [{}, {"node_size": 2}]
    coarse = [SIGN, {**SIGN, "error_feedback": "ef21"}, {"scatter": "lowrank", "gather": "lowrank"}]
    plans = [{"scatter": "none", "gather": "none"}, {"warmup_steps": 100}, *near, *coarse]
    outcomes = four_ranks.run(compared, plans, 5)
    for (stock, weights, _), none, warm, *compressed in outcomes:
        assert none[:2] == warm[:2] == (stock, weights)
        for losses, *_ in compressed:
            assert losses != stock
            assert losses[-1] < 0.5 * losses[0]
        for losses, *_ in compressed[: len(near)]:
            assert losses == pytest.approx(stock, rel=0.02)
    for number in range(1 + len(plans)):
        assert len({tuple(of_rank[number][1]) for of_rank in outcomes}) == 1, "replicas drift"
    rows = [row for row in outcomes[0][3][2] if row["direction"] != "raw"]
    assert [row["direction"] for row in rows] == ["scatter", "gather"] * 4
    assert all(row["bits_per_value"] < 4.4 for row in rows)


def skipped(plan):
    """What is held back before and after a step that the scaler skips, in units of the loss."""
    run, held = Run(block_of(plan)), []
    for breaks in (False, False, True, False):
        run.step(breaks=breaks)
        run.gradients.settle()
        exchange = run.gradients.averaging.exchange
        values = exchange.legs["scatter"].feedback.error.values
        held.append({place: error / exchange.scale for place, error in values.items()})
    return (
        all(torch.equal(held[1][p], held[2][p]) for p in held[1]),
        held[2].keys() == held[3].keys(),
        run.weights(),
    )


def test_a_skipped_step_leaves_no_error(two_ranks):
    (one, places, weights), (other, _, of_other) = two_ranks.run(skipped, SIGN)
    assert one and other and places
    assert weights == of_other


def resumed(plan, folder):
    run = Run(block_of(plan))
    run.train(3)
    file = f"{folder}/{dist.get_rank()}.pt"
    parts = [
        run.model.state_dict(),
        run.optimizer.state_dict(),
        run.scaler.state_dict(),
        run.gradients.state_dict(),
    ]
    torch.save(parts, file)
    losses = run.train(3)
    other = Run(block_of(plan))
    for _ in range(6):
        next(other.data)
    saved = torch.load(file, weights_only=False)
    for part, state in zip((other.model, other.optimizer, other.scaler), saved[:3], strict=True):
        part.load_state_dict(state)
    why = other.gradients.load_state_dict(saved[3])
    return losses == other.train(3), run.weights() == other.weights(), why


@pytest.mark.parametrize("feedback", ["ef14", "ef21", "ef21_sgdm"])
def test_a_resumed_run_is_the_uninterrupted_one(two_ranks, tmp_path, feedback):
    plan = {"scatter": "eden1", "gather": "eden1", "error_feedback": feedback}
    assert two_ranks.run(resumed, plan, str(tmp_path)) == [(True, True, None)] * 2


class Pipeline:
    """Two stages of two replicas each. splits: whether backward passes compute weights' gradients apart."""

    def __init__(self, config, wraps=True, splits=False):
        stage_id, replica = divmod(dist.get_rank(), 2)
        pairs = [dist.new_group([number, number + 2]) for number in range(2)]
        columns = [dist.new_group([2 * stage, 2 * stage + 1]) for stage in range(2)]
        module = layers(4 * stage_id, 4 * stage_id + 4)
        if wraps:
            module = DistributedDataParallel(
                module, process_group=columns[stage_id], bucket_cap_mb=SMALL_BUCKET_MB
            )
        kind = pipelining.PipelineStage if config is None else clapping_ds.ClappingStage
        stage = kind(module, stage_id, 2, torch.device("cpu"), group=pairs[replica])
        if splits:
            self.schedule = pipelining.ScheduleInterleavedZeroBubble([stage], 4, loss_fn=models._loss)
        else:
            self.schedule = pipelining.Schedule1F1B(stage, 4, loss_fn=models._loss)
        self.pipeline = config and clapping_ds.ClappingPipeline(config, self.schedule)
        self.module, self.stage_id = module, stage_id
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
        self.data = models.batches(replica)

    def step(self):
        losses = []
        if self.pipeline is not None:
            self.pipeline.step(self.data, losses=losses)
        else:
            parts = [next(self.data) for _ in range(4)]
            tokens, labels = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
            self.schedule.step(*[tokens] * (self.stage_id == 0), target=labels, losses=losses)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [float(loss) for loss in losses]


def pipelined(plans, steps):
    found = []
    for plan in (None, *plans):
        run = Pipeline(None if plan is None else block_of(plan))
        losses = [run.step() for _ in range(steps)]
        found.append((losses, run.stage_id, [checksum(p.detach()) for p in run.module.parameters()]))
    return found


def test_in_a_pipeline(four_ranks):
    outcomes = four_ranks.run(pipelined, [{"scatter": "none", "gather": "none"}, {}, SIGN], 4)
    for stock, none, eden4, sign in outcomes:
        assert none == stock
        assert stock[1] == 0 or (eden4[0] != stock[0] and sign[0] != stock[0])
        for ours, tolerance in ((eden4, 0.02), (sign, 0.1)):
            for step, of_stock in zip(ours[0], stock[0], strict=True):
                assert step == pytest.approx(of_stock, rel=tolerance)
    for number in range(4):
        by_stage = {
            stage: {tuple(of[number][2]) for of in outcomes if of[number][1] == stage} for stage in (0, 1)
        }
        assert all(len(found) == 1 for found in by_stage.values()), "replicas drift"


def make_pipeline(plan, wraps, splits=False):
    Pipeline(block_of(plan), wraps, splits)


def make_alone(plan):
    Run(block_of(plan))


def train_other_shapes():
    torch.manual_seed(0)
    model = nn.Linear(64, 64 + dist.get_rank())
    pairs = [dist.new_group([number]) for number in range(2)]
    module = DistributedDataParallel(model, process_group=pairs[dist.get_rank()])
    clapping_ds.compress_gradients(module, block_of({}))


def test_what_cannot_be_is_one_error_everywhere(four_ranks, two_ranks):
    outcomes = four_ranks.outcomes(make_pipeline, {}, False)
    assert_same_error(
        outcomes, "ValueError", "with a stage of Sequential; accepted: of a module that is wrapped"
    )
    outcomes = four_ranks.outcomes(make_pipeline, {}, True, True)
    assert_same_error(
        outcomes, "ValueError", "with ScheduleInterleavedZeroBubble, which computes gradients of"
    )
    refused = (
        ({"delay": 1}, "delay = 1 with DistributedDataParallel"),
        ({"weights": "int8"}, "weights with DistributedDataParallel"),
        ({"node_size": 2}, "node_size = 2 with 2 replicas; accepted: a divisor"),
    )
    for plan, message in refused:
        assert_same_error(two_ranks.outcomes(make_alone, plan), "ValueError", message)
    assert_same_error(two_ranks.outcomes(train_other_shapes), "ValueError", "data_parallel with 1 replica")
