"""The codec `none`: the tensor itself, byte for byte.

It is the key codec of the strategy `fu`, the codec of everything that is not compressed, and with
`key` and `delta` both `none` the channel hands over exactly what it was given.
"""

from typing import ClassVar, Literal

import torch
import triton
import triton.language as tl
from pydantic import BaseModel

from clapping_ds.codecs import memory as mem
from clapping_ds.codecs.protocol import STRICT, Context, padded
from clapping_ds.codecs.reference import steps as reference

BLOCK = 2048


@triton.jit
def copy_kernel(
    source, target, memory, num_values,
    HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    o_run = tl.program_id(0).to(tl.int64) * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)
    o_value = o_run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    m_value = o_value < num_values
    b_raw = tl.load(source + o_value, m_value, other=0.0)
    tl.store(target + o_value, b_raw, m_value)
    if HAS_MEMORY:
        b_value = mem.as_float(b_raw)
        b_finite = mem.are_finite(tl.max(mem.magnitude_bits(b_value), 1))
        b_memory = mem.saturated(tl.where(b_finite[:, None], b_value, 0.0), LIMIT)
        mem.store(memory + o_value, b_memory, m_value & b_finite[:, None])


def copy_triton_(source: torch.Tensor, target: torch.Tensor, memory: torch.Tensor | None) -> None:
    """As `reference.copy_`, in one pass on the GPU."""
    num_values = source.numel()
    copy_kernel[(triton.cdiv(num_values, BLOCK),)](
        source, target, source if memory is None else memory, num_values,
        HAS_MEMORY=memory is not None, LIMIT=mem.limit(source, memory),
        BLOCK=BLOCK, RUN=reference.RUN, num_warps=BLOCK // 16 // mem.WARP_SIZE,
    )  # fmt: skip


class Raw(BaseModel):
    """Sends values as they are. `memory`, where given, becomes the value, but for every run of 16
    values of which one is not finite.

    Wire: the tensor's bytes, then padding to 16 bytes. The receiver gets the value unrounded; the
    memory is rounded to its own dtype and saturates there.
    """

    model_config = STRICT
    carries_by_default: ClassVar[bool] = False

    name: Literal["none"] = "none"

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return padded(torch.Size(shape).numel() * dtype.itemsize)

    def new_state(self, shape: tuple[int, ...], device: torch.device) -> None:
        return None

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        num_bytes = value.numel() * value.element_size()
        self._copy_(value.view(-1), payload[:num_bytes].view(value.dtype), context.memory)
        payload[num_bytes:].zero_()

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        num_bytes = out.numel() * out.element_size()
        self._copy_(payload[:num_bytes].view(out.dtype), out.view(-1), context.memory)

    @staticmethod
    def _copy_(source: torch.Tensor, target: torch.Tensor, memory: torch.Tensor | None) -> None:
        if memory is None:
            target.copy_(source)
        elif source.is_cuda:
            copy_triton_(source, target, memory.view(-1))
        else:
            reference.copy_(source, target, memory.view(-1))
