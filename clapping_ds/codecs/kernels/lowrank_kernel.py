"""The product of low-rank factors for Triton: the twin of `lowrank_reference`."""

import torch
import triton
import triton.language as tl

from clapping_ds.codecs.base import Context
from clapping_ds.codecs.kernels import numerics as num

BLOCK_N, BLOCK_D = 16, 128


@triton.jit
def apply_kernel(
    left, right, memory, out, num_rows, num_columns,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, HAS_OUT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    num_rows, num_columns = tl.cast(num_rows, tl.int64), tl.cast(num_columns, tl.int64)
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_row, m_column = o_row < num_rows, o_column < num_columns
    b_sent = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_first = num.load(left + o_row, m_row)
    for rank in tl.static_range(RANK):
        b_left = num.load(left + rank * num_rows + o_row, m_row)
        b_right = num.load(right + rank * num_columns + o_column, m_column)
        b_sent += b_left[:, None] * b_right[None, :]
    o_value = o_row[:, None] * num_columns + o_column[None, :]
    m_value = m_row[:, None] & m_column[None, :]
    m_finite = (b_first == b_first)[:, None]
    b_base = num.load(memory + o_value, m_value) if CARRY else tl.zeros_like(b_sent)
    b_memory = num.update(b_base, tl.where(m_finite, b_sent, 0.0), LIMIT)
    b_memory = num.round_to_dtype(memory, b_memory)
    if HAS_OUT:
        num.store_both(memory, out, o_value, b_memory, m_value, m_finite, HAS_MEMORY)
    else:
        num.store(memory + o_value, b_memory, m_value & m_finite, EXACT=True)


def apply_(
    left_RN: torch.Tensor,
    right_RD: torch.Tensor,
    like: torch.Tensor,
    out: torch.Tensor | None,
    context: Context,
) -> None:
    """As `lowrank_reference.apply_`, in one pass on the GPU."""
    (rank, num_rows), num_columns = left_RN.shape, right_RD.shape[1]
    memory, of_memory = num.make_memory_arguments(like, context)
    apply_kernel[(triton.cdiv(num_rows, BLOCK_N), triton.cdiv(num_columns, BLOCK_D))](
        left_RN, right_RD, memory, like if out is None else out, num_rows, num_columns, RANK=rank,
        BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=num.choose_num_warps(BLOCK_N * BLOCK_D),
        **of_memory, HAS_OUT=out is not None,
    )  # fmt: skip
