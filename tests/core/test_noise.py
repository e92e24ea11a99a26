"""The step-size rules keep the stationary loss where they are followed, and their step sizes are stable.

At small size; `benchmarks.training.noise` measures the same at length. Tolerances are four standard errors of
what is compared, which a right implementation misses once in 16,000; all draws have fixed seeds.
"""

import math
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from benchmarks.training.noise import (
    DSIGNSGD,
    NONE,
    NUM_INPUTS,
    QUICK,
    SIGN,
    SIGN_EF14,
    Change,
    Setup,
    apply_change,
    apply_codec,
    apply_network,
    draw_noise,
    draw_student,
    draw_teacher,
    find_gradients,
    find_growth,
    find_mean,
    find_pull,
    find_threshold,
    main,
    make_dropping,
    make_eden,
    measure_stationary,
    predict_loss,
    simulate,
    simulate_delay,
)
from clapping_ds.codecs import Eden
from clapping_ds.gradients.rules import (
    add_variances,
    find_stable_step,
    measure_omega,
    scale_dcsgd,
    scale_dsignsgd,
)

DISTORTIONS = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
"""Max (1960), table I."""
SIZE = replace(QUICK, trials=64, relaxations=16.0)
SIGMAS = 4
BASE = Setup(NONE, 0.01, batch=4)
FAST_BASE = replace(BASE, step=0.03)
DSIGN_BASE = Setup(DSIGNSGD, 0.01 / find_pull(DSIGNSGD, batch=16), batch=16)


@pytest.mark.parametrize("bits", DISTORTIONS)
def test_omega_of_eden_is_that_of_max_codes(bits):
    # Levels are rounded to 8 bits and the scale is bfloat16 (2^-8); the scale fits each group of 128, which
    # takes terms of order 1/128. Together less than 5 percent.
    measured = measure_omega(Eden(name=f"eden{bits}", scale="unbiased"))
    assert measured == pytest.approx(DISTORTIONS[bits] / (1 - DISTORTIONS[bits]), rel=0.05)


def test_rules_are_their_formulas():
    assert scale_dcsgd(batch=4, replicas=2, omega=1.0) == 4
    assert scale_dcsgd(omega=0.5, omega_before=2.0) == 2
    assert scale_dsignsgd(batch=16, replicas=3) == 12
    assert add_variances(1.0, 0.5) == 2
    assert find_stable_step(2.0) == 0.5
    assert find_stable_step(1.0, omega=9.0, replicas=3, delay=4) == pytest.approx(1 / 12)


def test_student_noise_has_its_quartiles_and_means_of_draws_are_stable():
    """With nu = 2, F(x) = 1/2 + x / (2 sqrt(2 + x^2)), so that the quartile is sqrt(2/3)."""
    generator = torch.Generator().manual_seed(0)
    inside = draw_student((1 << 18,), 2, generator).abs() < (2 / 3) ** 0.5
    mean, error = find_mean(inside.double())
    assert abs(mean - 0.5) < SIGMAS * error
    # The mean of 16 draws with infinite variance is wider than a quarter of one.
    one, sixteen = (draw_noise((1 << 14,), 1.5, batch, generator).abs().median() for batch in (1, 16))
    assert sixteen / one > 0.3


@pytest.mark.parametrize(
    "method", [make_dropping(0.571), make_dropping(9), make_eden(2)], ids=lambda m: m.name
)
def test_what_is_compressed_is_right_on_average(method):
    generator = torch.Generator().manual_seed(1)
    value = torch.linspace(-1, 2, 64).expand(2048, 64)
    difference = method.compress(value, 2, generator) - value
    error = difference.std(0) / 2048**0.5
    # The largest of 64 coordinates: two standard errors more.
    assert (difference.mean(0).abs() / error).max() < SIGMAS + 2


@pytest.mark.parametrize(
    ("base", "change", "rule"),
    [
        (BASE, Change(16), "dcsgd"),
        (BASE, Change(replicas=4), "dcsgd"),
        (BASE, Change(4, 1, make_dropping(9)), "dcsgd"),
        (BASE, Change(4, 1, make_eden(1)), "dcsgd"),
        (BASE, Change(method=make_dropping(0.571, 0.571)), "dcsgd"),
        (BASE, Change(4, 1, SIGN), "dcsgd"),
        (BASE, Change(4, 1, SIGN_EF14), "dcsgd"),
        (DSIGN_BASE, Change(4), "dsignsgd"),
        (DSIGN_BASE, Change(1, 4), "dsignsgd"),
    ],
)
def test_the_loss_is_level_where_the_rule_is_followed(base, change, rule):
    ratio, error, second_order = compare(base, change, rule)
    assert abs(ratio - 1) < SIGMAS * error + second_order


@pytest.mark.parametrize(
    ("base", "change", "rule", "expected"),
    [
        (BASE, Change(4), "none", 1 / 4),
        (FAST_BASE, Change(method=make_eden(1)), "none", 1 + make_eden(1).omega),
        (BASE, Change(4, 1, make_dropping(9)), "linear", 10),
        (DSIGN_BASE, Change(4), "linear", 2),
        (FAST_BASE, Change(4, 1, SIGN), "dsignsgd", 1 / 2),
    ],
)
def test_the_loss_is_off_where_it_is_not(base, change, rule, expected):
    ratio, error, second_order = compare(base, change, rule)
    assert abs(ratio - expected) < SIGMAS * error + second_order * expected
    assert abs(ratio - 1) > SIGMAS * error + second_order


@lru_cache
def measure_base(base):
    loss, error, _ = measure_stationary(base, SIZE, 1)
    return loss, error


def compare(base, change, rule):
    """The loss relative to the base's, its standard error, and what the rules leave out: for either run at
    most step * pull * growth / 2, the largest curvature being 1."""
    loss, error = measure_base(base)
    setup, _ = apply_change(base, change, rule)
    changed, changed_error, _ = measure_stationary(setup, SIZE, 2)
    ratio = changed / loss
    seconds = [
        each.step * find_pull(each.method, batch=each.batch) * (1 + each.method.omega / each.replicas)
        for each in (base, setup)
    ]
    return ratio, ratio * math.hypot(error / loss, changed_error / changed), sum(seconds) / 2


def test_the_exact_stationary_loss_is_met_at_a_large_step():
    setup = Setup(make_dropping(9), 0.1, replicas=2)
    loss, error, _ = measure_stationary(setup, replace(SIZE, relaxations=60.0), 3)
    assert abs(loss - predict_loss(setup)) < SIGMAS * error
    first_order = predict_loss(replace(setup, step=1e-6)) * 1e5
    assert abs(loss - first_order) > SIGMAS * error


def test_heavy_tails_leave_signs_level_and_make_unscaled_gradients_diverge():
    """The largest of n losses with tail x^(-nu/2) grows as n^(2/nu); a sign moves x by the step at most."""
    nu, steps = 1.5, 1200
    plain = simulate(Setup(NONE, 0.02, nu=nu), steps, 64, 4)
    signs = simulate(Setup(DSIGNSGD, 0.02 / find_pull(DSIGNSGD, nu), nu=nu), steps, 64, 5)
    early, late = signs[400:800].mean(0), signs[800:].mean(0)
    assert abs(early.mean() - late.mean()) < SIGMAS * math.hypot(find_mean(early)[1], find_mean(late)[1])
    assert signs[400:].max() < 4 * signs[400:].mean()
    assert plain[400:].max() > 30 * plain[400:].mean()
    assert plain[400:].mean() > 10 * signs[400:].mean()


@pytest.mark.parametrize("delay", [0, 4])
@pytest.mark.parametrize("omega", [0.0, 0.57, 9.0])
def test_the_guaranteed_step_is_stable_and_four_times_it_is_not(omega, delay):
    bound = find_stable_step(1.0, omega, delay=delay)
    assert find_growth(0.95 * bound, 1 + omega, delay) < 1 < find_growth(4 * bound, 1 + omega, delay)
    setup = Setup(make_dropping(omega), 0.95 * bound, replicas=1)
    square_T, _ = simulate_delay(setup, delay, 200, 16, 6)
    assert square_T.mean() < 0.1


def test_thresholds_are_those_known_in_closed_form():
    """Without delay 2 / a; without compression 2 sin(pi / (4 tau + 2))."""
    assert find_threshold(10.0, 0) == pytest.approx(0.2, rel=1e-5)
    assert find_threshold(1.0, 4) == pytest.approx(2 * math.sin(math.pi / 18), rel=1e-5)


def test_a_codec_gets_every_gradient_as_a_group_of_its_own():
    codec = make_eden(4).codec
    value = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(7))
    alone = apply_codec(codec, value[:1], 8)
    assert apply_codec(codec, value, 8)[:1].equal(alone)


def test_gradients_of_the_network_are_those_of_autograd():
    generator = torch.Generator().manual_seed(9)
    weights_SHI = draw_teacher(2, generator).requires_grad_()
    input_SNBI = torch.randn(2, 3, 4, NUM_INPUTS, generator=generator)
    target_SNB = torch.randn(2, 3, 4, generator=generator)
    output_SR, _ = apply_network(weights_SHI, input_SNBI.flatten(1, 2))
    losses = (output_SR.view(2, 3, 4) - target_SNB).square().mean(2).mean(1) / 2
    (wanted_SHI,) = torch.autograd.grad(losses.sum(), weights_SHI)
    found_SND = find_gradients(weights_SHI.detach(), input_SNBI, target_SNB)
    # Sums of a few dozen fp32 products of order 1.
    assert torch.allclose(found_SND.mean(1), wanted_SHI.flatten(1), atol=64 * 2**-23)


def test_the_benchmark_runs_and_writes_its_files(tmp_path, monkeypatch, capsys):
    arguments = ["noise", "--quick", "--parts", "network", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert (tmp_path / "noise.json").exists()
    header, *lines = (tmp_path / "noise.csv").read_text().splitlines()
    assert header.startswith("part,method,noise,nu,batch,replicas,omega,step size")
    assert len(capsys.readouterr().out.splitlines()) == len(lines) + 2
