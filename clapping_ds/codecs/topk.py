"""The codec `topk`: of every block of B consecutive values the k of largest magnitude.

    k = max(1, floor(ratio * B))

Magnitudes are compared after rounding to bfloat16, which is what is sent; of equal ones the lower
index goes first. Wire, for G blocks: G * k uint16 indexes into their blocks, ascending; with int8
values one bfloat16 scale per block; then G * k values, in bfloat16 or as int8 codes; then padding to 16
bytes. A block that is not finite has NaN as its first value, with int8 as its scale. The last block
may be short; indexes beyond its end carry zeros.

Rounding, for x = fp32(v - m): a value that is sent is kept back by at most |x| * 2^-8 (int8: half a
scale, which is max|x| / 127), one that is not sent is kept back whole; m' = m + D(x) is rounded once in
fp32 and once to the memory's dtype.

The kernel finds the k-th largest by bisection of its 15 bits, so nothing is sorted, and the place of
each value that is kept by one prefix sum.
"""

from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from pydantic import AfterValidator, BaseModel, Field

from clapping_ds.codecs import memory as mem
from clapping_ds.codecs.protocol import STRICT, Context, padded, power_of_two
from clapping_ds.codecs.reference import topk as reference


@triton.jit
def selected(b_rank, K: tl.constexpr):
    """Which of a block are the k of highest rank (int32 below 2^15), and their places among these."""
    b_cut = tl.zeros((1,), tl.int32)
    for bit in tl.static_range(14, -1, -1):
        b_higher = b_cut | (1 << bit)
        b_count = tl.sum((b_rank >= b_higher).to(tl.int32), 0, keep_dims=True)
        b_cut = tl.where(b_count >= K, b_higher, b_cut)
    b_above = (b_rank > b_cut).to(tl.int32)
    b_equal = (b_rank == b_cut).to(tl.int32)
    b_room = K - tl.sum(b_above, 0, keep_dims=True)
    b_before = tl.cumsum(b_above | (b_equal << 16), 0) - (b_above | (b_equal << 16))
    b_equal_before = b_before >> 16
    m_kept = (b_above == 1) | ((b_equal == 1) & (b_equal_before < b_room))
    return m_kept, (b_before & 0xFFFF) + tl.minimum(b_equal_before, b_room)


@triton.jit
def encode_kernel(
    value, memory, indexes, scales, values, num_values,
    K: tl.constexpr, BLOCK: tl.constexpr, INT8: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One block per program."""
    LARGEST_BFLOAT16: tl.constexpr = 3.3895313892515355e38
    pid = tl.program_id(0).to(tl.int64)
    o_in_block = tl.arange(0, BLOCK)
    o_value = pid * BLOCK + o_in_block
    m_value = o_value < num_values

    b_value = mem.load(value + o_value, m_value)
    b_base = mem.load(memory + o_value, m_value) if CARRY else tl.zeros_like(b_value)
    b_x = b_value - b_base
    b_finite = mem.are_finite(tl.max(mem.magnitude_bits(b_x), 0, keep_dims=True))
    b_x = mem.saturated(tl.where(b_finite, b_x, 0.0), LARGEST_BFLOAT16)
    m_kept, o_kept = selected(mem.bf16_bits(tl.abs(b_x)), K)

    if INT8:
        b_scale_bits = mem.bf16_bits(tl.max(tl.abs(b_x), 0, keep_dims=True) * (1.0 / 127))
        b_scale = mem.from_bf16_bits(b_scale_bits)
        m_scale = b_scale >= 7.888609052210118e-31
        b_inverse = tl.where(m_scale, tl.div_rn(1.0, tl.where(m_scale, b_scale, 1.0)), 0.0)
        b_code = mem.saturated(tl.floor(b_x * b_inverse + 0.5), 127.0)
        b_sent = b_code * b_scale
        tl.store(values + pid * K + o_kept, b_code.to(tl.int8), m_kept)
        b_flagged = tl.where(b_finite, b_scale_bits, 0x7FC0).to(tl.int16)
        tl.store(scales + pid + tl.arange(0, 1), b_flagged)
    else:
        b_bits = mem.bf16_bits(b_x)
        b_sent = mem.from_bf16_bits(b_bits)
        b_bits = tl.where((o_kept == 0) & ~b_finite, 0x7FC0, b_bits)
        tl.store(values + pid * K + o_kept, b_bits.to(tl.int16), m_kept)
    tl.store(indexes + pid * K + o_kept, o_in_block.to(tl.int16), m_kept)
    if HAS_MEMORY:
        b_memory = mem.step(b_base, tl.where(m_kept, b_sent, 0.0), LIMIT)
        mem.store(memory + o_value, b_memory, m_value & b_finite)


@triton.jit
def decode_kernel(
    indexes, scales, values, memory, out, num_values,
    K: tl.constexpr, K_POWER: tl.constexpr, BLOCK: tl.constexpr, INT8: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One block per program. The indexes ascend, so a value's place is the number of those below it."""
    pid = tl.program_id(0).to(tl.int64)
    m_kept = tl.arange(0, K_POWER) < K
    b_index = tl.load(indexes + pid * K + tl.arange(0, K_POWER), m_kept, other=0).to(tl.int32)
    b_is_sent = tl.histogram(b_index & 0xFFFF, BLOCK, mask=m_kept)
    o_place = tl.cumsum(b_is_sent, 0) - b_is_sent
    b_kept = tl.load(values + pid * K + o_place, b_is_sent == 1, other=0)
    if INT8:
        b_first = mem.from_bf16_bits(tl.load(scales + pid + tl.arange(0, 1)))
        b_kept = b_kept.to(tl.float32) * b_first
    else:
        b_first = mem.from_bf16_bits(tl.load(values + pid * K + tl.arange(0, 1)))
        b_kept = mem.from_bf16_bits(b_kept)
    b_finite = b_first == b_first
    b_sent = tl.where(b_finite & (b_is_sent == 1), b_kept, 0.0)

    o_value = pid * BLOCK + tl.arange(0, BLOCK)
    m_value = o_value < num_values
    b_base = mem.load(memory + o_value, m_value) if CARRY else tl.zeros((BLOCK,), tl.float32)
    b_memory = mem.rounded(memory, mem.step(b_base, b_sent, LIMIT))
    mem.store_both(memory, out, o_value, b_memory, m_value, b_finite, HAS_MEMORY)


class Sections(NamedTuple):
    """Views of a payload. `scales` is empty with bfloat16 values."""

    indexes: torch.Tensor
    scales: torch.Tensor
    values: torch.Tensor
    padding: torch.Tensor


def launch_options(codec: "TopK", num_values: int) -> tuple[tuple[int], dict[str, int | bool]]:
    """The grid, and the constants and options that both kernels take."""
    constants = {"K": codec.k, "BLOCK": codec.block, "INT8": codec.values == "int8"}
    options = {"num_warps": max(1, codec.block // (32 * mem.WARP_SIZE)), "enable_fp_fusion": False}
    return (triton.cdiv(num_values, codec.block),), {**constants, **options}


def encode_triton_(codec: "TopK", value: torch.Tensor, sections: Sections, context: Context) -> None:
    """As `reference.encode_`, in one pass on the GPU."""
    grid, constants = launch_options(codec, value.numel())
    memory, values = context.memory, sections.values
    encode_kernel[grid](
        value, value if memory is None else memory, sections.indexes.view(torch.int16),
        sections.scales.view(torch.int16), values.view(torch.int8 if codec.values == "int8" else torch.int16),
        value.numel(), **constants, CARRY=context.carry and memory is not None,
        HAS_MEMORY=memory is not None, LIMIT=mem.limit(value, memory),
    )  # fmt: skip


def decode_triton_(codec: "TopK", sections: Sections, out: torch.Tensor, context: Context) -> None:
    """As `reference.decode_`, in one pass on the GPU."""
    grid, constants = launch_options(codec, out.numel())
    memory, values = context.memory, sections.values
    decode_kernel[grid](
        sections.indexes.view(torch.int16), sections.scales.view(torch.int16),
        values.view(torch.int8 if codec.values == "int8" else torch.int16),
        out if memory is None else memory, out, out.numel(), **constants,
        K_POWER=triton.next_power_of_2(codec.k), CARRY=context.carry and memory is not None,
        HAS_MEMORY=memory is not None, LIMIT=mem.limit(out, memory),
    )  # fmt: skip


class TopK(BaseModel):
    """The k largest of each block, as (uint16 index, value): 32 * ratio bits per value, int8 24 * ratio."""

    model_config = STRICT
    carries_by_default: ClassVar[bool] = True

    name: Literal["topk"] = "topk"
    ratio: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the values that is sent."""
    block: Annotated[int, Field(ge=64, le=4096), AfterValidator(power_of_two)] = 1024
    """Values among which the largest are picked: a power of two."""
    values: Literal["bfloat16", "int8"] = "bfloat16"
    """How they are sent; int8 with one scale per block."""

    @property
    def k(self) -> int:
        return max(1, int(self.ratio * self.block))

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """4 bytes, or 3, for each of ceil(values / block) * k values, padded to 16.

        Raises ValueError for a tensor smaller than one block.
        """
        num_values = torch.Size(shape).numel()
        check_block(self.name, self.block, shape)
        return padded(self._ends(num_values)[2])

    def new_state(self, shape: tuple[int, ...], device: torch.device) -> None:
        return None

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        sections = self._sections(payload, value.numel())
        encode_ = encode_triton_ if value.is_cuda else reference.encode_
        encode_(self, value, sections, context)
        sections.padding.zero_()

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        decode_ = decode_triton_ if out.is_cuda else reference.decode_
        decode_(self, self._sections(payload, out.numel()), out, context)

    def _ends(self, num_values: int) -> tuple[int, int, int]:
        """Where indexes, scales and values end."""
        num_blocks = triton.cdiv(num_values, self.block)
        num_kept = num_blocks * self.k
        if self.values == "int8":
            return 2 * num_kept, 2 * num_kept + 2 * num_blocks, 3 * num_kept + 2 * num_blocks
        return 2 * num_kept, 2 * num_kept, 4 * num_kept

    def _sections(self, payload: torch.Tensor, num_values: int) -> Sections:
        first, second, third = self._ends(num_values)
        return Sections(
            payload[:first].view(torch.uint16),
            payload[first:second].view(torch.bfloat16),
            payload[second:third].view(torch.int8 if self.values == "int8" else torch.bfloat16),
            payload[third:],
        )


def check_block(name: str, block: int, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a tensor smaller than one block."""
    num_values = torch.Size(shape).numel()
    if num_values < block:
        raise ValueError(
            f"{name}: block {block} is larger than the tensor of shape {tuple(shape)}; "
            f"accepted: a block of at most {num_values}"
        )
