"""The codecs `int8`, `int4`, `int3`, `int2` and `sign`: uniform b-bit codes.

A code c in 0 .. 2^b - 1 stands for the level q = 2c - (2^b - 1), an odd multiple of the group's half
step h. So all 2^b codes are used, the levels lie symmetrically about zero, and `sign` is the member of
the family with b = 1. Rounding is to the nearest level, or at random to one of the two nearest, so that
the mean over messages is right (`stochastic`):

    q = clamp(2 * round(y / 2h + offset) + 1, -(2^b - 1), 2^b - 1)     offset = -1/2, or random in [-1, 0)

    h = max|y| / (2^b - 1)      "maximum": int8, int4, and wherever rounding is stochastic
    h = mean|y|                 sign
    h = <y, q0> / <q0, q0>      "least_squares": int3, int2; q0: levels of y at the lesser of
                                START * mean|y| and the maximum's h

h is rounded to bfloat16, upwards where rounding is stochastic, so that no value is clamped. Rounding
of x = fp32(v - m) with "maximum": |x - D(x)| <= h * (1 + 2^-7), stochastic 2h; `grouped` has the rest.
"""

from types import ModuleType
from typing import Literal, Self

from pydantic import model_validator

from clapping_ds.codecs.grouped import GroupedCodec
from clapping_ds.codecs.reference import quant_reference
from clapping_ds.codecs.reference.grouped_reference import Scheme
from clapping_ds.codecs.reference.quant_reference import Constants

START = {3: 0.363, 2: 0.627}
"""Half step over mean magnitude that the least-squares fit starts from: the best for a Gaussian."""


class Quantizer(GroupedCodec):
    """Uniform b-bit codes with one bfloat16 half step per group of `group_size` values."""

    name: Literal["int8", "int4", "int3", "int2", "sign"]
    rotate: bool = False
    """Whether groups are rotated at random first (Hadamard matrix, signs fresh per message), so that
    an outlier is spread over its group. Source: TAH-Quant, arXiv 2506.01352; signs as EDEN's."""
    stochastic: bool = False
    """Whether rounding is random and unbiased."""
    scale: Literal["maximum", "least_squares"] | None = None
    """How the half step is chosen. Default: least squares for int3 and int2, maximum for the others and
    where rounding is stochastic. `sign` always takes the mean."""

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.name == "sign":
            for field in ("rotate", "stochastic", "scale"):
                if getattr(self, field):
                    raise ValueError(f"{field} = {getattr(self, field)!r} with sign; accepted: int8 to int2")
        if self.scale == "least_squares" and (self.stochastic or self.bits not in START):
            raise ValueError(
                "scale = 'least_squares' is for int3 and int2 without stochastic rounding, which must not "
                "clamp; accepted: 'maximum'"
            )
        return self

    @property
    def is_unbiased(self) -> bool:
        """Whether it is right on average over messages."""
        return self.stochastic

    @property
    def bits(self) -> int:
        return 1 if self.name == "sign" else int(self.name.removeprefix("int"))

    @property
    def scheme(self) -> Scheme:
        if self.name == "sign":
            scale = "mean"
        elif self.scale is not None:
            scale = self.scale
        else:
            scale = "least_squares" if self.bits in START and not self.stochastic else "maximum"
        constants = Constants(self.bits, scale, START.get(self.bits, 0.0), self.stochastic)
        return Scheme(self.bits, self.group_size, constants, self.rotate, self.stochastic)

    @staticmethod
    def family(on_gpu: bool) -> ModuleType:
        if on_gpu:
            from clapping_ds.codecs.kernels import quant_kernel

            return quant_kernel
        return quant_reference
