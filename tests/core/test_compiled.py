"""The compiled CPU path gives the reference's bits."""

import pytest
import torch

from clapping_ds.codecs import Eden, Quantizer
from clapping_ds.codecs.reference import compiled
from tests.core.test_kernels import KINDS, round_trip, same_bits, values_of


def mixed(dtype):
    return torch.cat([values_of(kind, 1024, dtype, seed) for seed, kind in enumerate(KINDS)])


@pytest.mark.parametrize(
    ("codec", "dtype", "memory_dtype"),
    [
        (Quantizer(name="int4"), torch.float32, torch.float32),
        (Quantizer(name="int2"), torch.bfloat16, torch.bfloat16),
        (Eden(name="eden2"), torch.float32, torch.bfloat16),
    ],
    ids=["int4", "int2 bfloat16", "eden2"],
)
def test_bits(codec, dtype, memory_dtype):
    value = mixed(dtype)
    memory = values_of("normal", value.numel(), memory_dtype, seed=9)
    expected = round_trip(codec, value, memory, True)
    result = round_trip(codec, value, memory, True, compiles=True)
    for name, tensor in result.items():
        assert same_bits(tensor, expected[name]), name


def test_without_a_compiler_the_function_runs_as_it_is(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    function = compiled.Compiled(lambda x: x * 3 + torch.ones_like(x))
    with pytest.warns(RuntimeWarning, match="the CPU path is not compiled"):
        assert torch.equal(function(torch.ones(7)), torch.full((7,), 4.0))
    assert torch.equal(function(torch.ones(9)), torch.full((9,), 4.0))
