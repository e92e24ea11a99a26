"""What the DeepSpeed engine is fed: lazily drawn batches, lengths that change, values that are not finite,
iterators that end."""

from itertools import islice
from unittest import mock

import pytest
import torch
from deepspeed.runtime.dataloader import DeepSpeedDataLoader

from tests import models
from tests.cluster import assert_same_error
from tests.models import INT2, NONE, PLACES, POOL

ALL_FRESH = {**INT2, "lazy": {"p_new": 1 - 1e-9, "refresh": "slot"}}
"""In all likelihood, where 1 would be refused."""


def lazily(sizes):
    """Which samples each loading stage used, as the first token of each micro-batch."""
    engine = models.make_engine({**INT2, "lazy": {"refresh": "cycle"}})
    used = []
    original = engine._endpoint.sampler.next

    def spying():
        batch = original()
        used.append(int(batch[0][0, 0]) * 1000 + int(batch[0][0, 1]))
        return batch

    engine._endpoint.sampler.next = spying
    data = models.batches()
    drawn = 0

    def counting():
        nonlocal drawn
        for batch in data:
            drawn += 1
            yield batch

    source = counting()
    for size in sizes:
        engine.set_train_batch_size(size * models.BATCH)
        engine.train_batch(data_iter=source)
    return used, drawn, {slot for channel in engine._endpoint.channels.values() for slot in channel.held}


def test_both_loading_stages_replay_the_same_batches(two_ranks):
    (first, drawn, _), (last, also_drawn, _) = two_ranks.run(lazily, [4, 4, 4])
    assert first == last
    assert drawn == also_drawn == 4 + 2 + 2
    assert [a == b for a, b in zip(first[:4], first[4:8], strict=True)] == [False, True, False, True]


def with_data_of_each_step(kind):
    """Losses of a run whose steps have lists or iterators of their own; and of one with a single iterator."""
    found = []
    for is_anew in (True, False):
        engine, data, losses = (
            models.make_engine({**POOL, "lazy": {"pool": 2, "refresh": "slot"}}),
            models.batches(),
            [],
        )
        for _ in range(6):
            if is_anew:
                own = list(islice(data, engine.clapping_num_fresh))
                losses.append(float(engine.train_batch(data_iter=kind(own))))
            else:
                losses.append(float(engine.train_batch(data_iter=data)))
        found.append((losses, models.memories(engine), engine.clapping_num_drawn))
    return found


@pytest.mark.parametrize("kind", [list, iter])
def test_each_step_may_have_data_of_its_own(two_ranks, kind):
    for anew, single in two_ranks.run(with_data_of_each_step, kind):
        assert anew == single


def lists_that_lack_some(short_rank):
    """What the sampler holds after a step whose list was too short on one rank, and the same step with
    another list."""
    engine = models.make_engine(INT2)
    lists = [list(islice(models.batches(), first, first + 4)) for first in (0, 4)]
    short = lists[0][:3] if engine.global_rank == short_rank else lists[0]
    with pytest.raises(StopIteration, match="data_iter ended in step 0, which needs 4"):
        engine.train_batch(data_iter=short)
    expected = engine.clapping_num_fresh
    engine.train_batch(data_iter=lists[1])
    used = [int(batch[0][0, 0]) for batch in engine._endpoint.sampler._pool[0]]
    return expected, used, [int(batch[0][0, 0]) for batch in lists[1]]


@pytest.mark.parametrize("short_rank", [0, 1])
def test_of_a_list_that_lacked_some_nothing_is_used_later(two_ranks, short_rank):
    for expected, used, second in two_ranks.run(lists_that_lack_some, short_rank):
        assert expected == 4
        assert used == second


def lists_where_lazy_sampling_is_switched_off():
    """Micro-batches drawn from lists of as many as the engine said, by step."""
    block = {**POOL, "lazy": {"p_new": 0.25, "refresh": "cycle"}, "links": {"min_gain": 0.5}}
    engine, data, said = models.make_engine(block), models.batches(), []
    for _ in range(6):
        said.append(engine.clapping_num_fresh)
        engine.train_batch(data_iter=list(islice(data, said[-1])))
    return said, engine.clapping_num_drawn


def test_a_step_whose_lazy_sampling_was_switched_off_says_so_before_it_begins(two_ranks):
    for said, num_drawn in two_ranks.run(lists_where_lazy_sampling_is_switched_off):
        assert said == [4, 1, 1, 4, 4, 4]
        assert num_drawn == sum(said)


def uncompressed_with_lists():
    engine, data = models.make_engine({"enabled": False}), models.batches()
    losses = [
        float(engine.train_batch(data_iter=list(islice(data, engine.clapping_num_fresh)))) for _ in range(2)
    ]
    return losses, engine.clapping_num_drawn


def test_a_script_that_makes_lists_runs_stock_as_well(two_ranks):
    for losses, num_drawn in two_ranks.run(uncompressed_with_lists):
        assert len(losses) == 2
        assert num_drawn == 8


def without_room(free):
    """A disk that is too small for the pool, on one rank's machine or on every one's."""
    usage = mock.Mock(free=free if torch.distributed.get_rank() == 1 else 1 << 40)
    engine = models.make_engine({**POOL, "memory": PLACES["disk"]})
    with mock.patch("clapping_ds.link.disk.shutil.disk_usage", return_value=usage):
        engine.train_batch(data_iter=models.batches())


def test_a_disk_that_is_too_small_for_the_pool_is_one_error_after_the_first_step(two_ranks):
    outcomes = two_ranks.outcomes(without_room, 1 << 12)
    assert_same_error(outcomes, "ValueError", "GiB are free, a pool of 3 needs")


def with_more_than_is_drawn():
    """Micro-batches that the sampler took, by step, of lists of as many as there are slots."""
    engine, data, taken = models.make_engine(POOL), models.batches(), []
    for _ in range(5):
        own = list(islice(data, 4))
        expected = engine.clapping_num_fresh
        engine.train_batch(data_iter=own)
        taken.append((expected, sum(engine._endpoints.fresh)))
    return taken, engine.clapping_num_drawn


def test_of_a_step_s_list_as_many_are_drawn_as_was_said(two_ranks):
    for taken, num_drawn in two_ranks.run(with_more_than_is_drawn):
        assert taken == [(4, 4)] * 3 + [(1, 1)] * 2
        assert num_drawn == 14


def test_number_of_micro_batches_changes(two_ranks):
    for used, drawn, slots in two_ranks.run(lazily, [4, 2, 6]):
        assert len(used) == 12
        assert drawn == 4 + 1 + 5  # slots 2 to 5 are new, and it is the turn of 1, 3 and 5
        assert slots == set(range(6))
    assert two_ranks.run(lazily, [4, 2])[0][2] == {0, 1}


def with_lengths(lengths, stock=False):
    engine = models.make_engine(None if stock else NONE, stock=stock)
    found = []
    for step, length in enumerate(lengths):
        if stock:
            engine.reset_activation_shape()
        found.append(float(engine.train_batch(data_iter=models.batches(seed=step, length=length))))
    return found


def test_a_curriculum_needs_no_call_of_ours(two_ranks):
    lengths = [16, 16, 32, 32, 64]
    assert two_ranks.run(with_lengths, lengths) == two_ranks.run(with_lengths, lengths, True)


def short_last_batch(block):
    engine = models.make_engine(block)
    sizes = [2, 2, 2, 1, 2, 2, 2, 2, 2, 1, 1, 2]
    data = iter([next(models.batches(seed=i, size=size)) for i, size in enumerate(sizes)])
    found = [float(engine.train_batch(data_iter=data)) for _ in range(3)]
    return found, models.memories(engine)


def test_batches_of_unequal_size(two_ranks):
    (first, one), (second, other) = two_ranks.run(short_last_batch, ALL_FRESH)
    assert first == second
    assert one == other


LOADER_INIT = DeepSpeedDataLoader.__init__


def without_workers(loader, **options):
    LOADER_INIT(loader, **{**options, "num_local_io_workers": 0})


def from_training_data(block, stock=False):
    """DeepSpeed's loader without its two worker processes, which take ten seconds to end."""
    tokens, labels = zip(*islice(models.batches(size=1), 64), strict=True)
    data = torch.utils.data.TensorDataset(torch.cat(tokens), torch.cat(labels))
    with mock.patch.object(DeepSpeedDataLoader, "__init__", without_workers):
        engine = models.make_engine(block, stock=stock, training_data=data)
    return [float(engine.train_batch()) for _ in range(3)]


def test_training_data(two_ranks):
    assert two_ranks.run(from_training_data, NONE) == two_ranks.run(from_training_data, None, True)
    one, other = two_ranks.run(from_training_data, INT2)
    assert one == other


def not_finite(block):
    engine = models.make_engine(block, stock=block is None)
    data = models.batches()
    engine.train_batch(data_iter=data)
    if engine.is_first_stage():
        next(engine.module.parameters()).data[5] = float("inf")
    loss = float(engine.train_batch(data_iter=data))
    if block is None:
        return loss, {}
    slots = [slot for channel in engine._endpoint.channels.values() for slot in channel.held.values()]
    assert all(bool(held.memory.isfinite().all()) for slot in slots for held in slot.values())
    return loss, models.memories(engine)


def test_what_is_not_finite_reaches_the_loss_but_not_the_memories(two_ranks):
    (stock, _), *_ = two_ranks.run(not_finite, None)
    (loss, one), (_, other) = two_ranks.run(not_finite, ALL_FRESH)
    assert stock != stock
    assert loss != loss
    assert one == other


def ends_in_mid_step(ending_ranks):
    engine = models.make_engine(INT2 | {"lazy": {"refresh": "cycle"}})
    data = list(islice(models.batches(), 40))
    ends = engine.global_rank in ending_ranks
    iterator = iter(data[:5] if ends else data)
    losses = [float(engine.train_batch(data_iter=iterator))]
    weights = [p.detach().clone() for p in engine.module.parameters()]
    try:
        engine.train_batch(data_iter=iterator)
    except StopIteration as error:
        message = str(error)
    assert all(torch.equal(a, b) for a, b in zip(weights, engine.module.parameters(), strict=True))
    rest = iter(data[5:]) if ends else iterator
    losses += [float(engine.train_batch(data_iter=rest)) for _ in range(2)]
    return message, losses, models.memories(engine)


def without_end():
    engine = models.make_engine(INT2 | {"lazy": {"refresh": "cycle"}})
    return models.train(engine, 3)


@pytest.mark.parametrize("ending_ranks", [(0,), (1,), (0, 1)])
def test_an_iterator_that_ends_in_mid_step_stops_every_rank_and_loses_nothing(two_ranks, ending_ranks):
    (message, losses, one), (also, _, other) = two_ranks.run(ends_in_mid_step, ending_ranks)
    assert message == also
    assert "data_iter ended in step 1, which needs 2 new micro-batches" in message
    assert losses == two_ranks.run(without_end)[0]
    assert one == other


def test_an_iterator_that_ends_stops_four_stages(four_ranks):
    assert_same_error(
        four_ranks.outcomes(models.train_on_too_little), "StopIteration", "data_iter ended in step 0"
    )
