"""The codecs `fp8_e4m3` and `fp8_e5m2`: 8-bit floats (OCP 8-bit floating point specification, 2023).

The largest magnitude of a group is scaled to the largest finite float, 448 or 57344; rounding is to the
nearest, ties to even. Codes are the bits of torch.float8_e4m3fn and torch.float8_e5m2. The conversion
is made of integer arithmetic, so that it is the same on GPUs without 8-bit floats.
"""

from types import ModuleType
from typing import Literal

from clapping_ds.codecs.grouped import GroupedCodec
from clapping_ds.codecs.reference import float8_reference
from clapping_ds.codecs.reference.float8_reference import Constants
from clapping_ds.codecs.reference.grouped_reference import Scheme


class Float8(GroupedCodec):
    """8-bit floats with one bfloat16 scale per group of `group_size` values."""

    name: Literal["fp8_e4m3", "fp8_e5m2"]

    @property
    def scheme(self) -> Scheme:
        constants = Constants(3, 7, 448.0) if self.name == "fp8_e4m3" else Constants(2, 15, 57344.0)
        return Scheme(8, self.group_size, constants)

    @staticmethod
    def family(on_gpu: bool) -> ModuleType:
        if on_gpu:
            from clapping_ds.codecs.kernels import float8_kernel

            return float8_kernel
        return float8_reference
