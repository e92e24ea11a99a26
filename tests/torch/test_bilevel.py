"""Bilevel optimization with one site on each rank: what one process simulates, bit for bit."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks.bilevel.quadratic import Quadratic, make_plan
from clapping_ds import bilevel
from clapping_ds.bilevel import (
    Autograd,
    CentralDifference,
    LocalGossip,
    Penalty,
    Plan,
    RankGossip,
    Sparkle,
)
from clapping_ds.codecs import Eden, Raw
from clapping_ds.link.verification import checksum
from launch.gpt import GPTConfig
from launch.mixture import MixtureRun, train_replica
from tests.cluster import assert_same_error

TIMEOUT_S = 4.0
EDEN4 = Eden(name="eden4")
STRATEGIES = {
    "all of ed": ["ed"] * 3,
    "one each": ["gt", "extra", "semi-atc-gt"],
    "d-soba": ["dsgd"] * 3,
    "tracking": ["atc-gt", "ed", "gt"],
}
SIZE = {"num_x": 6, "num_y": 64}


def solver_of(gossip, strategies, num_sites):
    problem = Quadratic(num_sites, **SIZE)
    zeros = [torch.zeros(size, dtype=torch.float64) for size in SIZE.values()]
    return problem, Sparkle(gossip, *zeros, make_plan(strategies), CentralDifference())


def train(problem, solver, steps):
    for _ in range(steps):
        solver.step(*(problem.losses(site.number) for site in solver.gossip.sites))


def found(solver):
    """By site of this process, and the bytes that it sent."""
    return [
        ([solver.value(level, number) for level in "xyz"], site.bytes_sent)
        for number, site in enumerate(solver.gossip.sites)
    ]


def on_ranks(codec, steps, resumes):
    topology = bilevel.ring(dist.get_world_size())
    by_strategies = {}
    for name, strategies in STRATEGIES.items():
        problem, solver = solver_of(RankGossip(topology, codec), strategies, topology.num_sites)
        train(problem, solver, steps)
        if resumes:
            saved = solver.state_dict()
            problem, solver = solver_of(RankGossip(topology, codec), strategies, topology.num_sites)
            solver.load_state_dict(saved)
        train(problem, solver, steps)
        by_strategies[name] = found(solver)
    return by_strategies


@pytest.mark.parametrize("codec", [Raw(), EDEN4], ids=["raw", "eden4"])
def test_ranks_are_the_simulation(four_ranks, codec):
    steps = 5
    for resumes in (False, True):
        of_ranks = four_ranks.run(on_ranks, codec, steps, resumes)
        for name, strategies in STRATEGIES.items():
            assert_simulated(of_ranks, name, strategies, codec, 2 * steps)


def assert_simulated(of_ranks, name, strategies, codec, steps):
    num_sites = len(of_ranks)
    problem, simulated = solver_of(LocalGossip(bilevel.ring(num_sites), codec), strategies, num_sites)
    train(problem, simulated, steps)
    for (values, num_bytes), of_rank in zip(found(simulated), of_ranks, strict=True):
        ((on_rank, bytes_there),) = of_rank[name]
        assert all(map(torch.equal, values, on_rank))
        assert num_bytes == bytes_there


def on_eight_ranks(steps):
    return [on_ranks(codec, steps, resumes=True) for codec in (Raw(), EDEN4)]


def test_eight_ranks_are_the_simulation(fresh_ranks):
    steps = 2
    by_codec = zip(*fresh_ranks(8).run(on_eight_ranks, steps), strict=True)
    for codec, of_ranks in zip((Raw(), EDEN4), by_codec, strict=True):
        for name, strategies in STRATEGIES.items():
            assert_simulated(of_ranks, name, strategies, codec, 2 * steps)


def on_some_ranks(ranks, steps):
    """Sites in another order than ranks, and a rank without one; saved and resumed."""
    states = None
    for _ in range(2):
        gossip = RankGossip(bilevel.ring(3), EDEN4, ranks=ranks)
        problem, solver = solver_of(gossip, ["ed"] * 3, 3)
        if states is not None:
            solver.load_state_dict(states)
        if gossip.sites:
            train(problem, solver, steps)
        states = solver.state_dict()
    return found(solver) if gossip.sites else None


def test_sites_on_some_ranks_in_any_order(four_ranks):
    ranks = [3, 0, 2]
    outcomes = four_ranks.run(on_some_ranks, ranks, 4)
    problem, simulated = solver_of(LocalGossip(bilevel.ring(3), EDEN4), ["ed"] * 3, 3)
    train(problem, simulated, 8)
    assert outcomes[1] is None
    for (values, num_bytes), rank in zip(found(simulated), ranks, strict=True):
        ((on_rank, bytes_there),) = outcomes[rank]
        assert all(map(torch.equal, values, on_rank))
        assert num_bytes == bytes_there


def differing(what):
    number = dist.get_rank()
    topology = bilevel.full(4) if what == "mixing matrix" and number == 2 else bilevel.ring(4)
    gossip = RankGossip(topology, EDEN4 if what == "codec" and number == 1 else Raw())
    plan = Plan(x_step=0.1 if what == "plan" and number == 3 else 0.01)
    curvature = Penalty(3.0) if what == "curvature" and number == 1 else Autograd()
    x = torch.zeros(3 if what == "x" and number == 0 else 2)
    y = torch.zeros((2, 1) if what == "shape" and number == 1 else 2)
    solver = Sparkle(gossip, x, y.T.contiguous().T if number == 2 else y, plan, curvature)
    if what == "state":
        saved = solver.state_dict()
        solver.load_state_dict({} if number == 3 else saved)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("mixing matrix", "the ranks differ; accepted: the same everywhere\nmixing matrix: "),
        ("codec", "the ranks differ; accepted: the same everywhere\ncodec: "),
        ("plan", "the ranks differ; accepted: the same everywhere\nplan: "),
        ("curvature", "the ranks differ; accepted: the same everywhere\ncurvature: "),
        ("state", "a state of plan = None; accepted: of "),
        ("x", "the ranks differ; accepted: the same everywhere\nx: "),
        (
            "shape",
            "y is torch.float32 of shape (2, 1); accepted: floating-point values of one dimension (rank 1)",
        ),
    ],
)
def test_ranks_that_differ_are_one_error(four_ranks, what, message):
    assert_same_error(four_ranks.outcomes(differing, what), "ValueError", message)


def too_few(num_sites):
    RankGossip(bilevel.ring(num_sites))


def test_as_many_sites_as_ranks(four_ranks):
    message = "a topology of 3 sites on the ranks [0, 1, 2, 3] of 4; accepted: one rank per site"
    assert_same_error(four_ranks.outcomes(too_few, 3), "ValueError", message)


def spoiled(breaks):
    """What a rank ends with when one of them dies, or stalls, in the third step; and after what time."""
    gossip = RankGossip(bilevel.ring(4), timeout_s=TIMEOUT_S)
    problem, solver = solver_of(gossip, ["ed"] * 3, 4)
    train(problem, solver, 2)
    if dist.get_rank() == 1:
        if breaks == "dies":
            os._exit(1)
        time.sleep(2 * TIMEOUT_S)
    start_s = time.monotonic()
    try:
        train(problem, solver, 2)
    except ConnectionError as error:
        return str(error), time.monotonic() - start_s, solver.num_steps
    return None


@pytest.mark.parametrize("breaks", ["dies", "stalls"])
def test_a_neighbour_that_is_gone_is_named(fresh_ranks, breaks):
    outcomes = fresh_ranks(4).outcomes(spoiled, breaks)
    for number in (0, 2):  # its neighbours
        message, took_s, num_steps = outcomes[number]
        assert message.startswith("gossip: rank 1 ended or was silent for too long")
        assert took_s < 2 * TIMEOUT_S
        assert num_steps == 2
    if breaks == "dies":
        message, took_s, _ = outcomes[3]
        assert message.startswith("gossip: rank ")
        assert took_s < 3 * TIMEOUT_S


def mixed(steps):
    gpt = GPTConfig(length=32, width=32, num_heads=2, num_blocks=1)
    run = MixtureRun(steps=steps, gpt=gpt, share_step=1.0, share_start=1, share_interval=2)
    trainer = train_replica(run, {"clapping": {"data_parallel": {"min_numel": 512}}})
    weights = [checksum(each.detach()) for each in trainer.gpt.parameters()]
    return trainer.shares(), weights, trainer.mixture.gossip.sites[0].bytes_sent, trainer.validate()


def test_replicas_learn_a_mixture(four_ranks):
    shares, weights, num_bytes, losses = zip(*four_ranks.run(mixed, 5), strict=True)
    assert all(each == weights[0] for each in weights), "replicas drift"
    for each in shares:
        assert each == pytest.approx(shares[0], abs=0.05)
        assert max(each) > 0.25
    header_and_values, neighbours, num_updates = 48 + 16, 2, 2
    assert set(num_bytes) == {num_updates * neighbours * header_and_values}
    assert losses[0] < 5.5, "the loss of a model that knows nothing is log 256 = 5.545"


def failing(what):
    """What each rank's third step ends with, of which one's loss fails, and what its next attempt."""
    gossip = RankGossip(bilevel.ring(4), EDEN4, timeout_s=TIMEOUT_S)
    problem, solver = solver_of(gossip, ["ed"] * 3, 4)
    train(problem, solver, 2)
    before = found(solver)
    losses, told = problem.losses(dist.get_rank()), []
    broken = losses
    if dist.get_rank() == 1:
        broken = losses._replace(lower=(lambda x, y: y.sum() / 0) if what == "nan" else lambda x, y: y[1000])
    for each in (broken, losses):
        try:
            solver.step(each)
        except (ArithmeticError, ConnectionError, IndexError) as error:
            told.append(f"{type(error).__name__}: {error}")
    is_as_before = all(map(torch.equal, found(solver)[0][0], before[0][0]))
    return told, is_as_before, solver.num_steps


def test_a_step_that_is_not_finite_on_a_rank(fresh_ranks):
    outcomes = fresh_ranks(4).run(failing, "nan")
    for told, is_as_before, num_steps in outcomes[:3]:  # the site and its neighbours
        assert told[0].startswith("ArithmeticError: gossip, round 3: what site 1 has of y.s is not finite")
        assert told[1].startswith("ConnectionError: gossip: a step failed here")
        assert is_as_before and num_steps == 2
    assert outcomes[3][0][-1].startswith("ConnectionError: gossip: ")


def test_a_step_that_failed_before_messages_left_may_be_tried_again(fresh_ranks):
    outcomes = fresh_ranks(4).run(failing, "raises")
    assert outcomes[1][0] == ["IndexError: index 1000 is out of bounds for dimension 0 with size 64"]
    assert outcomes[1][2] == 3
