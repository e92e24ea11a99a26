"""Each codec alone: original = sent + kept back, its size, its levels."""

import pytest
import torch

from clapping_ds.codecs import CODECS, Quantizer, Raw, TopK, bits_per_value

EPS = 2.0**-24  # half an ulp of fp32, relative
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ALL = [cls() if name in ("none", "topk") else cls(name=name) for name, cls in CODECS.items()]


def encode(codec, value, memory, carry):
    payload = torch.full((codec.nbytes(value.shape, value.dtype),), 0xA5, dtype=torch.uint8)
    codec.encode_(value, memory, payload, carry)
    return payload


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.name)
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
    payload = encode(codec, value, memory, carry)
    sent = torch.empty_like(value)
    codec.decode_(payload, None, sent, False)
    if isinstance(codec, Raw):
        base = torch.zeros_like(base)
    x = value.double() - base
    kept_back = x - sent.double()
    stepped = base + sent.double()
    rounding = EPS * (x.abs() + stepped.abs()) + HALF_ULP[memory_dtype] * stepped.abs() * (1 + EPS) + 1e-30
    assert ((memory.double() - stepped).abs() <= rounding).all()
    assert ((value.double() - (memory.double() + kept_back)).abs() <= rounding + EPS * x.abs()).all()
    if isinstance(codec, Quantizer) and codec.name != "sign":
        largest = torch.nn.functional.pad(x.abs(), (0, -5000 % 128)).view(-1, 128).amax(1)
        half = (largest / (2**codec.bits - 1)).repeat_interleave(128)[:5000]
        assert (kept_back.abs() <= half * (1 + 2.0**-7) + EPS * x.abs()).all()
    if isinstance(codec, TopK):
        is_sent = sent != 0
        assert (kept_back[is_sent].abs() <= x[is_sent].abs() * 2.0**-8).all()
        assert torch.equal(kept_back[~is_sent], x[~is_sent])


@pytest.mark.parametrize(
    ("codec", "bits"),
    [(Quantizer(name="int8"), 8.125), (Quantizer(name="int4"), 4.125), (Quantizer(name="int3"), 3.125),
     (Quantizer(name="int2"), 2.125), (Quantizer(name="sign"), 1.125), (TopK(ratio=0.0625), 2.0),
     (Quantizer(name="int2", group_size=32), 2.5)],
    ids=repr,
)  # fmt: skip
def test_bits_per_value(codec, bits):
    assert bits_per_value(codec, torch.float32) == bits


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2", "sign"])
def test_all_codes_are_used(name):
    codec = Quantizer(name=name, group_size=1024)
    value = torch.linspace(-1, 1, 1024)
    out = torch.empty_like(value)
    codec.decode_(encode(codec, value, None, False), None, out, False)
    assert len(out.unique()) == 2**codec.bits


def test_sign_sends_the_mean_magnitude():
    value = torch.tensor([1.0, -2.0, 3.0, -4.0] * 32)
    out = torch.empty_like(value)
    codec = Quantizer(name="sign")
    codec.decode_(encode(codec, value, None, False), None, out, False)
    assert torch.equal(out, value.sign() * 2.5)


def test_topk_sends_the_largest_of_each_block():
    value = torch.zeros(2048)
    value[5], value[1030], value[2047] = 3.0, -2.0, 0.5
    out = torch.empty_like(value)
    codec = TopK(ratio=2 / 1024)
    codec.decode_(encode(codec, value, None, False), None, out, False)
    assert torch.equal(out, value)


def test_topk_refuses_a_tensor_smaller_than_its_block():
    with pytest.raises(ValueError, match=r"topk: block 1024 is larger than .* \(10, 10\); accepted: .* 100"):
        TopK().nbytes((10, 10), torch.float32)


def test_a_tiny_group_is_kept_back_whole():
    value = torch.full((128,), 1e-38)
    memory = torch.ones(128)
    codec = Quantizer(name="int4")
    encode(codec, value, memory, False)
    assert torch.equal(memory, torch.zeros(128))
