"""The Triton kernels give the reference's bits. They run in Triton's interpreter, on the CPU."""

import warnings

import pytest
import torch

from clapping_ds.codecs import Quantizer, Raw, TopK, quant, raw, reference, sparse

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 127, 128, 1000, 4096, 5003)
POISON = 0xA5

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


def values_of(kind: str, num_values: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(num_values, generator=generator)
    if kind == "outliers":
        value[::61] *= 1000.0
    elif kind == "not finite":
        value[::97] = float("inf")
        value[5::1031] = float("nan")
        value[7::1511] = float("-inf")
    elif kind == "denormal":
        value *= 1e-41
    elif kind == "largest":
        value = value.sign() * torch.finfo(dtype).max
    elif kind == "zeros":
        value = value * 0.0
    elif kind == "ties":
        value = value.sign() * 0.5
    return value.to(dtype)


def poisoned(num_bytes: int) -> torch.Tensor:
    return torch.full((num_bytes,), POISON, dtype=torch.uint8)


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal bits; any NaN equals any other."""
    if a is None or b is None:
        return a is b
    if a.is_floating_point():
        a, b = (torch.where(x.isnan(), torch.nan, x) for x in (a, b))
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets CPU tensors take the GPU's path."""
    monkeypatch.setattr(reference, "copy_", raw.copy_triton_)
    monkeypatch.setattr(reference, "quant_encode_", quant.encode_triton_)
    monkeypatch.setattr(reference, "quant_decode_", quant.decode_triton_)
    monkeypatch.setattr(reference, "topk_encode_", sparse.encode_triton_)
    monkeypatch.setattr(reference, "topk_decode_", sparse.decode_triton_)


def round_trip(codec, value, memory, carry):
    """(payload, memory at the sender, memory at the receiver, out), all outputs poisoned before."""
    sender, receiver = (None if memory is None else memory.clone() for _ in range(2))
    payload = poisoned(codec.nbytes(value.shape, value.dtype))
    codec.encode_(value, sender, payload, carry)
    out = poisoned(value.numel() * value.element_size()).view(value.dtype)
    codec.decode_(payload, receiver, out, carry)
    return payload, sender, receiver, out


CODECS = [
    *(Quantizer(name=name) for name in ("int8", "int4", "int3", "int2", "sign")),
    Quantizer(name="int3", group_size=16),
    Quantizer(name="sign", group_size=1024),
    TopK(ratio=0.05, block=128),
    TopK(ratio=0.5, block=64),
    Raw(),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: repr(codec))
@pytest.mark.parametrize("kind", ["normal", "outliers", "not finite", "denormal", "largest", "zeros", "ties"])
def test_bits(codec, kind, monkeypatch):
    cases = []
    sizes = (codec.block, 3 * codec.block - 1) if isinstance(codec, TopK) else SIZES
    for index, num_values in enumerate(sizes):
        dtype = DTYPES[index % 3]
        for memory_dtype in (None, DTYPES[(index + index // 3) % 3]):
            value = values_of(kind, num_values, dtype, seed=index)
            memory = None
            if memory_dtype is not None:
                memory = values_of("normal", num_values, memory_dtype, seed=100 + index)
            for carry in (False,) if memory is None else (False, True):
                cases.append((value, memory, carry))
    expected = [round_trip(codec, *case) for case in cases]
    on_triton(monkeypatch)
    for case, expectation in zip(cases, expected, strict=True):
        result = round_trip(codec, *case)
        names = ("payload", "sender's memory", "receiver's memory", "out")
        for name, a, b in zip(names, result, expectation, strict=True):
            assert same_bits(a, b), f"{name} of {codec} at {tuple(case[0].shape)}, {case[0].dtype}"
        assert same_bits(result[1], result[2]), "the two ends differ"
