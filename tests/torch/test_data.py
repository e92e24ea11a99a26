"""The host torch.distributed.pipelining: data, state, and one clear error where the input is bad."""

import importlib
import sys
from itertools import chain, islice, pairwise

import pytest
import torch
from torch import nn
from torch.distributed import pipelining

from clapping_ds.config import DIRECTIONS
from clapping_ds.hosts.torch.pipeline import ClappingPipeline, ClappingStage
from tests import models
from tests.cluster import assert_same_error
from tests.models import INT2, NONE, PLACES, POOL
from tests.torch.runs import (
    MICRO_BATCHES,
    Run,
    assert_ends_are_equal,
    layers,
    make_schedule,
)

# Data


def lazily(name, steps):
    """The first sample of each micro-batch that a stage used, step by step, and how many were drawn."""
    run = Run(name, {**INT2, "lazy": {"refresh": "cycle"}})
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
    run = Run("Schedule1F1B", {**INT2, "lazy": {"refresh": "cycle"}})
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
    return Run("Schedule1F1B", {**INT2, "lazy": {"refresh": "cycle"}}).train(3)


def test_an_iterator_that_ends_in_mid_step_stops_every_rank_and_loses_nothing(two_ranks):
    whole = two_ranks.run(without_end)
    for ending_ranks in ((0,), (1,), (0, 1)):
        assert two_ranks.run(ends_in_mid_step, ending_ranks) == whole


def with_data_of_each_step(kind):
    """Losses of a run whose steps have lists or iterators of their own, and of one with a single iterator."""
    found = []
    for is_anew in (True, False):
        run, losses = Run("Schedule1F1B", {**POOL, "lazy": {"pool": 2, "refresh": "slot"}}), []
        data = run.data
        for _ in range(6):
            if is_anew:
                run.data = kind(list(islice(data, run.pipeline.num_fresh)))
            losses.append(run.step())
        found.append((losses, run.memories(), run.pipeline.num_drawn))
    return found


@pytest.mark.parametrize("kind", [list, iter])
def test_each_step_may_have_data_of_its_own(two_ranks, kind):
    for anew, single in two_ranks.run(with_data_of_each_step, kind):
        assert anew == single


def other_shapes(kind):
    run = Run("Schedule1F1B", {**INT2, "lazy": {"refresh": "step"}})
    if kind == "short last batch":
        run.data = iter([next(models.batches(size=size)) for size in (2, 2, 2, 1)])
    run.train(1)
    run.data = models.batches(length=16)
    run.train(20)


@pytest.mark.parametrize("kind", ["short last batch", "other length"])
def test_micro_batches_of_another_shape_are_one_error_on_every_rank(two_ranks, kind):
    assert_same_error(two_ranks.outcomes(other_shapes, kind), "ValueError", "micro-batches differ in shape")


def good_after_bad():
    """Losses of an all-fresh run in which a batch of another shape comes in between; the batches counted."""
    run = Run("Schedule1F1B", NONE)
    bad, losses = islice(models.batches(length=32), MICRO_BATCHES), []
    for step in range(3):
        if step == 1:
            with pytest.raises(ValueError, match="the 4 drawn ones are dropped"):
                run.pipeline.step(chain(islice(run.data, 2), bad))
        losses.append(run.step())
    return losses, run.pipeline.num_drawn


def test_a_batch_of_another_shape_is_dropped_and_the_run_goes_on(two_ranks):
    for losses, num_drawn in two_ranks.run(good_after_bad):
        assert len(losses) == 3
        assert num_drawn == 4 * MICRO_BATCHES


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
@pytest.mark.parametrize("block", [INT2, {**POOL, "memory": PLACES["disk"]}], ids=["int2", "pool on disk"])
def test_a_resumed_run_is_the_uninterrupted_one(two_ranks, tmp_path, name, block):
    for why, (uninterrupted, resumed) in two_ranks.run(interrupted, name, block, str(tmp_path)):
        assert why is None
        assert uninterrupted == resumed


def test_without_the_state_of_every_rank_the_next_step_is_all_fresh(two_ranks, tmp_path):
    by_rank = two_ranks.run(interrupted, "ScheduleInterleaved1F1B", INT2, str(tmp_path), True)
    for why, _ in by_rank:
        assert why == "the checkpoint has no state of clapping_ds for every rank"
    assert_ends_are_equal([found[1][1] for _, found in by_rank], num_links=3, num_memories=MICRO_BATCHES)


def counted(saved_with, loaded_with, is_missing):
    """`num_drawn` when it was saved, and after it was loaded."""
    run = Run("ScheduleInterleaved1F1B", saved_with)
    run.train(3)
    state = run.pipeline.state_dict()
    if is_missing and torch.distributed.get_rank() == 1:
        state = None
    new = Run("ScheduleInterleaved1F1B", loaded_with)
    new.pipeline.load_state_dict(state)
    return run.pipeline.num_drawn, new.pipeline.num_drawn


@pytest.mark.parametrize(
    ("saved_with", "loaded_with", "is_missing"),
    [(INT2, INT2, True), (INT2, {**INT2, "seed": 5}, False), (INT2, {"enabled": False}, False),
     ({**INT2, "checkpoint_memory": False}, INT2, False)],
    ids=["one rank's file", "seed", "disabled", "no memories"],
)  # fmt: skip
def test_the_position_in_the_data_is_never_lost(two_ranks, saved_with, loaded_with, is_missing):
    for saved, loaded in two_ranks.run(counted, saved_with, loaded_with, is_missing):
        assert loaded == saved > 0


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


def start(configs, stage_class=ClappingStage, name="Schedule1F1B", micro_batches=(4, 4)):
    rank = torch.distributed.get_rank()
    schedule, _ = make_schedule(name, stage_class, micro_batches[rank])
    ClappingPipeline(configs[rank], schedule)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"clapping": {"p_neu": 0.5}}, "clapping.p_neu = 0.5: unknown key; accepted: enabled"),
     ({"clapping": {"in_flight": 2}}, "clapping.in_flight = 2 with torch.distributed.pipelining"),
     ({"clapping": {"links": "auto"}}, "clapping.links = 'auto' with torch.distributed.pipelining")],
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


def without_a_block():
    stock = Run("Schedule1F1B", None).step()
    run = Run("Schedule1F1B", NONE)
    run.pipeline = ClappingPipeline({"train_batch_size": 4}, run.schedule)
    found = run.pipeline.config.enabled, run.pipeline.report(), run.pipeline.num_drawn
    return found, run.step() == stock


def test_without_a_block_all_is_torchs_own(two_ranks):
    assert two_ranks.run(without_a_block) == [((False, [], 0), True)] * 2


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
    names = ["clapping_ds.hosts.torch.stage", "clapping_ds.hosts.torch.pipeline"]
    modules = {name: sys.modules.pop(name) for name in names}
    try:
        torch.__version__ = version
        importlib.import_module(names[1])
    finally:
        torch.__version__ = before
        sys.modules.update(modules)


def test_an_untested_version_of_torch_is_refused(two_ranks):
    outcomes = two_ranks.outcomes(with_torch, "2.12.1+cpu")
    assert_same_error(outcomes, "ImportError", "torch 2.12.1+cpu: clapping_ds.hosts.torch")
    assert "tested with torch 2.13" in outcomes[0].message


def test_a_vendors_build_of_a_tested_version_is_accepted(two_ranks):
    two_ranks.run(with_torch, "2.13.0a0+ecf3bae40a.nv26.10")
