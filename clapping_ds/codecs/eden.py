"""The codecs `eden1` to `eden4`: random rotation, then the Lloyd-Max code of a Gaussian.

A group rotated at random looks like Gaussian noise whatever it was, so one fixed code that is best for
a Gaussian is good for every group. Source: EDEN (Vargaftik et al., ICML 2022, arXiv 2108.08842); the
codes are those of Max (1960), table I, levels rounded to 8 significant bits.

    y = H(s * u)                                    as in `grouped`; s: random signs
    k = number of thresholds below |y| / rms(y)     code: k, plus 2^(b-1) where y is negative
    q = sign(y) * LEVELS[b][k]
    scale = <y, q> / <q, q>      "least_squares": the smallest error of this message
          = <y, y> / <y, q>      "unbiased": the mean over signs is the value itself (EDEN, theorem 2.1)

The signs are new in every message. With fixed signs the same error is made again and again where
values change slowly, and training moves the weights along it: low error is not enough.
"""

from types import ModuleType
from typing import Literal

from clapping_ds.codecs.grouped import GroupedCodec
from clapping_ds.codecs.reference import eden_reference
from clapping_ds.codecs.reference.eden_reference import Constants
from clapping_ds.codecs.reference.grouped_reference import Scheme

LEVELS = {
    1: (0.796875,),
    2: (0.453125, 1.5078125),
    3: (0.2451171875, 0.7578125, 1.34375, 2.15625),
    4: (0.1279296875, 0.388671875, 0.65625, 0.94140625, 1.2578125, 1.6171875, 2.0625, 2.734375),
}
THRESHOLDS = {
    1: (),
    2: (0.9816,),
    3: (0.5005, 1.05, 1.7479),
    4: (0.2582, 0.5224, 0.7995, 1.0993, 1.4371, 1.8435, 2.4008),
}


class Eden(GroupedCodec):
    """Random rotation and b-bit Lloyd-Max codes, one bfloat16 scale per group of `group_size` values."""

    name: Literal["eden1", "eden2", "eden3", "eden4"]
    scale: Literal["least_squares", "unbiased"] = "least_squares"
    """Least squares: the smallest error, for error feedback. Unbiased: right on average over messages."""

    @property
    def is_unbiased(self) -> bool:
        """Whether it is right on average over messages."""
        return self.scale == "unbiased"

    @property
    def bits(self) -> int:
        return int(self.name.removeprefix("eden"))

    @property
    def scheme(self) -> Scheme:
        constants = Constants.of(LEVELS[self.bits], THRESHOLDS[self.bits], self.scale == "unbiased")
        return Scheme(self.bits, self.group_size, constants, rotates=True)

    @staticmethod
    def family(on_gpu: bool) -> ModuleType:
        if on_gpu:
            from clapping_ds.codecs.kernels import eden_kernel

            return eden_kernel
        return eden_reference
