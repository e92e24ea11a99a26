"""The Triton kernels give the reference's bits. They run in Triton's interpreter, on the CPU."""

import warnings
from math import prod

import numpy
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from clapping_ds.codecs import (
    Context,
    Eden,
    Float8,
    LowRank,
    Quantizer,
    RandK,
    Raw,
    TopK,
    Transform,
)
from clapping_ds.codecs.kernels import (
    eden_kernel,
    float8_kernel,
    grouped_kernel,
    lowrank_kernel,
    quant_kernel,
    randk_kernel,
    raw_kernel,
    topk_kernel,
    transform_kernel,
)
from clapping_ds.codecs.reference import (
    eden_reference,
    float8_reference,
    grouped_reference,
    lowrank_reference,
    quant_reference,
    randk_reference,
    raw_reference,
    topk_reference,
    transform_reference,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POISON = 0xA5

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


KINDS = ("normal", "outliers", "not finite", "denormal", "largest", "zeros", "ties", "one outlier")


def values_of(kind: str, num_values: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(num_values, generator=generator)
    if kind == "outliers":
        value[::61] *= 1000.0
    elif kind == "not finite":
        value[5::131] = float("inf")
        value[7::271] = float("nan")
        value[9::331] = float("-inf")
    elif kind == "denormal":
        value *= 1e-41
    elif kind == "largest":
        value = value.sign() * torch.finfo(dtype).max
    elif kind == "zeros":
        value = value * 0.0
    elif kind == "ties":
        value = value.sign() * 0.5
    elif kind == "one outlier":
        value[::128] = 6e4
    return value.to(dtype)


def mixed_values(num_each: int, num_rest: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Stretches of every kind, then `num_rest` normal values."""
    parts = [values_of(kind, num_each, dtype, seed + index) for index, kind in enumerate(KINDS)]
    return torch.cat([*parts, values_of("normal", num_rest, dtype, seed + 100)])


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
    for kernel, twin in TWINS.items():
        shared = [name for name in TWIN_FUNCTIONS if hasattr(twin, name)]
        assert shared, f"{twin.__name__} has none of {TWIN_FUNCTIONS}"
        for name in shared:
            monkeypatch.setattr(twin, name, getattr(kernel, name))


TWIN_FUNCTIONS = (
    *("encode_", "decode_", "encode_groups", "decode_level", "apply_", "copy_"),
    *("write_codes_", "read_codes", "multiply"),
)


TWINS = {
    eden_kernel: eden_reference,
    float8_kernel: float8_reference,
    grouped_kernel: grouped_reference,
    lowrank_kernel: lowrank_reference,
    quant_kernel: quant_reference,
    randk_kernel: randk_reference,
    raw_kernel: raw_reference,
    topk_kernel: topk_reference,
    transform_kernel: transform_reference,
}


def learned(state):
    return None if state is None else state.join_shared()


def new_states(codec, value):
    """Of both ends."""
    return [codec.new_state(value.shape[-1], value.device) for _ in range(2)]


def round_trip(codec, value, memory, carry, compiles=False, states=None):
    """What both ends hold and send after one message, all outputs poisoned before, by name."""
    memories = [None if memory is None else memory.clone() for _ in range(2)]
    states = states or new_states(codec, value)
    sender, receiver = (Context(memories[end], carry, SEED, states[end], compiles) for end in range(2))
    payload = poisoned(codec.nbytes(value.shape, value.dtype))
    codec.encode_(value, payload, sender)
    out = poisoned(value.numel() * value.element_size()).view(value.dtype).view(value.shape)
    codec.decode_(payload, out, receiver)
    return {
        "payload": payload,
        "sender's memory": memories[0],
        "receiver's memory": memories[1],
        "sender's state": learned(states[0]),
        "receiver's state": learned(states[1]),
        "out": out,
    }


SEED = 0x9ABCDEF012345678
CODECS = [
    *(Quantizer(name=name) for name in ("int8", "int4", "int3", "int2", "sign")),
    *(Quantizer(name=name, rotate=True) for name in ("int8", "int4", "int3", "int2")),
    *(Quantizer(name=name, stochastic=True) for name in ("int8", "int4", "int3", "int2")),
    Quantizer(name="int2", scale="maximum"),
    Quantizer(name="int3", group_size=16, rotate=True, stochastic=True),
    Quantizer(name="sign", group_size=1024),
    *(Eden(name=name) for name in ("eden1", "eden2", "eden3", "eden4")),
    *(Eden(name=name, scale="unbiased", group_size=16) for name in ("eden1", "eden2")),
    Eden(name="eden3", scale="unbiased", group_size=1024),
    Float8(name="fp8_e4m3"),
    Float8(name="fp8_e5m2", group_size=32),
    TopK(ratio=0.05, block=64),
    TopK(ratio=0.5, block=128, values="int8"),
    RandK(ratio=0.1, block=128),
    RandK(ratio=1.0, block=64),
    LowRank(rank=1),
    LowRank(rank=4),
    *(Transform(bits=bits) for bits in (0.0625, 1, 2.5, 3, 8)),
    Transform(bits=2, basis="eigen"),
    Raw(),
]
MATRIX_SHAPES = {LowRank: [(33, 70)], Transform: [(33, 70), (300, 48)]}
"""Of codecs that treat rows and columns differently."""


def cases(codec):
    """(value, memory, carry): all kinds of values, odd sizes, all dtypes of value and memory."""
    values = []
    for index, dtype in enumerate(DTYPES):
        if type(codec) in MATRIX_SHAPES:
            shapes = MATRIX_SHAPES[type(codec)]
            for place, kind in enumerate(KINDS[index :: len(DTYPES)]):
                shape = shapes[(index + place) % len(shapes)]
                values.append(values_of(kind, prod(shape), dtype, seed=index).view(shape))
        else:
            stretch = 2 * codec.block if isinstance(codec, TopK | RandK) else 256
            values.append(mixed_values(stretch, 91, dtype, seed=10 * index))
    if not isinstance(codec, TopK | RandK):
        values.append(values_of("normal", 1, torch.float32, seed=7))
    for index, value in enumerate(values):
        yield value, None, False
        for offset, carry in enumerate((False, True)):
            memory = values_of("normal", value.numel(), DTYPES[(index + offset) % 3], seed=index)
            yield value, memory.view(value.shape), carry


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: repr(codec))
def test_bits(codec, monkeypatch):
    expected = [round_trip(codec, *case) for case in cases(codec)]
    on_triton(monkeypatch)
    for case, expectation in zip(cases(codec), expected, strict=True):
        result = round_trip(codec, *case)
        for name, tensor in result.items():
            assert same_bits(tensor, expectation[name]), f"{name} of {codec} at {tuple(case[0].shape)}"
        assert same_bits(result["sender's memory"], result["receiver's memory"]), "the two ends differ"
        assert same_bits(result["sender's state"], result["receiver's state"]), "the two ends differ"


@pytest.mark.parametrize(("holds_memory", "carry"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("shape", "learned"),
    [
        ((150, 70), {"basis": "eigen"}),
        ((9, 48), {"basis": "eigen", "anchors": 4}),
        ((150, 70), {"anchors": 4}),
    ],
)
def test_bits_with_what_is_learned(shape, learned, holds_memory, carry, monkeypatch):
    """Six messages of the same tensor: from the fifth on something is used."""
    codec = Transform(bits=2, refresh=2, **learned)
    found = [send_six(codec, shape, holds_memory, carry)]
    on_triton(monkeypatch)
    found.append(send_six(codec, shape, holds_memory, carry))
    for number, (expectation, result) in enumerate(zip(*found, strict=True)):
        for name, tensor in result.items():
            assert same_bits(tensor, expectation[name]), f"{name} of message {number}"
        assert same_bits(result["sender's memory"], result["receiver's memory"]), "the two ends differ"
        assert same_bits(result["sender's state"], result["receiver's state"]), "the two ends differ"
    assert result["sender's state"].any()


def send_six(codec, shape, holds_memory, carry):
    value = values_of("outliers", prod(shape), torch.float32, seed=3).view(shape)
    states = new_states(codec, value)
    results = [{"receiver's memory": torch.zeros_like(value) if holds_memory else None}]
    for _ in range(6):
        memory = results[-1]["receiver's memory"]
        results.append(round_trip(codec, value, memory, carry, states=states))
    return results[1:]


@pytest.mark.parametrize("num_rows", [0, 1, 16, 45])
def test_products_of_integers_are_exact(num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    integer_MC = torch.randint(-(1 << 22), (1 << 22) + 1, (num_rows, 48), generator=generator).float()
    integer_MC[: num_rows // 2] = 1 << 22  # what a bound rounds up to
    basis_CC = torch.randint(-127, 128, (48, 48), generator=generator, dtype=torch.int8)
    basis_CC[:, :3] = 127
    expected = (integer_MC.long() @ basis_CC.long()).double().float()
    for twin in (transform_kernel, transform_reference):
        assert torch.equal(twin.multiply(integer_MC, basis_CC), expected)


@pytest.mark.parametrize("bits", range(9))
def test_codes_at_and_beside_every_threshold(bits):
    """Of a row without variance but in its first coordinate all 16 rotated values are equal, up to signs."""
    levels = torch.tensor(transform_reference.LEVELS.get(bits, (204,))) * transform_reference.LEVEL_UNIT
    edges = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.tensor([0.0, 1e-42, 7.9, 1e30])])
    beside = [edges.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    z_MC = torch.zeros(3 * len(edges), 16)
    z_MC[:, 0] = 4.0 * torch.cat([edges, *beside])
    ones, bits_B = torch.ones(16), torch.tensor([bits], dtype=torch.uint8)
    coding = transform_reference.Coding(0.0 * ones, ones, torch.arange(16), bits_B, bits_B.int())
    code_MW, expected_MW = (torch.zeros(len(z_MC), bits, dtype=torch.int16) for _ in range(2))
    transform_kernel.write_codes_(z_MC, coding, SEED, code_MW)
    transform_reference.write_codes_(z_MC, coding, SEED, expected_MW)
    assert torch.equal(code_MW, expected_MW)
    scale_M, twins = torch.rand(len(z_MC)).bfloat16().float(), (transform_kernel, transform_reference)
    read = [twin.read_codes(code_MW, coding, scale_M, SEED) for twin in twins]
    assert same_bits(*read)


def test_codes_of_values_above_two_to_the_31(monkeypatch):
    """The last programs of 2^16 + 1 rows of 2^15 values."""
    num_rows, size = (1 << 16) + 1, 1 << 15
    bits_B = torch.full((size // 16,), 4, dtype=torch.uint8)
    ends_B = bits_B.cumsum(0, dtype=torch.int32)
    coding = transform_reference.Coding(
        torch.zeros(size), torch.ones(size), torch.arange(size), bits_B, ends_B
    )
    z_MC = torch.empty(num_rows, size)
    code_MW = torch.empty(num_rows, size // 4, dtype=torch.int16)
    tail = values_of("normal", 1024, torch.float32, seed=3)
    z_MC[-1, -1024:] = tail
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_last_programs)
    transform_kernel.write_codes_(z_MC, coding, SEED, code_MW)
    out = transform_kernel.read_codes(code_MW, coding, torch.ones(num_rows), SEED)[-1, -1024:]
    assert (out - tail).norm() < 0.15 * tail.norm()


@pytest.mark.parametrize(
    "codec",
    [Quantizer(name="int8"), Eden(name="eden2"), TopK(), RandK(), Raw()],
    ids=lambda codec: codec.name,
)
def test_sizes_above_two_to_the_31(codec, monkeypatch):
    """The last programs of a tensor of 2^31 + 4,096 values. Its pages are never touched but for these,
    so it takes no memory. For eden2 they are the last rows of each of four segments."""
    num_values = (1 << 31) + 4096
    value, memory, payload = (
        torch.empty(size, dtype=dtype)
        for size, dtype in (
            (num_values, torch.bfloat16),
            (num_values, torch.bfloat16),
            (codec.nbytes((num_values,), torch.bfloat16), torch.uint8),
        )
    )
    num_segments = codec.scheme.num_segments if hasattr(codec, "scheme") else 1
    stretch = num_values // num_segments
    tail = values_of("normal", 1024, torch.bfloat16, seed=3)
    for segment in range(num_segments):
        value[(segment + 1) * stretch - 1024 : (segment + 1) * stretch] = tail
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_last_programs)
    on_triton(monkeypatch)
    with monkeypatch.context() as context:
        context.setattr(torch.Tensor, "zero_", lambda tensor: tensor)
        codec.encode_(value, payload, Context(memory, False, SEED))
    sent = memory[-1024:].clone()
    kept = sent != 0 if isinstance(codec, TopK | RandK) else torch.ones(1024, dtype=torch.bool)
    assert kept.sum() >= 1024 * codec.carries_by_default * 0.04
    relative = (sent[kept].float() - tail[kept].float()).norm() / tail[kept].float().norm()
    assert relative < (0.4 if codec.name == "eden2" else 0.01)
    memory[-1024:] = 0
    out = value
    out[-1024:] = 7
    codec.decode_(payload, out, Context(memory, False, SEED))
    assert torch.equal(out[-1024:], sent)
    assert torch.equal(memory[-1024:], sent)


def run_last_programs(executor, *arguments, **keywords):
    """Runs the last two programs of a grid, and copies no arguments back."""
    first = executor.grid[0] - 2
    executor.grid = (2, *executor.grid[1:])

    def shifted(builder, axis):
        number = builder.grid_idx[axis] + (first if axis == 0 else 0)
        return interpreter.TensorHandle(numpy.array([number], dtype=numpy.int32), tl.int32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", shifted)
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)
        return RUN(executor, *arguments, **keywords)


RUN = interpreter.GridExecutor.__call__
