"""The codec `randk`: k values of every block of B consecutive ones, drawn afresh for every message.

    k = max(1, floor(ratio * B))

Which ones follows from the message's seed, so no index crosses the wire. Positions are permuted by
three rounds of (multiply by an odd number, add, xor-shift) modulo B with numbers drawn per block, and
the values that come to the first k places are sent, not scaled up: for error feedback, where what is
kept back is sent later. Source: random-k sparsification, Stich et al., NeurIPS 2018 (arXiv 1809.07599).

Wire, for G blocks: G * k bfloat16 values, then padding to 16 bytes. A block that is not finite has
NaN as its first value. The last block may be short; places beyond its end carry zeros.

Rounding: as `topk` with bfloat16 values.
"""

from typing import Annotated, ClassVar, Literal

import torch
import triton
import triton.language as tl
from pydantic import AfterValidator, BaseModel, Field

from clapping_ds.codecs import memory as mem
from clapping_ds.codecs import random_bits
from clapping_ds.codecs.protocol import STRICT, Context, padded, power_of_two
from clapping_ds.codecs.reference import randk as reference
from clapping_ds.codecs.topk import check_block

TILE = 2048
NUM_WARPS = TILE // 16 // mem.WARP_SIZE


@triton.jit
def places(o_block, seed_low, seed_high, BLOCK: tl.constexpr, HALF: tl.constexpr):
    """uint32 [blocks, BLOCK]: a random permutation of each block."""
    b_key = random_bits.group_keys(o_block, seed_low, seed_high)[:, None]
    b_place = tl.arange(0, BLOCK).to(tl.uint32)[None, :] ^ (b_key & (BLOCK - 1))
    for _ in tl.static_range(3):
        b_key = random_bits.mixed(b_key)
        b_place = (b_place * ((b_key & (BLOCK - 1)) | 1) + (b_key >> 16)) & (BLOCK - 1)
        b_place = b_place ^ (b_place >> HALF)
    return b_place.to(tl.int32)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def encode_kernel(
    value, memory, values, num_values, seed_low, seed_high,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, HALF: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    LARGEST_BFLOAT16: tl.constexpr = 3.3895313892515355e38
    o_block = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    o_value = o_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_value = o_value < num_values
    b_value = mem.load(value + o_value, m_value)
    b_base = mem.load(memory + o_value, m_value) if CARRY else tl.zeros_like(b_value)
    b_x = b_value - b_base
    b_finite = mem.are_finite(tl.max(mem.magnitude_bits(b_x), 1, keep_dims=True))
    b_bits = mem.bf16_bits(mem.saturated(tl.where(b_finite, b_x, 0.0), LARGEST_BFLOAT16))

    b_place = places(o_block, seed_low, seed_high, BLOCK, HALF)
    m_kept = b_place < K
    if HAS_MEMORY:
        b_memory = mem.step(b_base, tl.where(m_kept, mem.from_bf16_bits(b_bits), 0.0), LIMIT)
        mem.store(memory + o_value, b_memory, m_value & b_finite)
    b_bits = tl.where((b_place == 0) & ~b_finite, 0x7FC0, b_bits).to(tl.int16)
    m_block = (o_block * BLOCK < num_values)[:, None]
    tl.store(values + o_block[:, None] * K + b_place, b_bits, m_kept & m_block)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def decode_kernel(
    values, memory, out, num_values, seed_low, seed_high,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, HALF: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    o_block = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    o_value = o_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_value = o_value < num_values
    m_block = (o_block * BLOCK < num_values)[:, None]
    b_place = places(o_block, seed_low, seed_high, BLOCK, HALF)
    b_bits = tl.load(values + o_block[:, None] * K + b_place, (b_place < K) & m_block, other=0)
    b_first = mem.from_bf16_bits(tl.load(values + o_block[:, None] * K, m_block, other=0))
    b_base = mem.load(memory + o_value, m_value) if CARRY else tl.zeros((BLOCK_G, BLOCK), tl.float32)
    b_finite = b_first == b_first
    b_sent = tl.where(b_finite, mem.from_bf16_bits(b_bits), 0.0)
    b_memory = mem.rounded(memory, mem.step(b_base, b_sent, LIMIT))
    mem.store_both(memory, out, o_value, b_memory, m_value, b_finite, HAS_MEMORY)


def launch_options(codec: "RandK", num_values: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the constants and options that both kernels take."""
    num_blocks = max(1, TILE // codec.block)
    constants = {"K": codec.k, "BLOCK": codec.block, "BLOCK_G": num_blocks, "HALF": codec.half}
    return (triton.cdiv(num_values, num_blocks * codec.block),), {**constants, "num_warps": NUM_WARPS}


def encode_triton_(codec: "RandK", value: torch.Tensor, values: torch.Tensor, context: Context) -> None:
    """As `reference.encode_`, in one pass on the GPU."""
    grid, constants = launch_options(codec, value.numel())
    memory = context.memory
    encode_kernel[grid](
        value, value if memory is None else memory, values.view(torch.int16), value.numel(),
        *random_bits.halves(context.seed), **constants, CARRY=context.carry and memory is not None,
        HAS_MEMORY=memory is not None, LIMIT=mem.limit(value, memory),
    )  # fmt: skip


def decode_triton_(codec: "RandK", values: torch.Tensor, out: torch.Tensor, context: Context) -> None:
    """As `reference.decode_`, in one pass on the GPU."""
    grid, constants = launch_options(codec, out.numel())
    memory = context.memory
    decode_kernel[grid](
        values.view(torch.int16), out if memory is None else memory, out, out.numel(),
        *random_bits.halves(context.seed), **constants, CARRY=context.carry and memory is not None,
        HAS_MEMORY=memory is not None, LIMIT=mem.limit(out, memory),
    )  # fmt: skip


class RandK(BaseModel):
    """k random values of each block, in bfloat16 and without indexes: 16 * ratio bits per value."""

    model_config = STRICT
    carries_by_default: ClassVar[bool] = True

    name: Literal["randk"] = "randk"
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the values that is sent."""
    block: Annotated[int, Field(ge=64, le=4096), AfterValidator(power_of_two)] = 1024
    """Values among which they are drawn: a power of two."""

    @property
    def k(self) -> int:
        return max(1, int(self.ratio * self.block))

    @property
    def half(self) -> int:
        """Shift of the permutation's rounds: half the bits of an index."""
        return (self.block.bit_length() - 1) // 2 + 1

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """2 bytes for each of ceil(values / block) * k values, padded to 16.

        Raises ValueError for a tensor smaller than one block.
        """
        check_block(self.name, self.block, shape)
        return padded(self._num_bytes(torch.Size(shape).numel()))

    def new_state(self, shape: tuple[int, ...], device: torch.device) -> None:
        return None

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        end = self._num_bytes(value.numel())
        encode_ = encode_triton_ if value.is_cuda else reference.encode_
        encode_(self, value, payload[:end].view(torch.bfloat16), context)
        payload[end:].zero_()

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        end = self._num_bytes(out.numel())
        decode_ = decode_triton_ if out.is_cuda else reference.decode_
        decode_(self, payload[:end].view(torch.bfloat16), out, context)

    def _num_bytes(self, num_values: int) -> int:
        return 2 * triton.cdiv(num_values, self.block) * self.k
