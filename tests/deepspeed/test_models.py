"""Odd tensors, changing shapes, adapters and frozen stages: with nothing compressed the losses are the
reference's, bit for bit; with int2 they are not, and the two ends of each channel hold the same.

The reference is the stock engine. Where it crashes, as the test then says, each layer is wrapped so that it
computes the same and stock can run it (`odd_models.Helped`).
"""

import pytest

from tests import models
from tests.cluster import free_groups
from tests.deepspeed import odd_models
from tests.models import INT2, NONE

STOCK, HELPED = "stock", "stock, layers helped"
STEPS = 3


def feed(lengths=(models.LENGTH,), sizes=(models.BATCH,)):
    """Batches whose length and size change from one to the next, in turns."""
    for number in range(10_000):
        length, size = lengths[number % len(lengths)], sizes[number % len(sizes)]
        yield next(models.batches(seed=number, length=length, size=size))


def losses(engine, num_micro_batches, data):
    """Of training steps with so many micro-batches each, and of an evaluation."""
    found = []
    for number in num_micro_batches:
        engine.set_train_batch_size(
            number * engine.micro_batch_size * engine.grid.get_data_parallel_world_size()
        )
        found.append(float(engine.train_batch(data_iter=data)))
    return [*found, float(engine.eval_batch(feed()))]


def run(kind, num_stages, reference, num_micro_batches=(4,) * STEPS, data=None, ds=None, module_options=None):
    """Losses of the reference, losses with nothing compressed, and losses and memories with int2."""
    found = []
    for block in (None, NONE, INT2):
        layers, options = odd_models.layers(kind), dict(module_options or {})
        if block is None:
            layers = [odd_models.Helped(layer) for layer in layers] if reference == HELPED else layers
            options["dynamic_shape"] = data is not None
        engine = odd_models.start(layers, num_stages, block, ds, **options)
        found.append(losses(engine, num_micro_batches, feed(**(data or {}))))
        if block is INT2:
            found.append(models.memories(engine))
        del engine
        free_groups()
    return found


def check(outcomes):
    ends = {}
    for reference, none, int2, memories in outcomes:
        assert none == reference
        assert int2 != reference
        for channel, bits in memories.items():
            ends.setdefault(channel, []).append(bits)
    assert len(ends) == 2 * (len(outcomes) - 1)
    for one, other in ends.values():
        assert one == other
        assert any(one.values())


def on(num_stages, two_ranks, four_ranks):
    return two_ranks if num_stages == 2 else four_ranks


def test_micro_batches_of_one_sample(two_ranks):
    ds = {"train_micro_batch_size_per_gpu": 1}
    check(two_ranks.run(run, "frozen:0:0", 2, STOCK, (4,) * STEPS, {"sizes": (1,)}, ds))


def test_tensors_without_elements(four_ranks):
    check(four_ranks.run(run, "empty", 4, STOCK))


def test_activations_that_are_not_contiguous(four_ranks):
    """gloo and NCCL refuse them, and so stock crashes."""
    check(four_ranks.run(run, "turned", 4, HELPED))


@pytest.mark.parametrize(
    ("num_stages", "how", "place"),
    [(2, "passed", "first"), (2, "cut", "last"), (4, "unused", "first"), (4, "made", "last")],
)
def test_a_float_mask_that_needs_no_gradient(two_ranks, four_ranks, num_stages, how, place):
    """On stock a stage whose output needs no gradient crashes in its backward pass."""
    check(on(num_stages, two_ranks, four_ranks).run(run, f"masked:{how}:{place}", num_stages, HELPED))


@pytest.mark.parametrize(("num_stages", "count"), [(2, 4), (4, 1), (4, 4)])
def test_first_stages_without_parameters(two_ranks, four_ranks, num_stages, count):
    """Stock crashes as above; with one such layer the first stage has others that train, and stock runs."""
    reference = STOCK if count == 1 else HELPED
    kind = f"no parameters first:{count}"
    check(on(num_stages, two_ranks, four_ranks).run(run, kind, num_stages, reference))


@pytest.mark.parametrize(("num_stages", "stop"), [(2, 4), (4, 4)])
def test_frozen_first_stages(two_ranks, four_ranks, num_stages, stop):
    """Stock crashes as above."""
    check(on(num_stages, two_ranks, four_ranks).run(run, f"frozen:0:{stop}", num_stages, HELPED))


@pytest.mark.parametrize(("num_stages", "frozen"), [(4, "2:6"), (4, "6:8")])
def test_frozen_stages_behind_others(two_ranks, four_ranks, num_stages, frozen):
    """Stock's clipping of gradients crashes where a stage has none."""
    check(on(num_stages, two_ranks, four_ranks).run(run, f"frozen:{frozen}", num_stages, HELPED))


def test_adapters_in_every_stage(two_ranks):
    check(two_ranks.run(run, "adapters:1", 2, STOCK))


@pytest.mark.parametrize(("num_stages", "first"), [(2, 4), (4, 6)])
def test_adapters_in_the_last_stages_only(two_ranks, four_ranks, num_stages, first):
    """Stock crashes as above."""
    check(on(num_stages, two_ranks, four_ranks).run(run, f"adapters:{first}", num_stages, HELPED))


def test_lengths_that_change_with_dynamic_shape(four_ranks):
    data, options = {"lengths": (64, 32, 48, 56, 40)}, {"dynamic_shape": True}
    check(four_ranks.run(run, "frozen:0:0", 4, STOCK, (4,) * STEPS, data, {}, options))


def test_a_short_last_batch_needs_no_dynamic_shape(two_ranks):
    """Stock is given dynamic_shape, without which it hangs."""
    check(two_ranks.run(run, "frozen:0:0", 2, STOCK, (4,) * 5, {"sizes": (2,) * 6 + (1,)}))


def test_number_of_micro_batches_changes(four_ranks):
    check(four_ranks.run(run, "frozen:0:0", 4, STOCK, (4, 2, 6, 1, 4)))
