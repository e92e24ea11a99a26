"""What the codecs with one scale per group share: one fused kernel to encode, one to decode.

A family of such codecs (`quant`, `eden`, `float8`) is a pair of small functions, given twice, for
Triton here and in plain torch in `reference`:

    encoded(y, count, noise, CONSTANTS)    codes, and the scale of each group of `count` values
    level(code, CONSTANTS)                 what a code stands for, in units of the scale

For the groups x = fp32(v - base) of a tensor:

    u = x * 2^-e          e: exponent of the group's largest magnitude, so that 1 <= max|u| < 2
    y = u, or H(s * u)    with random signs s and the Hadamard matrix H of the group (unnormalised)
    code, scale = encoded(y)
    h = scale * 2^e       (with H: over the size S of the group), stored in bfloat16
    D = level(code) * h   or s * H(level(code) * h)
    m <- base + D

A level has at most 8 significant bits and so has h: their product is exact in fp32, additions have a
fixed order, and so every machine computes the same memory, with or without fused multiply-add. (The
launchers switch that off all the same, so that payloads are equal too.) Differences saturate at
2^112, and a group whose largest is below 2^-100 is sent as zeros.

Wire, for G groups of S values and b bits: the codes, then one bfloat16 per group, then padding to 16
bytes. The tensor is cut into P segments of N = ceil(G / P) groups (P = 1, 2, 8, 4, 8 for b = 8, 4, 3,
2, 1), and word w of b*P bits holds the codes of the w-th values of all segments, the first segment in
the lowest bits; the word of b = 3 is three bytes, stored as three rows of N*S bytes. So every access
to values and to codes is contiguous, and no code has to change threads to be packed.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import triton
import triton.language as tl
from pydantic import BaseModel

from clapping_ds.codecs import memory as mem
from clapping_ds.codecs import random_bits
from clapping_ds.codecs.protocol import STRICT, Context, GroupSize, padded
from clapping_ds.codecs.reference import grouped as reference

SEGMENTS = {8: 1, 4: 2, 3: 8, 2: 4, 1: 8}
TILE = 2048  # values of one segment per program: 16 per thread, so that a thread writes 16 bytes of codes
MOST_UNROLLED = 4  # segments; with 8 and two at a time, registers spill
NUM_WARPS = TILE // 16 // mem.WARP_SIZE


@triton.jit
def tile_of(segment, num_rows, num_values, GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """This program's groups of a segment: number of the first, offset of its first value, which groups
    exist, offsets of values from there, and which values exist. Only the scalars need 64 bits."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_G
    first_group = segment * num_rows + first_row
    first_value = first_group * GROUP
    o_group = tl.arange(0, BLOCK_G)
    o_value = o_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    m_group = (o_group < num_rows - first_row) & (o_group * GROUP < num_values - first_value)
    m_value = (o_value < (num_rows - first_row) * GROUP) & (o_value < num_values - first_value)
    return first_group, first_value, m_group, o_value, m_value


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def encode_kernel(
    value, memory, codes, scales, num_values, seed_low, seed_high,
    ENCODED: tl.constexpr, LEVEL: tl.constexpr, CONSTANTS: tl.constexpr,
    BITS: tl.constexpr, SEGMENTS: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_G: tl.constexpr, ROTATE: tl.constexpr, STOCHASTIC: tl.constexpr, UNROLL: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    LARGEST: tl.constexpr = 5.192296858534828e33
    num_values = tl.cast(num_values, tl.int64)
    num_rows = tl.cdiv(tl.cdiv(num_values, GROUP), SEGMENTS)
    o_group = tl.arange(0, BLOCK_G)
    b_word = tl.zeros((BLOCK_G, GROUP), tl.int32)
    for segment in tl.range(0, SEGMENTS, loop_unroll_factor=UNROLL):
        group, first, m_group, o_value, m_value = tile_of(segment, num_rows, num_values, GROUP, BLOCK_G)
        b_value = mem.load(value + first + o_value, m_value)
        b_base = mem.load(memory + first + o_value, m_value) if CARRY else tl.zeros_like(b_value)
        b_x = b_value - b_base
        b_peak = tl.max(mem.magnitude_bits(b_x), 1)
        b_finite = mem.are_finite(b_peak)
        b_y = mem.saturated(tl.where(b_finite[:, None], b_x, 0.0), LARGEST)

        b_exponent = tl.minimum(b_peak >> 23, 239)
        m_tiny = (b_exponent < 27) | ~b_finite
        b_down = tl.where(m_tiny, 0, (254 - b_exponent) << 23).to(tl.float32, bitcast=True)
        b_up = tl.where(m_tiny, 0, b_exponent << 23).to(tl.float32, bitcast=True)
        b_y = b_y * b_down[:, None]
        b_key = random_bits.group_keys(group + o_group, seed_low, seed_high)
        b_count = tl.minimum(tl.maximum(num_values - first - o_group * GROUP, 1), GROUP).to(tl.float32)
        if ROTATE:
            b_y = random_bits.with_signs(b_y, b_key, BLOCK_G, GROUP)
            b_y = random_bits.hadamard(b_y, BLOCK_G, GROUP, LEVELS)
            b_count = tl.full((BLOCK_G,), GROUP, tl.float32)
            b_up = b_up * (1.0 / GROUP)
        b_noise = random_bits.noise(b_key, GROUP) if STOCHASTIC else b_y
        b_code, b_scale = ENCODED(b_y, b_count, b_noise, CONSTANTS, BLOCK_G, GROUP, LEVELS)
        b_scale_bits = mem.bf16_bits(b_scale * b_up)

        if HAS_MEMORY:
            b_sent = LEVEL(b_code, CONSTANTS) * mem.from_bf16_bits(b_scale_bits)[:, None]
            if ROTATE:
                b_sent = random_bits.hadamard(b_sent, BLOCK_G, GROUP, LEVELS)
                b_sent = random_bits.with_signs(b_sent, b_key, BLOCK_G, GROUP)
            b_memory = mem.saturated(b_base + b_sent if CARRY else b_sent, LIMIT)
            mem.store(memory + first + o_value, b_memory, m_value & b_finite[:, None])
        b_word |= b_code << (segment * BITS)
        b_scale_bits = tl.where(b_finite, b_scale_bits, 0x7FC0)
        tl.store(scales + group + o_group, b_scale_bits.to(tl.int16), m_group)

    for row in tl.static_range(BITS * SEGMENTS // 8):
        _, first, _, o_code, m_code = tile_of(row, num_rows, (row + 1) * num_rows * GROUP, GROUP, BLOCK_G)
        b_byte = ((b_word >> (8 * row)) & 0xFF).to(tl.uint8)
        tl.store(codes + first + o_code, b_byte, m_code)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def decode_kernel(
    codes, scales, memory, out, num_values, seed_low, seed_high,
    LEVEL: tl.constexpr, CONSTANTS: tl.constexpr,
    BITS: tl.constexpr, SEGMENTS: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_G: tl.constexpr, ROTATE: tl.constexpr, UNROLL: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    num_values = tl.cast(num_values, tl.int64)
    num_rows = tl.cdiv(tl.cdiv(num_values, GROUP), SEGMENTS)
    o_group = tl.arange(0, BLOCK_G)
    b_word = tl.zeros((BLOCK_G, GROUP), tl.int32)
    for row in tl.static_range(BITS * SEGMENTS // 8):
        _, first, _, o_code, m_code = tile_of(row, num_rows, (row + 1) * num_rows * GROUP, GROUP, BLOCK_G)
        b_byte = tl.load(codes + first + o_code, m_code, other=0)
        b_word |= b_byte.to(tl.int32) << (8 * row)

    for segment in tl.range(0, SEGMENTS, loop_unroll_factor=UNROLL):
        group, first, m_group, o_value, m_value = tile_of(segment, num_rows, num_values, GROUP, BLOCK_G)
        b_scale = mem.from_bf16_bits(tl.load(scales + group + o_group, m_group, other=0))
        m_finite = (b_scale == b_scale)[:, None]
        b_code = (b_word >> (segment * BITS)) & ((1 << BITS) - 1)
        b_sent = LEVEL(b_code, CONSTANTS) * b_scale[:, None]
        if ROTATE:
            b_key = random_bits.group_keys(group + o_group, seed_low, seed_high)
            b_sent = random_bits.hadamard(b_sent, BLOCK_G, GROUP, LEVELS)
            b_sent = random_bits.with_signs(b_sent, b_key, BLOCK_G, GROUP)
        if CARRY:
            b_sent = mem.load(memory + first + o_value, m_value) + b_sent
        b_memory = mem.rounded(memory, mem.saturated(b_sent, LIMIT))
        mem.store_both(memory + first, out + first, o_value, b_memory, m_value, m_finite, HAS_MEMORY)


class Family(NamedTuple):
    """The functions of a family of codecs, in plain torch and for Triton, and their constants."""

    plain: reference.Functions
    encoded: Any
    level: Any
    constants: tuple[Any, ...]


def _launch_options(codec: "GroupedCodec", num_values: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the constants and options that both kernels take."""
    block_groups = TILE // codec.group_size
    num_rows = triton.cdiv(triton.cdiv(num_values, codec.group_size), codec.num_segments)
    constants = {
        "LEVEL": codec.family.level,
        "CONSTANTS": codec.family.constants,
        "BITS": codec.bits,
        "SEGMENTS": codec.num_segments,
        "GROUP": codec.group_size,
        "LEVELS": codec.group_size.bit_length() - 1,
        "BLOCK_G": block_groups,
        "ROTATE": codec.rotates,
        "UNROLL": 1 if codec.num_segments > MOST_UNROLLED else 2,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }
    return (triton.cdiv(num_rows, block_groups),), constants


def encode_triton_(
    codec: "GroupedCodec", value: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, context: Context
) -> None:
    """As `reference.encode_`, in one pass on the GPU."""
    grid, constants = _launch_options(codec, value.numel())
    memory = context.memory
    encode_kernel[grid](
        value, value if memory is None else memory, codes, scales.view(torch.int16), value.numel(),
        *random_bits.halves(context.seed), **constants, ENCODED=codec.family.encoded,
        STOCHASTIC=codec.draws_noise, CARRY=context.carry and memory is not None,
        HAS_MEMORY=memory is not None, LIMIT=mem.limit(value, memory),
    )  # fmt: skip


def decode_triton_(
    codec: "GroupedCodec", codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, context: Context
) -> None:
    """As `reference.decode_`, in one pass on the GPU."""
    grid, constants = _launch_options(codec, out.numel())
    memory = context.memory
    decode_kernel[grid](
        codes, scales.view(torch.int16), out if memory is None else memory, out, out.numel(),
        *random_bits.halves(context.seed), **constants, CARRY=context.carry and memory is not None,
        HAS_MEMORY=memory is not None, LIMIT=mem.limit(out, memory),
    )  # fmt: skip


class GroupedCodec(BaseModel):
    """A codec with one bfloat16 scale per group of `group_size` values."""

    model_config = STRICT
    carries_by_default: ClassVar[bool] = False

    group_size: GroupSize = 128
    """Values that share a scale: a power of two."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        raise NotImplementedError

    @property
    def family(self) -> Family:
        raise NotImplementedError

    @property
    def rotates(self) -> bool:
        """Whether groups are rotated at random before they are coded."""
        return False

    @property
    def draws_noise(self) -> bool:
        """Whether rounding is random."""
        return False

    @property
    def num_segments(self) -> int:
        """How many codes share a word."""
        return SEGMENTS[self.bits]

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Codes of whole words, 2 bytes per group, padded to 16."""
        codes_nbytes, num_groups = self._sizes(torch.Size(shape).numel())
        return padded(codes_nbytes + 2 * num_groups)

    def new_state(self, shape: tuple[int, ...], device: torch.device) -> None:
        return None

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        codes, scales, padding = self._sections(payload, value.numel())
        encode_ = encode_triton_ if value.is_cuda else reference.encode_
        encode_(self, value, codes, scales, context)
        padding.zero_()

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        codes, scales, _ = self._sections(payload, out.numel())
        decode_ = decode_triton_ if out.is_cuda else reference.decode_
        decode_(self, codes, scales, out, context)

    def _sizes(self, num_values: int) -> tuple[int, int]:
        """Bytes of codes, and number of groups."""
        num_groups = triton.cdiv(num_values, self.group_size)
        num_rows = triton.cdiv(num_groups, self.num_segments)
        return num_rows * self.group_size * self.bits * self.num_segments // 8, num_groups

    def _sections(
        self, payload: torch.Tensor, num_values: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the payload: codes (uint8), scales (bfloat16), padding (uint8)."""
        codes_nbytes, num_groups = self._sizes(num_values)
        end = codes_nbytes + 2 * num_groups
        return payload[:codes_nbytes], payload[codes_nbytes:end].view(torch.bfloat16), payload[end:]
