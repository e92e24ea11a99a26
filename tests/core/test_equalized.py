"""Columns on one scale: both ends alike, unbiased, an error in proportion to each column."""

from itertools import pairwise

import pytest
import torch

from clapping_ds.codecs import Context, Eden, Quantizer
from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.equalized import Equalized
from clapping_ds.gradients.layout import Parameter, Piece, make_buckets
from tests.core.replicas import Replicas, mean_of, same_bits

SIGN = Equalized(codec=Quantizer(name="sign"))
EDEN1 = Equalized(codec=Eden(name="eden1", scale="unbiased"))
CODECS = [SIGN, EDEN1, Equalized(codec=Eden(name="eden4")), Equalized(codec=Quantizer(name="int8"))]


def draw(num_rows, width, seed=0, ratio=1000.0):
    """The last column is so many times smaller than the first."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator) * ratio ** -torch.linspace(0, 1, width)


def send(codec, value, memory=None, carry=False, seed=0):
    """What arrives; both ends' memories."""
    payload = torch.full((codec.nbytes(value.shape, value.dtype),), 255, dtype=torch.uint8)
    memories = [None if memory is None else memory.clone() for _ in range(2)]
    codec.encode_(value, payload, Context(memories[0], carry, seed))
    out = torch.empty_like(value, dtype=torch.float32)
    codec.decode_(payload, out, Context(memories[1], carry, seed))
    return out, *memories


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("shape", [(1, 40), (24, 64), (7, 130)])
@pytest.mark.parametrize("carry", [False, True])
def test_both_ends_hold_the_same(codec, shape, carry):
    value = draw(*shape)
    memory = draw(*shape, seed=1)
    out, sent, received = send(codec, value, memory, carry)
    assert torch.equal(sent, received)
    assert torch.equal(sent, out)
    assert torch.equal(out, send(codec, value, memory, carry)[0])
    if carry:
        alone, *_ = send(codec, value - memory)
        torch.testing.assert_close(out, memory + alone)


def test_bytes_are_a_byte_per_column_more():
    assert SIGN.nbytes((256, 124), torch.float32) == 128 + SIGN.codec.nbytes((256, 124), torch.float32)
    assert SIGN.nbytes((256, 125), torch.float32) == 144 + SIGN.codec.nbytes((256, 125), torch.float32)


@pytest.mark.parametrize("codec", [SIGN, EDEN1], ids=lambda codec: codec.name)
def test_the_error_of_a_column_is_in_proportion_to_it(codec):
    value = draw(256, 128)

    def errors(coder):
        sent = torch.zeros_like(value)
        payload = torch.empty(coder.nbytes(value.shape, value.dtype), dtype=torch.uint8)
        coder.encode_(value, payload, Context(sent))
        return (value - sent).norm(dim=0) / value.norm(dim=0)

    assert errors(codec).max() < 1  # 0.6 for signs of a Gaussian, 0.76 unbiased
    assert errors(codec.codec).max() > 50


def test_it_is_right_on_average_where_the_codec_is():
    value, num_seeds = draw(32, 64), 400
    mean = sum(send(EDEN1, value, seed=seed)[0] for seed in range(num_seeds)) / num_seeds
    errors = (mean - value).norm(dim=0) / value.norm(dim=0)
    assert errors.max() < 2 * (0.6 / num_seeds) ** 0.5


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_columns_of_zeros_stay_zeros_and_no_square_overflows(scale):
    value = draw(64, 32) * scale
    value[:, 3] = 0
    out, *_ = send(SIGN, value)
    assert torch.all(out[:, 3] == 0)
    assert out.isfinite().all()
    assert (out - value).norm() <= 0.8 * value.norm()


def test_what_is_not_finite_arrives_and_leaves_the_memory():
    value, memory = draw(64, 128), draw(64, 128, seed=1)
    value[5, 7], value[9, 0] = torch.inf, torch.nan
    out, sent, received = send(SIGN, value, memory, carry=True)
    assert not out[5].isfinite().any() and not out[9].isfinite().any()
    assert torch.equal(sent, received)
    assert torch.equal(sent[[5, 9]], memory[[5, 9]])
    others = [row for row in range(64) if row not in (5, 9)]
    assert out[others].isfinite().all()
    assert (out - value)[others].norm() < (memory - value)[others].norm()


# In an exchange


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 640), (0, 70), (3, 61), (64, 128), (60, 500), (1, 640), (600, 640)]
)
def test_parts_of_rows_that_an_optimizer_cut_off_are_rows(start, stop):
    parameter = Parameter("weight", torch.Size((10, 64)))
    (bucket,) = make_buckets([parameter], [0], 1, lambda _: [(0, start, stop)], 0, has_matrices=True)
    sections = bucket.sections[0]
    pieces = [section.pieces[0] for section in sections]
    assert pieces[0].start == start and pieces[-1].stop == stop
    assert all(one.stop == other.start for one, other in pairwise(pieces))
    for section in sections:
        (piece,) = section.pieces
        assert isinstance(piece, Piece) and section.shape.numel() == piece.numel
        is_whole = piece.start % 64 == 0 and piece.numel % 64 == 0
        assert section.shape == ((piece.numel // 64, 64) if is_whole else (1, piece.numel))
    assert sum(section.shape[0] > 1 or section.shape[1] == 64 for section in sections) <= 1


@pytest.mark.parametrize("codec", ["int2", {"name": "eden4", "scale": "unbiased"}, "sign"], ids=str)
@pytest.mark.parametrize("feedback", ["none", "ef14", "ef21"])
@pytest.mark.parametrize("size", [2, 3])
def test_replicas_stay_equal_and_near_the_mean(codec, feedback, size):
    plan = {"scatter": codec, "gather": codec, "error_feedback": feedback, "equalize": True}
    replicas = Replicas(size, plan)
    gradients = replicas.draw(0)
    scale = torch.logspace(0, -3, 64)
    gradients = [{n: g * scale if g.shape[-1] == 64 else g for n, g in of.items()} for of in gradients]
    first, *others = replicas.average(0, gradients)
    assert all(same_bits(first, other) for other in others)
    for number in (0, 1):
        exact = mean_of(gradients)[number]
        errors = (first[number] - exact).norm(dim=0) / exact.norm(dim=0)
        assert errors.max() < 1.2


def test_it_is_for_codecs_of_one_bit_unless_said():
    for codec, is_auto in (("sign", True), ("eden1", True), ("eden2", False), ("int8", False)):
        plan = DataParallelConfig.model_validate({"scatter": codec})
        assert plan.equalizes(plan.scatter) == is_auto
        plan = DataParallelConfig.model_validate({"scatter": codec, "equalize": True})
        assert plan.equalizes(plan.scatter)
        plan = DataParallelConfig.model_validate({"scatter": codec, "equalize": False})
        assert not plan.equalizes(plan.scatter)
    for other in ("topk", "none", ["lowrank", "eden1"]):
        with pytest.raises(
            ValueError, match=r"equalize = true with scatter = .*; accepted: false, or an int"
        ):
            DataParallelConfig.model_validate({"scatter": other, "gather": other, "equalize": True})
