"""Ways to train at equal time: DiLoCo's and ZeRO++'s arithmetic, and times as worked out by hand."""

from itertools import islice

import pytest
import torch

from benchmarks.files import RESULTS
from benchmarks.training import curves
from benchmarks.training.equal_time import (
    BATCHES,
    SETTINGS,
    compare,
    find_loss_after,
    find_step,
    list_candidates,
    list_curves,
)
from benchmarks.training.ways import (
    GROUP,
    OF_CURVES,
    OUTER_MOMENTUM,
    OUTER_RATE,
    SCRATCH,
    TUNING,
    WAYS,
    average_,
    diloco,
    quantize,
    together,
)


def test_quantized_is_near_and_has_so_many_levels():
    value = torch.randn(3, GROUP, generator=torch.Generator().manual_seed(0))
    for bits in (8, 4):
        found = quantize(value, bits)
        half_step = value.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1) / 2
        assert ((found - value).abs() <= half_step * 1.0001).all()
        assert all(len(row.unique()) <= 2**bits - 1 for row in found)
    assert torch.equal(quantize(value[0], 4), value[0])
    assert not quantize(torch.zeros(2, 3), 4).any()


def test_the_outer_step_is_nesterovs_along_the_mean_change():
    shared = [torch.tensor([1.0, 2.0])]
    sets = [[torch.tensor([0.0, 2.0])], [torch.tensor([0.5, 1.0])]]
    outer = torch.optim.SGD(shared, OUTER_RATE, OUTER_MOMENTUM, nesterov=True)
    average_(outer, shared, sets)
    wanted = torch.tensor([1.0, 2.0]) - OUTER_RATE * (1 + OUTER_MOMENTUM) * torch.tensor([0.75, 0.5])
    assert all(torch.allclose(mine[0], wanted, atol=1e-6) for mine in [shared, *sets])


def test_replicas_of_diloco_see_the_data_of_one_and_are_equal_after_an_outer_step():
    task = curves.TASKS[OF_CURVES[SCRATCH]]
    alone, one = diloco(2)(task, 1), together(4)(task, 1)
    first = [next(run.of_steps) for run in (alone, one)]
    assert first[0] == pytest.approx(first[1])
    second = list(islice(alone.of_steps, 2))
    assert second[0] == pytest.approx(next(one.of_steps), abs=0.05)


def test_the_committed_losses_are_of_these_ways():
    found = list_curves(curves.read_curves(RESULTS / "ways.csv"))
    assert set(found) <= {(kind, name) for kind, ways in WAYS.items() for name in ways}
    assert all((kind, name) in found for kind in (SCRATCH, TUNING) for name in ("uncompressed", "ZeRO++"))


def test_every_candidate_has_losses_to_be_measured():
    for setting in SETTINGS:
        found = list(list_candidates(setting, BATCHES[0], 1))
        assert {candidate.curve for candidate in found} == set(WAYS[setting.kind])
        assert len({candidate.way for candidate in found}) == len(found)


def test_steps_and_losses_of_a_curve():
    curve = [(10, 4.0), (20, 3.0), (30, 2.0)]
    assert find_step(curve, 2.5, is_stepped=False) == 25
    assert find_step(curve, 2.5, is_stepped=True) == 30
    assert find_step(curve, 5.0, is_stepped=False) == 10
    assert find_step(curve, 1.0, is_stepped=True) is None
    assert find_loss_after(curve, 25, is_stepped=False) == 2.5
    assert find_loss_after(curve, 25, is_stepped=True) == 3.0
    assert find_loss_after(curve, 5, is_stepped=True) is None
    assert find_loss_after(curve, 31, is_stepped=False) == 2.0
    assert find_loss_after(curve, 40, is_stepped=False) is None


def test_times_by_hand():
    """A loss that falls by a thousandth in a step, and by half of it over links."""
    steps = range(100, 1000, 100)
    made = {
        (SCRATCH, "uncompressed"): {1: [(step, 5 - step / 1000) for step in steps]},
        (SCRATCH, "pipeline, eden4"): {1: [(step, 5 - step / 2000) for step in steps]},
    }
    rows = {row["way"]: row for row in compare(made, SETTINGS[0], 256, 1)}
    ours, stock = rows["pipeline of 4, eden4"], rows["pipeline of 4, stock"]
    assert (ours["steps"], stock["steps"]) == (600, 300)
    assert stock["time"] == pytest.approx(stock["step"], rel=0.01)
    assert ours["time"] == pytest.approx(2 * ours["step"], rel=0.01)
    assert ours["loss at 1"] == pytest.approx(5 - 300 / ours["step"] / 2000, abs=0.002)
    assert "DiLoCo, H = 30" not in rows
