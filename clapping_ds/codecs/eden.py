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

Less than a bit, without a bias: with `one_in` = k groups are taken in runs of k, one group of each run is
sent, the same of all runs and another for every message, and counts k times; the others are zeros. A run of
which a value is not finite arrives as NaN throughout.
"""

from types import ModuleType
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator

from clapping_ds.codecs.base import Context, ceil_div, limit
from clapping_ds.codecs.grouped import GroupedCodec
from clapping_ds.codecs.reference import eden_reference
from clapping_ds.codecs.reference.eden_reference import Constants
from clapping_ds.codecs.reference.grouped_reference import Scheme
from clapping_ds.codecs.reference.numerics_reference import deliver_, keep_, subtract_base, update

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


PLACE_FACTOR = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: bits 32 to 63 of a seed times this are as good as random."""


class Eden(GroupedCodec):
    """Random rotation and b-bit Lloyd-Max codes, one bfloat16 scale per group of `group_size` values."""

    name: Literal["eden1", "eden2", "eden3", "eden4"]
    scale: Literal["least_squares", "unbiased"] = "least_squares"
    """Least squares: the smallest error, for error feedback. Unbiased: right on average over messages."""

    one_in: Annotated[int, Field(ge=1, le=16)] = 1
    """Of so many groups one is sent and counts as many times: less than a bit per value. "unbiased" only."""

    @model_validator(mode="after")
    def _check_bias(self) -> Self:
        if self.one_in > 1 and self.scale != "unbiased":
            raise ValueError(f'one_in {self.one_in} needs "scale": "unbiased"')
        return self

    @property
    def bits(self) -> int:
        return int(self.name.removeprefix("eden"))

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Of the groups that are sent: codes of whole words, 2 bytes per group, padded to 16."""
        if self.one_in == 1:
            return super().nbytes(shape, dtype)
        return super().nbytes((self._count_runs(torch.Size(shape).numel()) * self.group_size,), dtype)

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        if self.one_in == 1:
            return super().encode_(value, payload, context)
        num_runs, place = self._count_runs(value.numel()), self._draw_place(context)
        x_RN, base_RN, finite_R = subtract_base(value, context.base, num_runs, self.one_in * self.group_size)
        drawn_RS = x_RN.view(num_runs, self.one_in, self.group_size)[:, place]
        marked_RS = drawn_RS.where(finite_R[:, None], torch.nan)
        super().encode_(marked_RS, payload, _without_memory(context))
        if context.memory is not None:
            sent_RN, _ = self._read(payload, num_runs, context)
            keep_(context.memory, update(base_RN, sent_RN, limit(value, context.memory)), finite_R)

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        if self.one_in == 1:
            return super().decode_(payload, out, context)
        deliver_(out, *self._read(payload, self._count_runs(out.numel()), context), context)

    def _read(
        self, payload: torch.Tensor, num_runs: int, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 [R, k * S]: what a message says of runs, zeros where nothing; bool [R]: which are finite."""
        drawn_RS = torch.empty(num_runs, self.group_size, dtype=torch.float32, device=payload.device)
        super().decode_(payload, drawn_RS, _without_memory(context))
        sent_RKS = drawn_RS.new_zeros(num_runs, self.one_in, self.group_size)
        sent_RKS[:, self._draw_place(context)] = drawn_RS * self.one_in
        return sent_RKS.view(num_runs, -1), drawn_RS[:, 0].isfinite()

    def _count_runs(self, num_values: int) -> int:
        return ceil_div(num_values, self.one_in * self.group_size)

    def _draw_place(self, context: Context) -> int:
        """Of the group of each run that is sent."""
        return (context.seed * PLACE_FACTOR >> 32) % 2**32 % self.one_in

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


def _without_memory(context: Context) -> Context:
    return Context(seed=context.seed, compiles=context.compiles)
