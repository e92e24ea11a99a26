"""What is printed of an exchange: its cost, and what it asks of the step size."""

import pytest

from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.rules import add_variances, describe, find_stable_step, measure_omega, scale_dcsgd

EDEN1 = {"name": "eden1", "scale": "unbiased"}


def said(**plan):
    return describe(DataParallelConfig.model_validate(plan), 8, has_gather=True)


def test_the_default_asks_for_nothing():
    assert said().splitlines() == [
        "gradients of 8 replicas: eden4 scale=unbiased 4.12 bit, eden4 scale=unbiased 4.12 bit (7.8x less than fp32)",  # noqa: E501
        "step size of SGD: as uncompressed",
    ]


def test_noise_that_grows_is_told_with_what_makes_up_for_it():
    text = said(scatter=EDEN1, gather=EDEN1, error_feedback="none")
    omega = measure_omega(DataParallelConfig.model_validate({"scatter": EDEN1}).scatter)
    k = scale_dcsgd(omega=add_variances(omega, omega))
    assert f"1 + omega = {1 / k:.2f}; learning rate x {k:.2f}, or batch x {1 / k:.2f}" in text


def test_feedback_keeps_the_step_size_and_shrinking_is_told():
    assert said(scatter="sign", gather="sign", warmup_steps=1).endswith("as uncompressed")
    assert said(scatter="sign", error_feedback="none").endswith("0.64 times as fast without error feedback")


def test_a_warm_up_is_advised_with_one_bit_and_feedback():
    assert said(scatter="sign").splitlines()[-1].startswith("warmup_steps = 0: with Adam give those")
    for plan in ({"scatter": "sign", "error_feedback": "none"}, {"scatter": EDEN1}, {"scatter": "eden2"}):
        assert "warmup_steps" not in said(**plan)


def test_a_second_error_is_the_same_on_all_replicas():
    assert find_stable_step(2.0) == 0.5
    assert find_stable_step(1.0, omega=8.0, replicas=4) == pytest.approx(1 / 3)
    assert find_stable_step(1.0, omega=8.0, replicas=4, gather=1.0) == pytest.approx(1 / 6)
    assert find_stable_step(1.0, omega=12.0, replicas=4, delay=3) == pytest.approx(1 / (4 + 3 * 2))
