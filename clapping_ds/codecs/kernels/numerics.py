"""What every kernel does with a memory: read it, update it, round it. `numerics_reference` has the same.

One memory is held at both ends of a link, so its update must give the same bits in the encode
kernel, in the decode kernel, on either vendor's GPU and in plain torch. Two rules make that so:

* `update` adds a product that is exact in fp32, so that fusing it into a multiply-add changes nothing;
* bfloat16 is converted with integer arithmetic, round to nearest even, which is what torch does.
  (Triton's interpreter truncates.)
"""

from typing import Any

import torch
import triton
import triton.language as tl

from clapping_ds.codecs.base import Context, limit

WARP_SIZE = 64 if torch.version.hip else 32
VALUES_PER_THREAD = 16
"""So that a thread writes a whole number of 16-byte words of codes."""

FP32_BIAS = tl.constexpr(127)
FP32_MANTISSA = tl.constexpr(23)
"""Bits."""
LOW_HALF = tl.constexpr(0xFFFF)
LARGEST_BFLOAT16 = tl.constexpr(3.3895313892515355e38)
NAN_BFLOAT16_BITS = tl.constexpr(0x7FC0)
INFINITY_BITS = tl.constexpr(0x7F800000)
MANTISSA_MASK = tl.constexpr(0x7FFFFF)
MAGNITUDE_MASK = tl.constexpr(0x7FFFFFFF)
TWO_TO_23 = tl.constexpr(8388608.0)
"""The fp32 from which on whole numbers are next to each other: its low bits are an integer's."""
ONE_AND_A_HALF_TIMES_TWO_TO_23 = tl.constexpr(12582912.0)


def choose_num_warps(values_per_program: int, values_per_thread: int = VALUES_PER_THREAD) -> int:
    return max(1, values_per_program // values_per_thread // WARP_SIZE)


def make_memory_arguments(tensor: torch.Tensor, context: Context) -> tuple[torch.Tensor, dict[str, Any]]:
    """What a kernel takes as `memory` (without one a stand-in that is not read), and its constants CARRY,
    HAS_MEMORY and LIMIT. tensor: the value to encode, or the output of decoding."""
    memory = context.memory
    constants = {
        "CARRY": context.base is not None,
        "HAS_MEMORY": memory is not None,
        "LIMIT": limit(tensor, memory),
    }
    return tensor if memory is None else memory, constants


@triton.jit
def to_bf16_bits(b_x):
    """int32 tensor: the 16 bits of fp32 `b_x` (not NaN) rounded to bfloat16, nearest even."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    return ((b_bits + (LOW_HALF >> 1) + ((b_bits >> 16) & 1)) >> 16) & LOW_HALF


@triton.jit
def from_bf16_bits(b_bits):
    """fp32 tensor with the value of the bfloat16 whose 16 bits are the low half of `b_bits`."""
    return (b_bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def to_float(b_raw):
    """fp32 tensor of fp32, fp16 or bf16 values."""
    if b_raw.dtype == tl.bfloat16:
        b_x = from_bf16_bits(b_raw.to(tl.int16, bitcast=True))
    else:
        b_x = b_raw.to(tl.float32)
    return b_x


@triton.jit
def load(p_x, m_x):
    """fp32 tensor read from fp32, fp16 or bf16; 0 where the mask `m_x` is off."""
    return to_float(tl.load(p_x, m_x, other=0.0))


@triton.jit
def store(p_x, b_x, m_x, EXACT: tl.constexpr = False):
    """Rounds fp32 `b_x` to the dtype behind `p_x` and writes it where `m_x` is on.

    EXACT: it is known to need no rounding, NaN being float("nan").
    """
    if p_x.dtype.scalar.element_ty == tl.bfloat16:
        if EXACT:
            b_bits = b_x.to(tl.int32, bitcast=True) >> 16
        else:
            b_bits = tl.where(b_x != b_x, NAN_BFLOAT16_BITS, to_bf16_bits(b_x))
        tl.store(p_x.to(tl.pointer_type(tl.int16), bitcast=True), b_bits.to(tl.int16), m_x)
    else:
        tl.store(p_x, b_x.to(p_x.dtype.scalar.element_ty), m_x)


@triton.jit
def store_both(memory, out, o_x, b_memory, m_x, m_finite, HAS_MEMORY: tl.constexpr):
    """Keeps an updated memory, rounded already, and hands it on, NaN where it is not finite."""
    if HAS_MEMORY:
        store(memory + o_x, b_memory, m_x & m_finite, EXACT=True)
    IS_EXACT: tl.constexpr = memory.dtype.scalar.element_ty == out.dtype.scalar.element_ty
    store(out + o_x, tl.where(m_finite, b_memory, float("nan")), m_x, EXACT=IS_EXACT)


@triton.jit
def round_to_dtype(p_x, b_x):
    """Finite fp32 `b_x` after rounding to the dtype behind `p_x`."""
    if p_x.dtype.scalar.element_ty == tl.bfloat16:
        b_rounded = from_bf16_bits(to_bf16_bits(b_x))
    else:
        b_rounded = b_x.to(p_x.dtype.scalar.element_ty).to(tl.float32)
    return b_rounded


@triton.jit
def saturate(b_x, LIMIT: tl.constexpr):
    return tl.minimum(tl.maximum(b_x, -LIMIT), LIMIT)


@triton.jit
def update(b_base, b_sent, LIMIT: tl.constexpr):
    """m <- base + sent, saturated at `LIMIT`. `b_sent` is exact in fp32 (see the module)."""
    return saturate(b_base + b_sent, LIMIT)


@triton.jit
def to_magnitude_bits(b_x):
    """int32 tensor that orders fp32 values by magnitude: their bits without the sign."""
    return b_x.to(tl.int32, bitcast=True) & MAGNITUDE_MASK


@triton.jit
def are_finite(b_magnitude_bits):
    """Whether values with these magnitude bits are finite."""
    return b_magnitude_bits < INFINITY_BITS


@triton.jit
def round_to_nearest(b_x):
    """The nearest integer of fp32 `b_x` below 2^22, ties to even. Faster than the GPU's own rounding."""
    return (b_x + ONE_AND_A_HALF_TIMES_TWO_TO_23) - ONE_AND_A_HALF_TIMES_TWO_TO_23


@triton.jit
def to_integer(b_x):
    """int32 of fp32 `b_x`, a whole number in 0 .. 2^23 - 1. Faster than the GPU's own conversion."""
    return (b_x + TWO_TO_23).to(tl.int32, bitcast=True) & MANTISSA_MASK
