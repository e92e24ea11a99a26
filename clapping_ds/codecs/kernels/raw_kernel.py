"""The codec `none` for Triton: the twin of `raw_reference`."""

import torch
import triton
import triton.language as tl

from clapping_ds.codecs.base import limit
from clapping_ds.codecs.kernels import numerics as num
from clapping_ds.codecs.reference.raw_reference import RUN

BLOCK = 2048


@triton.jit
def copy_kernel(
    source, target, memory, num_values,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    o_run = tl.program_id(0).to(tl.int64) * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)
    o_value = o_run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    m_value = o_value < num_values
    b_raw = tl.load(source + o_value, m_value, other=0.0)
    tl.store(target + o_value, b_raw, m_value)
    b_value = num.to_float(b_raw)
    b_finite = num.are_finite(tl.max(num.to_magnitude_bits(b_value), 1))
    b_memory = num.saturate(tl.where(b_finite[:, None], b_value, 0.0), LIMIT)
    num.store(memory + o_value, b_memory, m_value & b_finite[:, None])


def copy_(source: torch.Tensor, target: torch.Tensor, memory: torch.Tensor) -> None:
    """As `raw_reference.copy_`, in one pass on the GPU."""
    num_values = source.numel()
    copy_kernel[(triton.cdiv(num_values, BLOCK),)](
        source, target, memory, num_values, LIMIT=limit(source, memory),
        BLOCK=BLOCK, RUN=RUN, num_warps=num.choose_num_warps(BLOCK),
    )  # fmt: skip
