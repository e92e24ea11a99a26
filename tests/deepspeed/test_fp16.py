"""fp16 with dynamic loss scaling. DeepSpeed refuses it on CPUs; these tests lift that check.

With ZeRO stage 1: in DeepSpeed 0.19.8 the fp16 optimizers of stage 0 have no `loss_scaler`, and the loss of a
pipeline is not scaled at all.
"""

import pytest
import torch

from tests import models
from tests.models import INT2, NONE, ZERO1


def on_cpu():
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def scaled(block, overflow_step, steps=12):
    """For each step: loss, skipped steps so far, loss scale. Then what is held at this end."""
    on_cpu()
    fp16 = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 3, "hysteresis": 1}
    engine = models.make_engine(block, stock=block is None, ds={"fp16": fp16, **ZERO1})
    data, found, bits = models.batches(), [], {}
    for step in range(steps):
        if step == overflow_step:
            engine.optimizer.loss_scaler.cur_scale = 2.0**40
        loss = float(engine.train_batch(data_iter=data))
        found.append((loss, engine.skipped_steps, engine.optimizer.loss_scaler.cur_scale))
        if block is not None:
            bits = models.memories(engine)
            slots = [slot for channel in engine._endpoint.channels.values() for slot in channel.held.values()]
            memories = [held.memory for slot in slots for held in slot.values() if held.memory is not None]
            assert all(bool(memory.isfinite().all()) for memory in memories)
    return found, bits


@pytest.mark.parametrize("overflow_step", [None, 5])
def test_overflow_is_as_in_stock(two_ranks, overflow_step):
    stock, *_ = two_ranks.run(scaled, None, overflow_step)
    none, *_ = two_ranks.run(scaled, NONE, overflow_step)
    assert [step[0] for step in none[0]] == [step[0] for step in stock[0]]
    assert none[0] == stock[0]
    if overflow_step is not None:
        skipped = [step[1] for step in stock[0]]
        assert skipped[overflow_step] == skipped[overflow_step - 1] + 1, "the step overflowed"
    scales = {step[2] for step in stock[0]}
    assert len(scales) > 1, "the scale changes"


@pytest.mark.parametrize("overflow_step", [None, 5])
def test_compressed_runs_skip_the_same_steps_and_memories_stay_equal(two_ranks, overflow_step):
    stock, *_ = two_ranks.run(scaled, None, overflow_step)
    int8 = {**INT2, "activations": {"delta": "int8"}, "gradients": {"delta": "int8"}}
    (one, held), (other, also_held) = two_ranks.run(scaled, int8, overflow_step)
    assert held == also_held
    assert [step[1:] for step in one] == [step[1:] for step in other] == [step[1:] for step in stock[0]]


def without_zero(block):
    on_cpu()
    return models.losses(block, {"stock": block is None, "ds": {"fp16": {"enabled": True}}})


def test_without_zero_the_loss_is_not_scaled(two_ranks):
    assert two_ranks.run(without_zero, NONE) == two_ranks.run(without_zero, None)


def rescaled(scale_changes):
    """What a held gradient is after the loss scale changed, against what it was."""
    on_cpu()
    fp16 = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 1000, "hysteresis": 1}
    block = {**INT2, "lazy": {"p_new": 1e-9, "refresh": "slot"}, "gradients": {"delta": "int8"}}
    engine = models.make_engine(block, ds={"fp16": fp16, **ZERO1})
    data = models.batches()
    engine.train_batch(data_iter=data)
    (end,) = [end for end in engine._endpoint.channels if end.direction == "gradients"]
    errors = []
    for change in scale_changes:
        engine.optimizer.loss_scaler.cur_scale *= change
        channel = engine._endpoint.channels[end]
        before = channel.held[0][0].memory.clone()
        engine._endpoints.rescale_gradients(engine._loss_scale())
        channel.begin_step(channel.step, 4)
        after = channel.held[0][0].memory.clone()
        errors.append(torch.equal(after.float(), before.float() * change))
        engine.train_batch(data_iter=data)
    return errors, models.memories(engine)


def test_memories_of_gradients_survive_a_change_of_scale(two_ranks):
    (one, held), (other, also_held) = two_ranks.run(rescaled, [2.0, 0.5, 4.0])
    assert one == other == [True, True, True]
    assert held == also_held
