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

from types import ModuleType
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, Field

from clapping_ds.codecs.base import STRICT, Context, ceil_div, check_block, pad_nbytes, power_of_two
from clapping_ds.codecs.reference import randk_reference
from clapping_ds.codecs.reference.randk_reference import Selection


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
    def selection(self) -> Selection:
        """What both implementations are told."""
        return Selection(self.k, self.block)

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """2 bytes for each of ceil(values / block) * k values, padded to 16.

        Raises ValueError for a tensor smaller than one block.
        """
        check_block(self.name, self.block, shape)
        return pad_nbytes(self._num_bytes(torch.Size(shape).numel()))

    def new_state(self, width: int, device: torch.device) -> None:
        return None

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        end = self._num_bytes(value.numel())
        values = payload[:end].view(torch.bfloat16)
        _implementation(value).encode_(self.selection, value, values, context)
        payload[end:].zero_()

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        values = payload[: self._num_bytes(out.numel())].view(torch.bfloat16)
        _implementation(out).decode_(self.selection, values, out, context)

    def _num_bytes(self, num_values: int) -> int:
        return 2 * ceil_div(num_values, self.block) * self.k


def _implementation(tensor: torch.Tensor) -> ModuleType:
    """Triton's for a tensor on a GPU, plain torch elsewhere."""
    if tensor.is_cuda:
        from clapping_ds.codecs.kernels import randk_kernel

        return randk_kernel
    return randk_reference
