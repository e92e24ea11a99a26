"""The codec `topk`: of every block of B consecutive values the k of largest magnitude.

    k = max(1, floor(ratio * B))

Wire, for G blocks: G * k values in bfloat16, largest magnitude first, then G * k uint16 indexes into
their blocks, then padding to 16 bytes. A block that is not finite is sent as a first value of NaN.

The last block may be short; indexes beyond its end carry zeros. Of equal magnitudes a positive value
goes before a negative one, then the lower index before the higher.

Rounding, for x = fp32(v - m): a value that is sent is kept back by at most |x| * 2^-8, one that is
not sent is kept back whole; m' = m + D(x) is rounded once in fp32 and once to the memory's dtype.
"""

from typing import Annotated, ClassVar, Literal

import torch
import triton
import triton.language as tl
from pydantic import AfterValidator, BaseModel, Field

from clapping_ds.codecs import memory as mem
from clapping_ds.codecs import reference
from clapping_ds.codecs.protocol import STRICT, padded, power_of_two


@triton.jit
def encode_kernel(
    value, memory, values, indexes, num_values,
    K: tl.constexpr, BLOCK: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One block per program. The sort key holds magnitude, sign and index, so that it is unique and
    the sorted keys are all that has to be written."""
    LARGEST_BFLOAT16: tl.constexpr = 3.3895313892515355e38
    pid = tl.program_id(0).to(tl.int64)
    o_in_block = tl.arange(0, BLOCK)
    o_value = pid * BLOCK + o_in_block
    m_value = o_value < num_values

    b_value = mem.load(value + o_value, m_value)
    b_base = mem.load(memory + o_value, m_value) if CARRY else tl.zeros_like(b_value)
    b_x = b_value - b_base
    b_finite = mem.are_finite(tl.max(mem.magnitude_bits(b_x), 0, keep_dims=True))
    b_x = tl.where(b_finite, b_x, 0.0)

    b_positive = (b_x.to(tl.int32, bitcast=True) >= 0).to(tl.int64)
    b_key = (mem.magnitude_bits(b_x).to(tl.int64) << 17) | (b_positive << 16) | (BLOCK - 1 - o_in_block)
    b_sorted = tl.sort(b_key, descending=True)
    b_last_kept = tl.sum(tl.where(o_in_block == K - 1, b_sorted, 0), 0, keep_dims=True)

    if HAS_MEMORY:
        b_clamped = mem.saturated(b_x, LARGEST_BFLOAT16)
        b_rounded = mem.from_bf16_bits(mem.bf16_bits(b_clamped))
        b_sent = tl.where(b_key >= b_last_kept, b_rounded, 0.0)
        mem.store(memory + o_value, mem.step(b_base, b_sent, LIMIT), m_value & b_finite)

    b_kept = (b_sorted >> 17).to(tl.int32).to(tl.float32, bitcast=True)
    b_kept = tl.where((b_sorted >> 16) & 1 == 1, b_kept, -b_kept)
    b_kept_bits = mem.bf16_bits(mem.saturated(b_kept, LARGEST_BFLOAT16))
    b_kept_bits = tl.where((o_in_block == 0) & ~b_finite, 0x7FC0, b_kept_bits)
    m_kept = o_in_block < K
    tl.store(values + pid * K + o_in_block, b_kept_bits.to(tl.int16), m_kept)
    tl.store(indexes + pid * K + o_in_block, (BLOCK - 1 - (b_sorted & 0xFFFF)).to(tl.int16), m_kept)


@triton.jit
def decode_kernel(
    values, indexes, memory, out, num_values,
    K: tl.constexpr, K_POWER: tl.constexpr, BLOCK: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One block per program: first the base everywhere, then, past a barrier, the values received."""
    pid = tl.program_id(0).to(tl.int64)
    o_kept = tl.arange(0, K_POWER)
    m_kept = o_kept < K
    b_kept = mem.from_bf16_bits(tl.load(values + pid * K + o_kept, m_kept, other=0))
    b_index = tl.load(indexes + pid * K + o_kept, m_kept, other=0).to(tl.int64) & 0xFFFF
    b_finite = tl.max(tl.where(b_kept == b_kept, 0, 1), 0, keep_dims=True) == 0
    o_target = pid * BLOCK + b_index
    m_target = m_kept & (o_target < num_values)
    if CARRY:
        b_base_kept = mem.load(memory + o_target, m_target)
    else:
        b_base_kept = tl.zeros_like(b_kept)

    o_value = pid * BLOCK + tl.arange(0, BLOCK)
    m_value = o_value < num_values
    if CARRY:
        b_base = mem.load(memory + o_value, m_value)
    else:
        b_base = tl.zeros((BLOCK,), tl.float32)
    b_rest = mem.rounded(memory, mem.step(b_base, 0.0, LIMIT))
    if HAS_MEMORY:
        mem.store(memory + o_value, b_rest, m_value & b_finite)
    mem.store(out + o_value, tl.where(b_finite, b_rest, float("nan")), m_value)
    tl.debug_barrier()

    b_memory = mem.rounded(memory, mem.step(b_base_kept, b_kept, LIMIT))
    if HAS_MEMORY:
        mem.store(memory + o_target, b_memory, m_target & b_finite)
    mem.store(out + o_target, b_memory, m_target & b_finite)


def encode_triton_(
    codec: "TopK",
    value: torch.Tensor,
    memory: torch.Tensor | None,
    values: torch.Tensor,
    indexes: torch.Tensor,
    carry: bool,
) -> None:
    """As `reference.topk_encode_`, in one pass on the GPU."""
    encode_kernel[(triton.cdiv(value.numel(), codec.block),)](
        value, value if memory is None else memory, values.view(torch.int16),
        indexes.view(torch.int16), value.numel(), K=codec.k, BLOCK=codec.block,
        CARRY=carry, HAS_MEMORY=memory is not None, LIMIT=mem.limit(value, memory),
    )  # fmt: skip


def decode_triton_(
    codec: "TopK",
    values: torch.Tensor,
    indexes: torch.Tensor,
    memory: torch.Tensor | None,
    out: torch.Tensor,
    carry: bool,
) -> None:
    """As `reference.topk_decode_`, in one pass on the GPU."""
    decode_kernel[(triton.cdiv(out.numel(), codec.block),)](
        values.view(torch.int16), indexes.view(torch.int16), out if memory is None else memory, out,
        out.numel(), K=codec.k, K_POWER=triton.next_power_of_2(codec.k), BLOCK=codec.block,
        CARRY=carry, HAS_MEMORY=memory is not None, LIMIT=mem.limit(out, memory),
    )  # fmt: skip


class TopK(BaseModel):
    """The k largest of each block, as (bfloat16 value, uint16 index): 32 * ratio bits per value."""

    model_config = STRICT
    carries_by_default: ClassVar[bool] = True

    name: Literal["topk"] = "topk"
    ratio: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the values that is sent."""
    block: Annotated[int, Field(ge=64, le=4096), AfterValidator(power_of_two)] = 1024
    """Values among which the largest are picked: a power of two."""

    @property
    def k(self) -> int:
        return max(1, int(self.ratio * self.block))

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """4 bytes for each of ceil(values / block) * k values, padded to 16.

        Raises ValueError for a tensor smaller than one block.
        """
        num_values = torch.Size(shape).numel()
        if num_values < self.block:
            raise ValueError(
                f"topk: block {self.block} is larger than the tensor of shape {tuple(shape)}; "
                f"accepted: a block of at most {num_values}"
            )
        return padded(4 * triton.cdiv(num_values, self.block) * self.k)

    def encode_(
        self, value: torch.Tensor, memory: torch.Tensor | None, payload: torch.Tensor, carry: bool
    ) -> None:
        values, indexes, padding = self._sections(payload, value.numel())
        encode_ = encode_triton_ if value.is_cuda else reference.topk_encode_
        encode_(self, value, memory, values, indexes, carry and memory is not None)
        padding.zero_()

    def decode_(
        self, payload: torch.Tensor, memory: torch.Tensor | None, out: torch.Tensor, carry: bool
    ) -> None:
        values, indexes, _ = self._sections(payload, out.numel())
        decode_ = decode_triton_ if out.is_cuda else reference.topk_decode_
        decode_(self, values, indexes, memory, out, carry and memory is not None)

    def _sections(
        self, payload: torch.Tensor, num_values: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the payload: values (bfloat16), indexes (uint16), padding (uint8)."""
        middle = 2 * triton.cdiv(num_values, self.block) * self.k
        end = 2 * middle
        return (
            payload[:middle].view(torch.bfloat16),
            payload[middle:end].view(torch.uint16),
            payload[end:],
        )
