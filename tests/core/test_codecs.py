"""Each codec alone: original = sent + kept back, its size, its levels."""

import pytest
import torch

from clapping_ds.codecs import (
    CODECS,
    Context,
    Eden,
    Float8,
    LowRank,
    Quantizer,
    RandK,
    Raw,
    TopK,
    bits_per_value,
)

EPS = 2.0**-24  # half an ulp of fp32, relative
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ALL = [
    *(cls(name=name) for name, cls in CODECS.items()),
    *(Quantizer(name=name, rotate=True) for name in ("int4", "int2")),
    *(Quantizer(name=name, stochastic=True) for name in ("int8", "int2")),
    *(Quantizer(name=name, scale="maximum") for name in ("int3", "int2")),
    *(Eden(name=name, scale="unbiased") for name in ("eden1", "eden4")),
    TopK(values="int8"),
]


def encode(codec, value, context=None):
    context = Context() if context is None else context
    payload = torch.full((codec.nbytes(value.shape, value.dtype),), 0xA5, dtype=torch.uint8)
    codec.encode_(value, payload, context._replace(state=codec.new_state(value.shape[-1], value.device)))
    return payload


def decode(codec, payload, value, seed=0):
    """What a receiver without memory gets."""
    out = torch.empty_like(value)
    codec.decode_(payload, out, Context(seed=seed, state=codec.new_state(value.shape[-1], value.device)))
    return out


def sent_of(codec, value, seed=0):
    return decode(codec, encode(codec, value, Context(seed=seed)), value, seed)


@pytest.mark.parametrize("codec", ALL, ids=repr)
@pytest.mark.parametrize("memory_dtype", HALF_ULP)
@pytest.mark.parametrize("carry", [False, True])
def test_original_is_sent_plus_kept_back(codec, memory_dtype, carry):
    """v = base + D + (x - D) with x = fp32(v - base): each term's rounding is bounded.

    D is read from the payload by a receiver without memory. What the memory holds afterwards is
    base + D, off by one fp32 rounding and one rounding to the memory's dtype; and so v - m' is what
    was kept back, off by these and by the rounding of x.
    """
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(5000, generator=generator) * 3
    memory = torch.randn(5000, generator=generator).to(memory_dtype)
    base = memory.double() if carry else torch.zeros(5000, dtype=torch.float64)
    sent = decode(codec, encode(codec, value, Context(memory, carry, 5)), value, seed=5)
    if isinstance(codec, Raw):
        base = torch.zeros_like(base)
    x = value.double() - base
    kept_back = x - sent.double()
    stepped = base + sent.double()
    rounding = EPS * (x.abs() + stepped.abs()) + HALF_ULP[memory_dtype] * stepped.abs() * (1 + EPS) + 1e-30
    assert ((memory.double() - stepped).abs() <= rounding).all()
    assert ((value.double() - (memory.double() + kept_back)).abs() <= rounding + EPS * x.abs()).all()
    if isinstance(codec, Quantizer) and not codec.rotate and codec.scheme.constants.scale == "maximum":
        largest = torch.nn.functional.pad(x.abs(), (0, -5000 % 128)).view(-1, 128).amax(1)
        half = (largest / (2**codec.bits - 1)).repeat_interleave(128)[:5000] * (1 + codec.stochastic)
        assert (kept_back.abs() <= half * (1 + 2.0**-7) + EPS * x.abs()).all()
    if isinstance(codec, TopK | RandK):
        is_sent = sent != 0
        half = x.view(-1).abs().max() / 127 if getattr(codec, "values", "") == "int8" else 0.0
        assert (kept_back[is_sent].abs() <= x[is_sent].abs() * 2.0**-8 + half).all()
        assert half or torch.equal(kept_back[~is_sent], x[~is_sent])


@pytest.mark.parametrize(
    ("codec", "bits"),
    [(Quantizer(name="int8"), 8.125), (Quantizer(name="int4"), 4.125), (Quantizer(name="int3"), 3.125),
     (Quantizer(name="int2"), 2.125), (Quantizer(name="sign"), 1.125), (TopK(ratio=0.0625), 2.0),
     (Quantizer(name="int2", group_size=32), 2.5), (Eden(name="eden1"), 1.125), (Eden(name="eden2"), 2.125),
     (Eden(name="eden3"), 3.125), (Eden(name="eden4"), 4.125), (Float8(name="fp8_e4m3"), 8.125),
     (TopK(ratio=0.0625, values="int8"), 1.515625), (RandK(ratio=0.0625), 1.0),
     (LowRank(rank=4), 16 * 4 * 2 / 4096)],
    ids=repr,
)  # fmt: skip
def test_bits_per_value(codec, bits):
    assert bits_per_value(codec, torch.float32) == bits


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2", "sign"])
def test_all_codes_are_used(name):
    value = torch.linspace(-1, 1, 1024)
    codec = Quantizer(name=name, group_size=1024)
    assert len(sent_of(codec, value).unique()) == 2**codec.bits


def test_sign_sends_the_mean_magnitude():
    value = torch.tensor([1.0, -2.0, 3.0, -4.0] * 32)
    assert torch.equal(sent_of(Quantizer(name="sign"), value), value.sign() * 2.5)


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_topk_sends_the_largest_of_each_block(values):
    value = torch.zeros(2048)
    value[5], value[1030], value[2047] = 3.0, -2.0, 0.5
    sent = sent_of(TopK(ratio=2 / 1024, values=values), value)
    assert (sent - value).abs().max() <= (2 / 127 if values == "int8" else 0)
    assert torch.equal(sent.nonzero(), value.nonzero())


def test_randk_sends_every_position_equally_often_and_others_each_time():
    """Of 4,000 draws, k / block = 1/8 of a position's are kept: 500, standard deviation 21."""
    codec, value = RandK(ratio=0.125, block=64), torch.ones(64)
    kept = torch.stack([sent_of(codec, value, seed) != 0 for seed in range(4000)])
    assert (kept.sum(1) == 8).all()
    assert ((kept.sum(0) - 500).abs() < 5 * 21).all()
    assert len({tuple(row.tolist()) for row in kept}) > 3990


@pytest.mark.parametrize("codec", [TopK(), RandK()], ids=lambda codec: codec.name)
def test_a_tensor_smaller_than_a_block_is_refused(codec):
    with pytest.raises(ValueError, match=r"k: block 1024 is larger than .* \(10, 10\); accepted: .* 100"):
        codec.nbytes((10, 10), torch.float32)


def test_lowrank_is_exact_for_a_matrix_of_its_rank_and_stays_warm():
    """bfloat16 factors: an error of at most 2^-8 in each, 2^-7 in the product."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(60, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    value += 0.1 * torch.randn(60, 40, generator=generator)
    codec = LowRank(rank=2)
    state = codec.new_state(value.shape[-1], value.device)
    best = torch.linalg.svdvals(value)[2:].norm()
    errors = []
    for _ in range(3):
        memory = torch.zeros_like(value)
        payload = torch.empty(codec.nbytes(value.shape, value.dtype), dtype=torch.uint8)
        codec.encode_(value, payload, Context(memory, False, 0, state))
        errors.append(float((value - memory).norm()))
    assert errors[2] <= errors[0] * (1 + 2.0**-7)
    assert errors[2] <= best + 2.0**-7 * value.norm()


def test_a_tiny_group_is_kept_back_whole():
    memory = torch.ones(128)
    encode(Quantizer(name="int4"), torch.full((128,), 1e-38), Context(memory))
    assert torch.equal(memory, torch.zeros(128))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)]
)
def test_fp8_codes_are_those_of_torch(name, dtype):
    value = torch.arange(-128, 128).to(torch.int8).view(dtype).float()
    value = value[value.isfinite()][:240]
    largest = torch.finfo(dtype).max
    value = torch.cat([value, torch.full((256 - value.numel(),), largest)])
    assert torch.equal(sent_of(Float8(name=name, group_size=256), value), value)


def squared_error(codec, value, num_messages=8):
    """Mean over messages of ||x - D(x)||^2 / ||x||^2."""
    errors = [(sent_of(codec, value, seed) - value).square().sum() for seed in range(num_messages)]
    return float(torch.stack(errors).mean() / value.square().sum())


def test_least_squares_scales_beat_the_maximum():
    value = torch.randn(1 << 14, generator=torch.Generator().manual_seed(1))
    for name in ("int2", "int3"):
        best, maximum = (Quantizer(name=name, scale=scale) for scale in ("least_squares", "maximum"))
        assert squared_error(best, value, 1) <= 0.9 * squared_error(maximum, value, 1)
    two_levels = value.sign() * 0.7
    assert squared_error(Quantizer(name="int2"), two_levels, 1) < 2.0**-16


def test_eden2_has_at_most_half_the_squared_error_of_a_maximum_scale_int2():
    value = torch.randn(1 << 14, generator=torch.Generator().manual_seed(1))
    assert squared_error(Eden(name="eden2"), value) <= 0.5 * squared_error(
        Quantizer(name="int2", scale="maximum"), value
    )


def test_rotation_spreads_outliers():
    value = torch.randn(1 << 13, generator=torch.Generator().manual_seed(1))
    value[::97] *= 20
    assert squared_error(Quantizer(name="int4", rotate=True), value) < 0.5 * squared_error(
        Quantizer(name="int4"), value, 1
    )


@pytest.mark.parametrize(
    "codec",
    [*(Quantizer(name=name, stochastic=True) for name in ("int8", "int4", "int3", "int2")),
     Quantizer(name="int2", stochastic=True, rotate=True)],
    ids=repr,
)  # fmt: skip
def test_stochastic_rounding_is_unbiased(codec):
    """The mean of 4,096 encodings is within 4 standard errors. A value that no draw took from its level
    counts as if one had, a deviation of 1/64 step. 256 normal deviates exceed 4 once in 60 sets: the
    seeds are fixed."""
    value = torch.randn(256, generator=torch.Generator().manual_seed(2))
    sent = torch.stack([sent_of(codec, value, seed) for seed in range(4096)]).double()
    step = 2 * value.abs().max() / (2**codec.bits - 1)
    deviation = (sent.mean(0) - value.double()).abs()
    assert (deviation <= 4 * sent.std(0).clamp(min=step / 64) / 64).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_eden_is_unbiased_over_messages(bits):
    """The mean of 4,096 messages: bfloat16 scales round to nearest, an error of at most 2^-9 each."""
    value = torch.randn(128, generator=torch.Generator().manual_seed(3))
    sent = torch.stack(
        [sent_of(Eden(name=f"eden{bits}", scale="unbiased"), value, seed) for seed in range(4096)]
    )
    deviation = (sent.double().mean(0) - value.double()).abs()
    assert (deviation <= 4.5 * sent.double().std(0) / 64 + 2.0**-9 * value.abs()).all()


@pytest.mark.parametrize("codec", [Eden(name="eden2"), Quantizer(name="int2", rotate=True)], ids=repr)
def test_fresh_signs_make_errors_independent_and_fixed_ones_repeat_them(codec):
    """Why signs change from message to message. The mean of 64 messages of one value: with fresh signs
    its squared error falls towards that of the scale's shrinkage alone; with fixed signs it stays."""
    value = torch.randn(1 << 12, generator=torch.Generator().manual_seed(4))
    one = squared_error(codec, value, 1)
    fresh = torch.stack([sent_of(codec, value, seed) for seed in range(64)]).mean(0)
    fixed = torch.stack([sent_of(codec, value, 0) for _ in range(64)]).mean(0)
    of_mean = [float((mean - value).square().sum() / value.square().sum()) for mean in (fresh, fixed)]
    assert of_mean[0] < one / 4
    assert of_mean[1] > one * 0.99
