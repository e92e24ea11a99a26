"""The codecs `int8`, `int4`, `int3`, `int2` and `sign`: b-bit codes and one scale per group.

A code c in 0 .. 2^b - 1 stands for the value (2c - (2^b - 1)) * h, an odd multiple of the group's
half step h. So all 2^b codes are used, the levels lie symmetrically about zero, and `sign` is the
member of the family with b = 1. Rounding is to the nearest level:

    c = clamp(floor(x / 2h) + 2^(b-1), 0, 2^b - 1)
    h = max|x| / (2^b - 1)      int8, int4, int3, int2
    h = mean|x|                 sign

h is stored in bfloat16 (8 significant bits) and 2c - (2^b - 1) has at most 8 bits, so their product
is exact in fp32: with or without fused multiply-add, every machine computes the same memory.

The mean is a sum of 16-bit integers (x in units of max|x| / 2^16), which no order of summation can
change. Groups whose largest magnitude is below 2^-100 are sent as zeros.

Wire, for G groups: the codes, then one bfloat16 per group, then padding to 16 bytes. Within a group
of S values the codes are packed with a stride: with P codes to a word of b*P bits (P = 1, 2, 8, 4, 8
for b = 8, 4, 3, 2, 1) word w holds the codes of the values w, w + S/P, w + 2S/P ...; a word of int3 is
three bytes, stored as three rows of S/8 bytes.

Rounding, for x = fp32(v - m) in a group whose scale is not rounded to zero and does not saturate:
|x - D(x)| <= h * (1 + 2^-7) for the int codecs, and m' = m + D(x) is rounded once in fp32 and once
to the memory's dtype. What is kept back is x - D(x); `sign` keeps back up to max|x| - h.
"""

from typing import Annotated, ClassVar, Literal

import torch
import triton
import triton.language as tl
from pydantic import AfterValidator, BaseModel, Field

from clapping_ds.codecs import memory as mem
from clapping_ds.codecs import reference
from clapping_ds.codecs.protocol import STRICT, padded, power_of_two

BLOCK = 4096

GroupSize = Annotated[int, Field(ge=16, le=1024), AfterValidator(power_of_two)]


@triton.jit
def load_differences(value, memory, o_value, m_value, CARRY: tl.constexpr):
    """(base, value - base, per-group maximum of the difference's magnitude bits)."""
    b_value = mem.load(value + o_value, m_value)
    b_base = mem.load(memory + o_value, m_value) if CARRY else tl.zeros_like(b_value)
    b_x = b_value - b_base
    b_peak = tl.max(tl.max(mem.magnitude_bits(b_x), 2), 1)
    return b_base, b_x, b_peak


@triton.jit
def half_step_bits(b_x, b_peak, b_count, MEAN: tl.constexpr, BITS: tl.constexpr):
    """bfloat16 bits of each group's half step h."""
    LARGEST_SCALE: tl.constexpr = 1.7014118346046923e38
    TINY: tl.constexpr = 7.888609052210118e-31
    b_largest = tl.minimum(b_peak.to(tl.float32, bitcast=True), LARGEST_SCALE)
    b_largest = tl.where(b_largest < TINY, 0.0, b_largest)
    if MEAN:
        b_unit = tl.div_rn(65536.0, tl.where(b_largest > 0, b_largest, 1.0))
        b_ticks = (tl.abs(b_x) * b_unit[:, None, None]).to(tl.int32)
        b_total = tl.sum(tl.sum(b_ticks, 2), 1).to(tl.float32)
        b_half = tl.div_rn(b_total, b_count.to(tl.float32) * 65536.0) * b_largest
        b_half = tl.minimum(b_half, LARGEST_SCALE)
    else:
        b_half = b_largest * (1.0 / ((1 << BITS) - 1))
    return mem.bf16_bits(b_half)


@triton.jit
def group_offsets(num_values, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr):
    """Of this program's groups: their numbers, the offsets of their values as [group, part, word],
    and which of those exist."""
    WIDTH: tl.constexpr = GROUP // PARTS
    o_group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    o_in_group = tl.arange(0, PARTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    o_value = o_group[:, None, None] * GROUP + o_in_group[None, :, :]
    return o_group, o_value, o_value < num_values


@triton.jit
def encode_kernel(
    value, memory, codes, scales, num_values,
    BITS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, BLOCK_G: tl.constexpr,
    MEAN: tl.constexpr, CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = GROUP // PARTS
    o_group, o_value, m_value = group_offsets(num_values, BLOCK_G, GROUP, PARTS)
    m_group = o_group * GROUP < num_values

    b_base, b_x, b_peak = load_differences(value, memory, o_value, m_value, CARRY)
    b_finite = mem.are_finite(b_peak)
    b_x = tl.where(b_finite[:, None, None], b_x, 0.0)
    b_peak = tl.where(b_finite, b_peak, 0)

    b_count = tl.minimum(num_values - o_group * GROUP, GROUP)
    b_half_bits = half_step_bits(b_x, b_peak, b_count, MEAN, BITS)
    b_half = mem.from_bf16_bits(b_half_bits)
    b_inverse = tl.where(b_half > 0, tl.div_rn(0.5, tl.where(b_half > 0, b_half, 1.0)), 0.0)

    TOP: tl.constexpr = (1 << BITS) - 1
    b_level = tl.floor(b_x * b_inverse[:, None, None]) + (1 << (BITS - 1))
    b_code = tl.minimum(tl.maximum(b_level, 0.0), TOP).to(tl.int32)
    if HAS_MEMORY:
        b_sent = (2 * b_code - TOP).to(tl.float32) * b_half[:, None, None]
        b_memory = mem.step(b_base, b_sent, LIMIT)
        mem.store(memory + o_value, b_memory, m_value & b_finite[:, None, None])

    b_word = tl.sum(b_code << (tl.arange(0, PARTS) * BITS)[None, :, None], 1)
    o_code = o_group[:, None] * (GROUP * BITS // 8) + tl.arange(0, WIDTH)[None, :]
    for row in tl.static_range(BITS * PARTS // 8):
        b_byte = ((b_word >> (8 * row)) & 0xFF).to(tl.uint8)
        tl.store(codes + o_code + row * WIDTH, b_byte, m_group[:, None])
    tl.store(scales + o_group, tl.where(b_finite, b_half_bits, 0x7FC0).to(tl.int16), m_group)


@triton.jit
def decode_kernel(
    codes, scales, memory, out, num_values,
    BITS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, BLOCK_G: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = GROUP // PARTS
    o_group, o_value, m_value = group_offsets(num_values, BLOCK_G, GROUP, PARTS)
    m_group = o_group * GROUP < num_values

    b_half = mem.from_bf16_bits(tl.load(scales + o_group, m_group, other=0))
    m_finite = (b_half == b_half)[:, None, None]
    b_word = tl.zeros((BLOCK_G, WIDTH), tl.int32)
    o_code = o_group[:, None] * (GROUP * BITS // 8) + tl.arange(0, WIDTH)[None, :]
    for row in tl.static_range(BITS * PARTS // 8):
        b_byte = tl.load(codes + o_code + row * WIDTH, m_group[:, None], other=0)
        b_word |= b_byte.to(tl.int32) << (8 * row)

    TOP: tl.constexpr = (1 << BITS) - 1
    b_code = (b_word[:, None, :] >> (tl.arange(0, PARTS) * BITS)[None, :, None]) & TOP
    b_sent = (2 * b_code - TOP).to(tl.float32) * b_half[:, None, None]
    b_base = mem.load(memory + o_value, m_value) if CARRY else tl.zeros_like(b_sent)
    b_memory = mem.rounded(memory, mem.step(b_base, b_sent, LIMIT))
    if HAS_MEMORY:
        mem.store(memory + o_value, b_memory, m_value & m_finite)
    mem.store(out + o_value, tl.where(m_finite, b_memory, float("nan")), m_value)


def _launch_options(codec: "Quantizer", num_values: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the constants that both kernels take."""
    block_groups = max(1, BLOCK // codec.group_size)
    constants = {
        "BITS": codec.bits,
        "GROUP": codec.group_size,
        "PARTS": codec.codes_per_word,
        "BLOCK_G": block_groups,
    }
    return (triton.cdiv(num_values, block_groups * codec.group_size),), constants


def encode_triton_(
    codec: "Quantizer",
    value: torch.Tensor,
    memory: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    carry: bool,
) -> None:
    """As `reference.quant_encode_`, in one pass on the GPU."""
    grid, constants = _launch_options(codec, value.numel())
    encode_kernel[grid](
        value, value if memory is None else memory, codes, scales.view(torch.int16), value.numel(),
        **constants, MEAN=codec.name == "sign", CARRY=carry, HAS_MEMORY=memory is not None,
        LIMIT=mem.limit(value, memory),
    )  # fmt: skip


def decode_triton_(
    codec: "Quantizer",
    codes: torch.Tensor,
    scales: torch.Tensor,
    memory: torch.Tensor | None,
    out: torch.Tensor,
    carry: bool,
) -> None:
    """As `reference.quant_decode_`, in one pass on the GPU."""
    grid, constants = _launch_options(codec, out.numel())
    decode_kernel[grid](
        codes, scales.view(torch.int16), out if memory is None else memory, out, out.numel(),
        **constants, CARRY=carry, HAS_MEMORY=memory is not None, LIMIT=mem.limit(out, memory),
    )  # fmt: skip


class Quantizer(BaseModel):
    """Uniform b-bit codes with one bfloat16 scale per group of `group_size` values."""

    model_config = STRICT
    carries_by_default: ClassVar[bool] = False

    name: Literal["int8", "int4", "int3", "int2", "sign"]
    group_size: GroupSize = 128
    """Values that share a scale: a power of two."""

    @property
    def bits(self) -> int:
        return 1 if self.name == "sign" else int(self.name.removeprefix("int"))

    @property
    def codes_per_word(self) -> int:
        return {8: 1, 4: 2, 3: 8, 2: 4, 1: 8}[self.bits]

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """ceil(values / group_size) * (group_size * bits / 8 + 2), padded to 16."""
        num_groups = triton.cdiv(torch.Size(shape).numel(), self.group_size)
        return padded(num_groups * (self.group_size * self.bits // 8 + 2))

    def encode_(
        self, value: torch.Tensor, memory: torch.Tensor | None, payload: torch.Tensor, carry: bool
    ) -> None:
        codes, scales, padding = self._sections(payload, value.numel())
        encode_ = encode_triton_ if value.is_cuda else reference.quant_encode_
        encode_(self, value, memory, codes, scales, carry and memory is not None)
        padding.zero_()

    def decode_(
        self, payload: torch.Tensor, memory: torch.Tensor | None, out: torch.Tensor, carry: bool
    ) -> None:
        codes, scales, _ = self._sections(payload, out.numel())
        decode_ = decode_triton_ if out.is_cuda else reference.quant_decode_
        decode_(self, codes, scales, memory, out, carry and memory is not None)

    def _sections(
        self, payload: torch.Tensor, num_values: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the payload: codes (uint8), scales (bfloat16), padding (uint8)."""
        num_groups = triton.cdiv(num_values, self.group_size)
        codes_nbytes = num_groups * self.group_size * self.bits // 8
        end = codes_nbytes + 2 * num_groups
        return payload[:codes_nbytes], payload[codes_nbytes:end].view(torch.bfloat16), payload[end:]
