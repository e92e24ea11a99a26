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
"""

from types import ModuleType
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, Field

from clapping_ds.codecs.base import STRICT, Context, ceil_div, check_block, pad_nbytes, power_of_two
from clapping_ds.codecs.reference import topk_reference
from clapping_ds.codecs.reference.topk_reference import Sections, Selection


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

    @property
    def selection(self) -> Selection:
        """What both implementations are told."""
        return Selection(self.k, self.block, self.values == "int8")

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """4 bytes, or 3, for each of ceil(values / block) * k values, padded to 16.

        Raises ValueError for a tensor smaller than one block.
        """
        num_values = torch.Size(shape).numel()
        check_block(self.name, self.block, shape)
        return pad_nbytes(self._ends(num_values)[2])

    def new_state(self, width: int, device: torch.device) -> None:
        return None

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        sections = self._sections(payload, value.numel())
        _implementation(value).encode_(self.selection, value, sections, context)
        sections.padding.zero_()

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        sections = self._sections(payload, out.numel())
        _implementation(out).decode_(self.selection, sections, out, context)

    def _ends(self, num_values: int) -> tuple[int, int, int]:
        """Where indexes, scales and values end."""
        num_blocks = ceil_div(num_values, self.block)
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


def _implementation(tensor: torch.Tensor) -> ModuleType:
    """Triton's for a tensor on a GPU, plain torch elsewhere."""
    if tensor.is_cuda:
        from clapping_ds.codecs.kernels import topk_kernel

        return topk_kernel
    return topk_reference
