"""The host torch.distributed.pipelining, on real ranks and with torch's own schedules."""

import importlib
import sys
from itertools import islice, pairwise

import pytest
import torch
from torch import nn
from torch.distributed import pipelining

from clapping_ds.engines.stage import SENDING_ENDS
from clapping_ds.engines.torch_pipelining import ClappingPipeline, ClappingStage
from clapping_ds.telemetry import DIRECTIONS
from tests import models
from tests.cluster import RankError, free_groups

NONE = {"strategy": "fu", "p_new": 1, "activations": {"delta": "none"}, "gradients": {"delta": "none"}}
INT2 = {"strategy": "fc", "refresh": "slot", "activations": {"delta": "int2"}, "gradients": {"delta": "int2"}}
INT8_INT2 = {
    "strategy": "fc", "refresh": "cycle",
    "activations": {"key": "int8", "delta": "int2"}, "gradients": {"key": "int8", "delta": "int2"},
}  # fmt: skip
DIRECT = {"strategy": "direct", "activations": {"delta": "int4"}, "gradients": {"delta": "int4"}}
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
            (ends.replica, *channel, end in SENDING_ENDS): bits
            for ends in self.pipeline.ends
            for end in ends.channels
            for channel, bits in models.channel_memories([ends.channels[end]]).items()
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
    blocks = [{**NONE, "overlap": False}, {"enabled": False, "p_new": 0.5}]
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


# Data


def lazily(name, steps):
    """The first sample of each micro-batch that a stage used, step by step, and how many were drawn."""
    run = Run(name, {**INT2, "refresh": "cycle"})
    used = []
    original = run.schedule.step

    def spying(*args, target=None, **options):
        used.append([None if x is None else x[:: models.BATCH].tolist() for x in (*args, target)])
        return original(*args, target=target, **options)

    run.schedule.step = spying
    run.train(steps)
    return used, run.pipeline.num_drawn


def test_both_loading_stages_replay_the_same_micro_batches(two_ranks):
    (first, drawn), (last, also_drawn) = two_ranks.run(lazily, "Schedule1F1B", 3)
    assert drawn == also_drawn == 4 + 2 + 2
    for (tokens, no_target), (targets,) in zip(first, last, strict=True):
        assert no_target is None
        assert ((torch.tensor(tokens) * 3 + 1) % models.VOCABULARY).tolist() == targets
    changes = [[a != b for a, b in zip(one[0], other[0], strict=True)] for one, other in pairwise(first)]
    assert changes == [[True, False, True, False], [False, True, False, True]]


class WithIds(nn.Module):
    """Passes on (hidden, token numbers): floating with a gradient, integer without."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden, ids=None, scale=None):
        ids = hidden if ids is None else ids
        hidden = self.inner(hidden) * (1.0 if scale is None else scale[:, None, None])
        return (hidden, ids) if self.inner[0].__class__ is models.Embed else hidden + (ids % 2)[..., None]


def with_tuples(block):
    rank = torch.distributed.get_rank()
    stage_class = pipelining.PipelineStage if block is None else ClappingStage
    stage = stage_class(WithIds(layers(4 * rank, 4 * rank + 4)), rank, 2, torch.device("cpu"))
    schedule = pipelining.Schedule1F1B(stage, MICRO_BATCHES, loss_fn=models._loss)
    data = ((tokens, labels, {"scale": tokens[:, 0] / 8 + 1}) for tokens, labels in models.batches())
    pipeline = None if block is None else ClappingPipeline({"clapping": block}, schedule)
    losses = []
    for _ in range(3):
        found = []
        if pipeline is not None:
            pipeline.step(data, losses=found)
        else:
            parts = [next(data) for _ in range(MICRO_BATCHES)]
            scale = torch.cat([part[2]["scale"] for part in parts])
            inputs = [torch.cat([part[0] for part in parts])] if rank == 0 else []
            schedule.step(*inputs, target=torch.cat([part[1] for part in parts]), losses=found, scale=scale)
        losses += [float(loss.detach()) for loss in found]
    return losses, [p.grad.numpy().tobytes() for p in stage.submod.parameters()]


def test_tuples_with_integers_and_keyword_arguments(two_ranks):
    stock = two_ranks.run(with_tuples, None)
    assert two_ranks.run(with_tuples, NONE) == stock
    assert two_ranks.run(with_tuples, INT2) != stock


def ends_in_mid_step(ending_ranks):
    run = Run("Schedule1F1B", {**INT2, "refresh": "cycle"})
    data = list(islice(models.batches(), 40))
    ends = torch.distributed.get_rank() in ending_ranks
    run.data = iter(data[:5] if ends else data)
    losses = [run.step()]
    before = run.bits()
    with pytest.raises(StopIteration, match="data_iter ended in step 1, which needs 2 new micro-batches"):
        run.step()
    assert run.bits() == before
    run.data = iter(data[5:]) if ends else run.data
    return losses + run.train(2)


def without_end():
    return Run("Schedule1F1B", {**INT2, "refresh": "cycle"}).train(3)


def test_an_iterator_that_ends_in_mid_step_stops_every_rank_and_loses_nothing(two_ranks):
    whole = two_ranks.run(without_end)
    for ending_ranks in ((0,), (1,), (0, 1)):
        assert two_ranks.run(ends_in_mid_step, ending_ranks) == whole


def other_shapes(kind):
    run = Run("Schedule1F1B", {**INT2, "refresh": "step"})
    if kind == "short last batch":
        run.data = iter([next(models.batches(size=size)) for size in (2, 2, 2, 1)])
    run.train(1)
    run.data = models.batches(length=16)
    run.train(20)


@pytest.mark.parametrize("kind", ["short last batch", "other length"])
def test_micro_batches_of_another_shape_are_one_error_on_every_rank(two_ranks, kind):
    assert_same_error(two_ranks.outcomes(other_shapes, kind), "ValueError", "micro-batches differ in shape")


# State


def interrupted(name, block, folder, forgets=False):
    """Losses and what is held after 3 more steps: uninterrupted, and by a new pipeline from saved state."""
    file = f"{folder}/clapping_{torch.distributed.get_rank()}.pt"
    run = Run(name, block)
    run.train(3)
    torch.save([run.pipeline.state_dict(), [p.data for p in run.weights], run.optimizer.state_dict()], file)
    found = [(run.train(3), run.memories(), run.bits())]

    run = Run(name, block)
    state, weights, optimizer = torch.load(file)
    if forgets and torch.distributed.get_rank() == 1:
        state = None
    why = run.pipeline.load_state_dict(state)
    for ours, saved in zip(run.weights, weights, strict=True):
        ours.data.copy_(saved)
    run.optimizer.load_state_dict(optimizer)
    for _ in range(run.pipeline.num_drawn):
        next(run.data)
    found.append((run.train(3), run.memories(), run.bits()))
    return why, found


@pytest.mark.parametrize("name", ["Schedule1F1B", "ScheduleZBVZeroBubble"])
def test_a_resumed_run_is_the_uninterrupted_one(two_ranks, tmp_path, name):
    for why, (uninterrupted, resumed) in two_ranks.run(interrupted, name, INT2, str(tmp_path)):
        assert why is None
        assert uninterrupted == resumed


def test_without_the_state_of_every_rank_the_next_step_is_all_fresh(two_ranks, tmp_path):
    by_rank = two_ranks.run(interrupted, "ScheduleInterleaved1F1B", INT2, str(tmp_path), True)
    for why, _ in by_rank:
        assert why == "the checkpoint has no state of clapping_ds for every rank"
    assert_ends_are_equal([found[1][1] for _, found in by_rank], num_links=3, num_memories=MICRO_BATCHES)


def test_the_report_has_a_row_per_channel(two_ranks):
    for report in two_ranks.run(report_of, INT2):
        channels = {(link, direction) for link in ("0-1", "1-2", "2-3") for direction in DIRECTIONS}
        assert {(row["link"], row["direction"]) for row in report} == channels
        for row in report:
            assert row["messages"] == 2 * MICRO_BATCHES
            assert row["payload_bytes"] == 2 * MICRO_BATCHES * (64 * 32 + 64 * 2)


def report_of(block):
    run = Run("ScheduleInterleaved1F1B", block)
    run.train(2)
    return run.pipeline.report()


# Bad input


def assert_same_error(outcomes, kind, message):
    for outcome in outcomes:
        assert isinstance(outcome, RankError), "a rank went on"
        assert outcome.kind == kind
        assert outcome.message == outcomes[0].message
        assert message in outcome.message


def start(configs, stage_class=ClappingStage, name="Schedule1F1B", micro_batches=(4, 4)):
    rank = torch.distributed.get_rank()
    schedule, _ = make_schedule(name, stage_class, micro_batches[rank])
    ClappingPipeline(configs[rank], schedule)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"clapping": {"p_neu": 0.5}}, "clapping.p_neu = 0.5: unknown key; accepted: enabled"),
     ({"train_batch_size": 4}, "no \"clapping\" among the keys ['train_batch_size']; accepted: a mapping"),
     ({"clapping": {"in_flight": 2}}, "clapping.in_flight = 2 with torch.distributed.pipelining"),
     ({"clapping": {"links": "auto"}}, "accepted: no links")],
)  # fmt: skip
def test_a_wrong_block_is_one_error_on_every_rank(two_ranks, config, message):
    assert_same_error(two_ranks.outcomes(start, [config, config]), "ValueError", message)


def test_what_only_one_rank_has_is_one_error_on_every_rank(two_ranks):
    good = {"clapping": INT2}
    for other, message in (
        ({"clapping": {"p_neu": 0.5}}, "clapping.p_neu = 0.5: unknown key"),
        ({"clapping": {**INT2, "seed": 3}}, "clapping.seed: 1234 (rank 0); 3 (rank 1)"),
        ({}, "clapping.enabled: True (rank 0); False (rank 1)"),
    ):
        assert_same_error(two_ranks.outcomes(start, [good, other]), "ValueError", message)
    outcomes = two_ranks.outcomes(start, [good, good], ClappingStage, "Schedule1F1B", (4, 8))
    assert_same_error(outcomes, "ValueError", "n_microbatches: 4 (rank 0); 8 (rank 1)")


def test_a_stock_stage_is_refused(two_ranks):
    outcomes = two_ranks.outcomes(start, [{"clapping": INT2}] * 2, pipelining.PipelineStage)
    assert_same_error(outcomes, "ValueError", "a schedule of PipelineStage; accepted: of ClappingStage")


def without_data():
    Run("Schedule1F1B", INT2).pipeline.step()


def test_no_data_is_one_error_on_every_rank(two_ranks):
    assert_same_error(two_ranks.outcomes(without_data), "StopIteration", "data_iter ended in step 0")


def out_of_order():
    """A schedule whose first stage uses the gradients of two micro-batches the other way round."""
    schedule, _ = make_schedule("ScheduleInterleaved1F1B")
    actions = schedule.pipeline_order_with_comms[0]
    backward = [i for i, action in enumerate(actions) if str(action) in ("0B2", "0B3")]
    one, other = backward
    actions[one], actions[other] = actions[other], actions[one]
    ClappingPipeline({"clapping": INT2}, schedule)


def test_a_schedule_that_uses_messages_in_another_order_is_refused(two_ranks):
    message = "sends micro-batches [0, 1, 2, 3] from stage 1, and uses them in the order [0, 1, 3, 2]"
    assert_same_error(two_ranks.outcomes(out_of_order), "ValueError", message)


def with_torch(version):
    before = torch.__version__
    names = ["clapping_ds.engines.torch_stage", "clapping_ds.engines.torch_pipelining"]
    modules = {name: sys.modules.pop(name) for name in names}
    try:
        torch.__version__ = version
        importlib.import_module(names[1])
    finally:
        torch.__version__ = before
        sys.modules.update(modules)


def test_an_untested_version_of_torch_is_refused(two_ranks):
    outcomes = two_ranks.outcomes(with_torch, "2.12.1+cpu")
    assert_same_error(outcomes, "ImportError", "torch 2.12.1+cpu: clapping_ds.engines.torch_pipelining")
    assert "tested with torch 2.13" in outcomes[0].message
