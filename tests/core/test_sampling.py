"""The coin and the batches that are kept."""

import pytest
import torch

from clapping_ds.stage.sampling import Coin, LazySampler, draw_uniform


@pytest.mark.parametrize("refresh", ["step", "slot", "cycle"])
def test_step_0_is_all_fresh(refresh):
    assert Coin(0.1, refresh, seed=5).toss(0, 6) == [True] * 6


def test_coin_depends_on_its_arguments_alone():
    """A change of these numbers would change every resumed run."""
    assert [round(draw_uniform(1234, step, 0), 6) for step in range(3)] == [0.617552, 0.66225, 0.896686]
    assert Coin(0.5, "slot", 1).toss(7, 8) == Coin(0.5, "slot", 1).toss(7, 8)
    assert draw_uniform(1, 2, 3) != draw_uniform(1, 3, 2) != draw_uniform(2, 1, 3)


@pytest.mark.parametrize("refresh", ["step", "slot"])
def test_mean_is_p_new(refresh):
    """Within 4 standard errors of 8,000 tosses, or of 2,000 where a step shares one."""
    coin = Coin(0.3, refresh, seed=11)
    tosses = [fresh for step in range(1, 2001) for fresh in coin.toss(step, 4)]
    independent = len(tosses) / (4 if refresh == "step" else 1)
    assert abs(sum(tosses) / len(tosses) - 0.3) < 4 * (0.3 * 0.7 / independent) ** 0.5


def test_step_tosses_one_coin():
    coin = Coin(0.5, "step", seed=2)
    assert all(len(set(coin.toss(step, 5))) == 1 for step in range(50))


@pytest.mark.parametrize(("p_new", "num_slots", "per_step"), [(0.5, 4, 2), (0.25, 8, 2), (1.0, 3, 3)])
def test_cycle_is_round_robin(p_new, num_slots, per_step):
    coin = Coin(p_new, "cycle", seed=0)
    steps = [coin.toss(step, num_slots) for step in range(1, 41)]
    assert all(sum(fresh) == per_step for fresh in steps)
    assert {sum(column) for column in zip(*steps, strict=True)} == {40 * per_step // num_slots}


def test_cycle_spreads_the_fresh_slots():
    coin = Coin(0.5, "cycle", seed=0)
    even = [True, False] * 3
    assert [coin.toss(step, 6) for step in (1, 2, 3)] == [even, even[::-1], even]
    assert Coin(1e-9, "cycle", seed=0).toss(10**9, 3) == [False, False, True]


def test_cycle_keeps_the_mean_where_it_is_no_whole_number():
    coin = Coin(0.3, "cycle", seed=0)
    assert sum(sum(coin.toss(step, 5)) for step in range(1, 21)) == 30


@pytest.mark.parametrize("refresh", ["step", "slot", "cycle"])
def test_a_pool_is_used_in_rounds_in_orders_of_their_own_and_the_first_is_all_fresh(refresh):
    coin = Coin(0.25, refresh, seed=3, pool=5)
    rounds = [[coin.pick(step) for step in range(first, first + 5)] for first in range(0, 100, 5)]
    assert all(sorted(entries) == list(range(5)) for entries in rounds)
    assert len({tuple(entries) for entries in rounds}) > 10
    assert all(coin.toss(step, 4) == [True] * 4 for step in range(5))
    assert not all(all(coin.toss(step, 4)) for step in range(5, 10))


def test_the_orders_of_a_pool_depend_on_its_seed_alone():
    """A change of these numbers would change every resumed run."""
    assert [Coin(0.5, "step", 1234, 4).pick(step) for step in range(8)] == [0, 1, 3, 2, 2, 3, 1, 0]


@pytest.mark.parametrize(("p_new", "num_slots", "pool"), [(0.25, 4, 16), (0.25, 2, 8), (0.3, 5, 7)])
def test_cycle_refreshes_each_slot_of_a_pool_as_often(p_new, num_slots, pool):
    coin, num_rounds = Coin(p_new, "cycle", 1, pool), 20
    fresh = {entry: [] for entry in range(pool)}
    for step in range(pool, (1 + num_rounds) * pool):
        fresh[coin.pick(step)].append(coin.toss(step, num_slots))
    sums = [[sum(column) for column in zip(*rows, strict=True)] for rows in fresh.values()]
    assert all(abs(number - p_new * num_rounds) <= 1 for row in sums for number in row)
    assert sum(map(sum, sums)) == pytest.approx(p_new * num_rounds * num_slots * pool)
    per_step = [sum(coin.toss(step, num_slots)) for step in range(pool, 10 * pool)]
    assert max(per_step) - min(per_step) <= 1


@pytest.mark.parametrize("refresh", ["step", "slot", "cycle"])
def test_with_p_new_0_no_slot_is_fresh_after_the_first_round(refresh):
    coin = Coin(0.0, refresh, seed=3, pool=3)
    assert not any(any(coin.toss(step, 4)) for step in range(3, 300))


def batch(number):
    return torch.tensor([number]), {"label": torch.tensor([10 * number])}


def begin(sampler, fresh, source, entry=0):
    sampler.draw(sum(fresh), lambda: next(source))
    sampler.begin(fresh, entry)


def numbers(sampler, num_slots):
    return [int(sampler.next()[0]) for _ in range(num_slots)]


def test_draws_only_fresh_slots():
    source = map(batch, range(100))
    sampler = LazySampler()
    begin(sampler, [True] * 3, source)
    assert numbers(sampler, 3) == [0, 1, 2]
    begin(sampler, [False, True, False], source)
    assert numbers(sampler, 3) == [0, 3, 2]


def test_each_entry_keeps_its_batches():
    source = map(batch, range(100))
    sampler = LazySampler()
    begin(sampler, [True] * 2, source, entry=1)
    begin(sampler, [True] * 3, source, entry=0)
    begin(sampler, [False, True], source, entry=1)
    assert numbers(sampler, 2) == [0, 5]
    loaded = LazySampler()
    loaded.load_state_dict(sampler.state_dict(), torch.device("cpu"))
    for each in (sampler, loaded):
        begin(each, [False] * 3, source, entry=0)
        assert numbers(each, 3) == [2, 3, 4]


def test_shapes_are_of_all_entries_and_of_what_is_drawn():
    one, other = torch.zeros(2), torch.zeros(3)
    sampler = LazySampler()
    begin(sampler, [True, True], iter([one, one]), entry=0)
    assert len(sampler.list_shapes()) == 1
    begin(sampler, [True, True], iter([one, other]), entry=1)
    assert len(sampler.list_shapes()) == 2
    begin(sampler, [False], iter([]), entry=1)
    assert len(sampler.list_shapes()) == 1
    sampler.draw(1, lambda: other)
    assert len(sampler.list_shapes()) == 2


def test_number_of_slots_changes():
    source = map(batch, range(100))
    sampler = LazySampler()
    begin(sampler, [True] * 3, source)
    begin(sampler, [False] * 2, source)
    assert numbers(sampler, 2) == [0, 1]
    begin(sampler, [False, False, True], source)
    assert numbers(sampler, 3) == [0, 1, 3]


def test_an_iterator_that_ends_loses_nothing():
    source = map(batch, range(4))
    sampler = LazySampler()
    begin(sampler, [True] * 3, source)
    with pytest.raises(StopIteration):
        begin(sampler, [True] * 3, source)
    more = map(batch, range(50, 60))
    begin(sampler, [True] * 3, more)
    assert numbers(sampler, 3) == [3, 50, 51]


def test_what_was_drawn_for_a_step_that_lacked_some_is_used_in_order_whichever_slots_are_fresh_then():
    source = map(batch, range(5))
    sampler = LazySampler()
    begin(sampler, [True] * 2, source)
    with pytest.raises(StopIteration):
        begin(sampler, [True] * 4, source)
    begin(sampler, [False, True], source)
    assert numbers(sampler, 2) == [0, 2]
    begin(sampler, [True, False, True], source)
    assert numbers(sampler, 3) == [3, 2, 4]


def test_of_what_was_drawn_all_but_the_first_can_be_dropped():
    sampler = LazySampler()
    sampler.draw(1, lambda: batch(7))
    kept = sampler.num_waiting
    sampler.draw(3, lambda: batch(8))
    sampler.drop_drawn(kept)
    begin(sampler, [True, True], map(batch, [9]))
    assert numbers(sampler, 2) == [7, 9]


def test_what_was_drawn_after_a_state_is_gone_with_that_state():
    source = map(batch, range(3))
    sampler = LazySampler()
    begin(sampler, [True] * 2, source)
    state = sampler.state_dict()
    with pytest.raises(StopIteration):
        begin(sampler, [True] * 2, source)
    sampler.load_state_dict(state, torch.device("cpu"))
    begin(sampler, [False, True], map(batch, range(50, 60)))
    assert numbers(sampler, 2) == [0, 50]


def test_a_loaded_batch_is_where_it_was():
    """`meta` stands in for a GPU: a state is read onto the CPU, and what was elsewhere goes back."""
    sampler = LazySampler()
    begin(sampler, [True], iter([(torch.zeros(2, device="meta"), torch.zeros(3), "text")]))
    state = sampler.state_dict()
    state["pool"] = {0: [(torch.zeros(2), torch.zeros(3), "text")]}
    sampler.load_state_dict(state, torch.device("meta"))
    assert [leaf if leaf == "text" else leaf.device.type for leaf in sampler.next()] == [
        "meta",
        "cpu",
        "text",
    ]


def test_batches_are_safe_from_both_sides():
    buffer = torch.tensor([1])
    sampler = LazySampler()
    begin(sampler, [True], iter([buffer]))
    buffer.fill_(9)
    sampler.next().fill_(8)
    begin(sampler, [False], iter([]))
    assert int(sampler.next()) == 1
