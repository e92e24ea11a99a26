"""What the benchmarks compress is there and fit for it, and shows what the codecs' options are for."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.codecs import ac_sgd, capture, quality
from benchmarks.files import RESULTS
from clapping_ds.codecs import Quantizer

CAPTURED = RESULTS / "captured.npz"
DIRECTIONS = ("activations", "gradients")


@pytest.fixture(scope="module")
def captured():
    return quality.messages(CAPTURED)


def squared_error(codec, tensors):
    return quality.errors(quality.Ours(codec, codec.name), tensors)[0] ** 2


def with_outliers(x):
    """Every 32nd channel times 20, as wide models have them."""
    x = x.clone()
    x[..., ::32] *= 20.0
    return x


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_captured_file_has_the_documented_shape_and_finite_values(direction):
    origin = json.loads(CAPTURED.with_suffix(".json").read_text())
    num_tokens = origin["tokens per sample"] // capture.TOKEN_STRIDE
    with np.load(CAPTURED) as file:
        values = file[direction]
    assert (origin["steps"], origin["depths"]) == (list(capture.STEPS), list(capture.DEPTHS))
    assert values.shape == (
        len(capture.STEPS), len(capture.DEPTHS), 2, 1, num_tokens, origin["width"]
    )  # fmt: skip
    assert values.dtype == np.float32
    assert np.isfinite(values).all()


def test_a_delta_is_what_one_optimizer_step_changed(captured):
    for direction in DIRECTIONS:
        with np.load(CAPTURED) as file:
            before, after = file[direction][-1, 0]
        key, delta = captured[direction, "key"], captured[direction, "delta"]
        assert len(key) == len(delta) == len(capture.STEPS) * len(capture.DEPTHS)
        index = (len(capture.STEPS) - 1) * len(capture.DEPTHS)
        assert torch.equal(key[index], torch.from_numpy(before))
        assert torch.equal(delta[index], torch.from_numpy(after - before))


def test_every_configuration_exists_and_keeps_something(captured):
    # Not: loses less than all. Beside a massive channel, int3 and int2 with the maximum scale, and sign, make
    # values that are smaller than their least level larger than they are.
    methods = list(quality.ours())
    assert len({method.name for method in methods}) == len(quality.CONFIGURATIONS)
    assert len({method.codec for method in methods}) == len(quality.CONFIGURATIONS), "two are the same codec"
    for method in methods:
        error, cosine = quality.errors(method, captured["activations", "key"][:1])
        assert 0.0 < error < math.inf and 0.0 < cosine <= 1.0, method.name


def test_speed_names_the_paths_that_there_are(monkeypatch):
    monkeypatch.setattr(quality, "NUM_ROUNDS", 1)
    method = next(method for method in quality.ours() if method.name.startswith("topk"))
    figures = quality.speed(method, (8, 1024))
    assert [name for name, figure in figures.items() if figure is None] == [
        f"compiled {action} {unit}" for action in ("encode", "decode") for unit in ("GB/s", "of copy")
    ]
    assert all(figure > 0 and math.isfinite(figure) for figure in figures.values() if figure is not None)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rotation_lowers_the_error_of_int4_where_there_are_outliers(captured, direction):
    for number, x in enumerate(captured[direction, "key"]):
        tensors = [with_outliers(x)]
        rotated = squared_error(Quantizer(name="int4", rotate=True), tensors)
        assert rotated < squared_error(Quantizer(name="int4"), tensors), number


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["int3", "int2"])
def test_a_least_squares_scale_has_at_most_nine_tenths_of_the_squared_error(captured, direction, name):
    for number, x in enumerate(captured[direction, "key"]):
        fitted = squared_error(Quantizer(name=name, scale="least_squares"), [x])
        assert fitted <= 0.9 * squared_error(Quantizer(name=name, scale="maximum"), [x]), number


def test_a_folder_that_is_no_checkout_of_ac_sgd_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no checkout of AC-SGD"):
        ac_sgd.imported(tmp_path)
