"""A matrix with all its columns on one scale, coded by another codec.

Codecs spread the error of a group, or of a rotated block, evenly over its values. A gradient x^T d has
columns as unlike as the features of x, so small columns get an error far above themselves; Adam, which
divides each value by its own root mean square, then divides them by that error. For x = fp32(v - m) as a
matrix [N, D]:

    s_j  = root mean square of column j, rounded to a power of 2^(1/8)
    D(x) = s_j * codec(x / s_j)        unbiased where the codec is

Wire: the largest s as fp32, one byte per column (how many eighths of an octave below it; 255: the column is
zero), padding to 16 bytes, then the codec's section.
"""

import torch
from pydantic import BaseModel

from clapping_ds.codecs import AnyCodec, Context, Eden, Quantizer, State
from clapping_ds.codecs.base import STRICT, pad_nbytes, width_of

LARGEST_NBYTES = 4
ZERO = 255
STEPS_PER_OCTAVE = 8
FACTORS = torch.exp2(-torch.arange(ZERO + 1, dtype=torch.float64) / STEPS_PER_OCTAVE).float()
FACTORS[ZERO] = 0.0


class Equalized(BaseModel):
    """A `Codec` of matrices."""

    model_config = STRICT

    codec: Quantizer | Eden

    @property
    def name(self) -> str:
        return f"{self.codec.name}, equalized"

    @property
    def carries_by_default(self) -> bool:
        return self.codec.carries_by_default

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """4 + D, padded to 16, and the codec's."""
        return _head_nbytes(shape) + self.codec.nbytes(shape, torch.float32)

    def new_state(self, width: int, device: torch.device) -> State | None:
        return self.codec.new_state(width, device)

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        head, section = _split(payload, value.shape)
        x_ND = value.float().view(-1, width_of(value.shape))
        if context.base is not None:
            x_ND = x_ND - context.base.float().view_as(x_ND)
        _write_scales(x_ND, head)
        scale_D = _read_scales(head, width_of(value.shape))
        scaled_ND = torch.where(scale_D > 0, x_ND / scale_D, x_ND * 0.0)  # what is not finite stays so
        self.codec.encode_(scaled_ND.view(value.shape), section, context._replace(memory=None, carry=False))
        if context.memory is not None:
            self.decode_(payload, torch.empty_like(value, dtype=torch.float32), context)

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        head, section = _split(payload, out.shape)
        seen = torch.empty_like(out, dtype=torch.float32)
        self.codec.decode_(section, seen, context._replace(memory=None, carry=False))
        width = width_of(out.shape)
        seen.view(-1, width).mul_(_read_scales(head, width))
        if context.base is not None:
            seen += context.base.float().view_as(seen)
        if context.memory is not None:
            kept = context.memory.view_as(seen)
            kept.copy_(torch.where(seen.isfinite(), seen, kept))
        out.copy_(seen)


GradientCodec = AnyCodec | Equalized


def equalize(codec: AnyCodec, is_wanted: bool) -> GradientCodec:
    """The codec, with columns on one scale if that is wanted and it is one that can be."""
    return Equalized(codec=codec) if is_wanted and isinstance(codec, Quantizer | Eden) else codec


def _head_nbytes(shape: tuple[int, ...]) -> int:
    return pad_nbytes(LARGEST_NBYTES + width_of(shape))


def _split(payload: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales, and the codec's section."""
    return payload[: _head_nbytes(shape)], payload[_head_nbytes(shape) :]


def _write_scales(x_ND: torch.Tensor, head: torch.Tensor) -> None:
    """Of values that are finite."""
    x_ND = torch.where(x_ND.isfinite(), x_ND, 0.0)
    top = x_ND.abs().amax()
    top = torch.where(top > 0, top, 1.0)
    scale_D = (x_ND / top).square().mean(0).sqrt()  # so that no square overflows
    largest = scale_D.amax()
    below_D = torch.log2(torch.where(scale_D > 0, scale_D / largest, 1.0)) * -STEPS_PER_OCTAVE
    code_D = torch.where(scale_D > 0, below_D.round().clamp(0, ZERO - 1), ZERO)
    head.zero_()
    head[:LARGEST_NBYTES].view(torch.float32).copy_(largest * top)
    head[LARGEST_NBYTES : LARGEST_NBYTES + len(code_D)].copy_(code_D)


def _read_scales(head: torch.Tensor, width: int) -> torch.Tensor:
    """fp32 [D]."""
    code_D = head[LARGEST_NBYTES : LARGEST_NBYTES + width].long()
    return FACTORS.to(head.device)[code_D] * head[:LARGEST_NBYTES].view(torch.float32)
