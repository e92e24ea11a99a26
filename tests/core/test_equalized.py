"""Columns on one scale: both ends alike, unbiased, an error in proportion to each column."""

import pytest
import torch

from clapping_ds.codecs import Context, Eden, Quantizer
from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.equalized import Columns, Equalized, cut_columns
from tests.core.replicas import Replicas, mean_of, same_bits

SIGN, EDEN1 = Quantizer(name="sign"), Eden(name="eden1", scale="unbiased")
CODECS = [SIGN, EDEN1, Eden(name="eden4"), Quantizer(name="int8")]


def equalized(codec, *shapes):
    """Whole matrices, one after the other."""
    return Equalized(codec, tuple(Columns(rows * width, 0, width) for rows, width in shapes))


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
    value, memory, codec = draw(*shape), draw(*shape, seed=1), equalized(codec, shape)
    out, sent, received = send(codec, value, memory, carry)
    assert torch.equal(sent, received)
    assert torch.equal(sent, out)
    assert torch.equal(out, send(codec, value, memory, carry)[0])
    if carry:
        alone, *_ = send(codec, value - memory)
        torch.testing.assert_close(out, memory + alone)


def test_bytes_are_a_byte_per_column_more():
    for width, num_bytes in ((124, 128), (125, 144)):
        size = 256 * width
        found = equalized(SIGN, (256, width)).nbytes((size,), torch.float32)
        assert found == num_bytes + SIGN.nbytes((size,), torch.float32)
    both = equalized(SIGN, (2, 64), (4, 64)).nbytes((384,), torch.float32)
    assert both == 2 * (4 + 64) + 8 + SIGN.nbytes((384,), torch.float32)


@pytest.mark.parametrize("codec", [SIGN, EDEN1], ids=lambda codec: codec.name)
def test_the_error_of_a_column_is_in_proportion_to_it(codec):
    value = draw(256, 128)

    def errors(coder):
        sent = torch.zeros_like(value)
        payload = torch.empty(coder.nbytes(value.shape, value.dtype), dtype=torch.uint8)
        coder.encode_(value, payload, Context(sent))
        return (value - sent).norm(dim=0) / value.norm(dim=0)

    assert errors(equalized(codec, (256, 128))).max() < 1  # 0.6 for signs of a Gaussian, 0.76 unbiased
    assert errors(codec).max() > 50


def test_it_is_right_on_average_where_the_codec_is():
    value, num_seeds = draw(32, 64), 400
    mean = sum(send(equalized(EDEN1, (32, 64)), value, seed=seed)[0] for seed in range(num_seeds)) / num_seeds
    errors = (mean - value).norm(dim=0) / value.norm(dim=0)
    assert errors.max() < 2 * (0.6 / num_seeds) ** 0.5


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_columns_of_zeros_stay_zeros_and_no_square_overflows(scale):
    value = draw(64, 32) * scale
    value[:, 3] = 0
    out, *_ = send(equalized(SIGN, (64, 32)), value)
    assert torch.all(out[:, 3] == 0)
    assert out.isfinite().all()
    assert (out - value).norm() <= 0.8 * value.norm()


def test_what_is_not_finite_arrives_and_leaves_the_memory():
    value, memory = draw(64, 128), draw(64, 128, seed=1)
    value[5, 7], value[9, 0] = torch.inf, torch.nan
    out, sent, received = send(equalized(SIGN, (64, 128)), value, memory, carry=True)
    assert not out[5].isfinite().any() and not out[9].isfinite().any()
    assert torch.equal(sent, received)
    assert torch.equal(sent[[5, 9]], memory[[5, 9]])
    others = [row for row in range(64) if row not in (5, 9)]
    assert out[others].isfinite().all()
    assert (out - value)[others].norm() < (memory - value)[others].norm()


@pytest.mark.parametrize(("start", "stop"), [(0, 70), (3, 61), (60, 500), (1, 640), (600, 640)])
def test_pieces_that_begin_and_end_inside_rows(start, stop):
    """Each value has the scale of its column, and a second piece has scales of its own."""
    values, other = draw(10, 64).flatten()[start:stop], 100 * draw(4, 32, seed=1).flatten()
    pieces = Columns(len(values), start % 64, 64), Columns(128, 0, 32)
    value = torch.cat([values, other])
    out, *_ = send(Equalized(Quantizer(name="int8", group_size=16), pieces), value)
    columns = torch.cat([torch.arange(start, stop) % 64, 64 + torch.arange(128) % 32])
    for column in columns.unique():
        mine = columns == column
        assert (out - value)[mine].norm() < 0.05 * value[mine].norm()


def test_matrices_of_few_rows_have_one_scale():
    """A byte per column would be more than their codes."""
    assert cut_columns(32 * 4096, 0, 4096) == Columns(32 * 4096, 0, 4096)
    assert cut_columns(31 * 4096, 0, 4096) == Columns(31 * 4096, 0, 1)
    replicas = Replicas(2, {"scatter": "sign"}, shapes=((8, 4096),))
    replicas.average(0, replicas.draw(0))
    sent = replicas.exchanges[0].legs["scatter"].traffic.payload_bytes
    assert sent == 16 + SIGN.nbytes((8 * 4096,), torch.float32)


# In an exchange


@pytest.mark.parametrize("codec", ["int2", {"name": "eden4", "scale": "unbiased"}, "sign"], ids=str)
@pytest.mark.parametrize("feedback", ["none", "ef14", "ef21"])
@pytest.mark.parametrize("size", [2, 3])
def test_replicas_stay_equal_and_near_the_mean(codec, feedback, size):
    plan = {"scatter": codec, "gather": codec, "error_feedback": feedback, "equalize": True}
    replicas = Replicas(size, plan, shapes=((160, 64), (96, 4, 16), (7,)))
    gradients = replicas.draw(0)
    scale = torch.logspace(0, -3, 64)
    gradients = [
        {n: (g.view(len(g), -1) * scale).view_as(g) if n < 2 else g for n, g in of.items()}
        for of in gradients
    ]
    first, *others = replicas.average(0, gradients)
    assert all(same_bits(first, other) for other in others)
    for number in (0, 1):
        exact, mine = (of[number].view(-1, 64) for of in (mean_of(gradients), first))
        errors = (mine - exact).norm(dim=0) / exact.norm(dim=0)
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
