"""Columns of matrices on one scale, then another codec.

Codecs spread the error of a group, or of a rotated block, evenly over its values. A gradient x^T d has
columns as unlike as the features of x, so small columns get an error far above themselves; Adam, which
divides each value by its own root mean square, then divides them by that error. For a piece of a matrix:

    x    = fp32(v - m)
    s_j  = the root mean square of column j, in eighths of an octave below the largest
    D(x) = s_j * codec(x / s_j)        unbiased where the codec is

Wire: the largest s of each piece as fp32, one byte per column of each piece (how many steps below it; 254 is
2^-31.75; 255: zero, or less than 1e-23 of the largest), padding to 16 bytes, then the codec's section of all
pieces together. A piece of fewer than 32 rows, of whose bits the scales would be a fifth, has one scale.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from clapping_ds.codecs import AnyCodec, Context, Eden, Quantizer, State
from clapping_ds.codecs.base import ceil_div, pad_nbytes

LARGEST_NBYTES = 4
ZERO = 255
STEPS_PER_OCTAVE = 8
MIN_ROWS = 32


class Columns(NamedTuple):
    """Of a piece: consecutive values of a matrix."""

    numel: int
    offset: int
    """Of its first value, in a row."""
    width: int
    """Of a row."""

    @property
    def num_rows(self) -> int:
        return ceil_div(self.offset + self.numel, self.width)


def cut_columns(numel: int, start: int, width: int) -> Columns:
    """Of the values from `start` on of a matrix with rows of `width` values."""
    found = Columns(numel, start % width, width)
    return found if found.num_rows >= MIN_ROWS else Columns(numel, 0, 1)


@dataclass(frozen=True)
class Equalized:
    """A `Codec` of pieces of matrices, one after the other."""

    codec: Quantizer | Eden
    pieces: tuple[Columns, ...]

    @property
    def name(self) -> str:
        return f"{self.codec.name}, equalized"

    @property
    def carries_by_default(self) -> bool:
        return self.codec.carries_by_default

    @property
    def head_nbytes(self) -> int:
        return pad_nbytes(sum(LARGEST_NBYTES + piece.width for piece in self.pieces))

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """4 for each piece and 1 for each of its columns, padded to 16, and the codec's."""
        return self.head_nbytes + self.codec.nbytes(shape, torch.float32)

    def new_state(self, width: int, device: torch.device) -> State | None:
        return self.codec.new_state(width, device)

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        head, section = payload[: self.head_nbytes], payload[self.head_nbytes :]
        x = value.float().view(-1)
        if context.base is not None:
            x = x - context.base.float().view(-1)
        self._write_scales(x, head)
        scale = self._read_scales(head)
        scaled = torch.where(scale > 0, x / scale, x * 0.0)  # what is not finite stays so
        self.codec.encode_(scaled.view(value.shape), section, context._replace(memory=None, carry=False))
        if context.memory is not None:
            self._apply_(section, scale, torch.empty_like(value, dtype=torch.float32), context)

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        head, section = payload[: self.head_nbytes], payload[self.head_nbytes :]
        self._apply_(section, self._read_scales(head), out, context)

    def _apply_(
        self, section: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, context: Context
    ) -> None:
        """scale: fp32, of every value."""
        seen = torch.empty_like(out, dtype=torch.float32)
        self.codec.decode_(section, seen, context._replace(memory=None, carry=False))
        seen.view(-1).mul_(scale)
        if context.base is not None:
            seen += context.base.float().view_as(seen)
        if context.memory is not None:
            kept = context.memory.view_as(seen)
            kept.copy_(torch.where(seen.isfinite(), seen, kept))
        out.copy_(seen)

    # Scales

    def _write_scales(self, x: torch.Tensor, head: torch.Tensor) -> None:
        """Of values that are finite. x: fp32, flat."""
        x = torch.where(x.isfinite(), x, 0.0)
        parts = x.split([piece.numel for piece in self.pieces])
        found = [_measure(part, piece) for part, piece in zip(parts, self.pieces, strict=True)]
        largest = torch.stack([scale_D.amax() for scale_D in found])
        below = torch.cat([scale_D / scale_D.amax() for scale_D in found])  # NaN where all are zeros
        steps = (torch.log2(below) * -STEPS_PER_OCTAVE).round().clamp(0, ZERO - 1)
        head.zero_()
        head[: largest.nbytes].view(torch.float32).copy_(largest)
        head[largest.nbytes : largest.nbytes + len(below)].copy_(torch.where(below > 0, steps, ZERO))

    def _read_scales(self, head: torch.Tensor) -> torch.Tensor:
        """fp32, of every value."""
        num_bytes = LARGEST_NBYTES * len(self.pieces)
        largest = head[:num_bytes].view(torch.float32)
        widths = [piece.width for piece in self.pieces]
        codes = head[num_bytes : num_bytes + sum(widths)].long()
        return torch.cat(
            [
                (factor_D * of_piece).repeat(piece.num_rows)[piece.offset : piece.offset + piece.numel]
                for factor_D, of_piece, piece in zip(
                    _factors(head.device)[codes].split(widths), largest, self.pieces, strict=True
                )
            ]
        )


def _measure(x: torch.Tensor, piece: Columns) -> torch.Tensor:
    """fp32 [D]: the root mean squares of columns; values that the piece has not count as zeros."""
    top = x.abs().amax()
    top = torch.where(top > 0, top, 1.0)  # so that no square overflows
    after = piece.num_rows * piece.width - piece.offset - piece.numel
    x_ND = pad(x / top, (piece.offset, after)).view(piece.num_rows, piece.width)
    return x_ND.square().mean(0).sqrt() * top


@lru_cache
def _factors(device: torch.device) -> torch.Tensor:
    """fp32: by code, of the largest scale. Made on the CPU, so that all devices have the same."""
    factors = torch.exp2(-torch.arange(ZERO + 1, dtype=torch.float64, device="cpu") / STEPS_PER_OCTAVE)
    factors[ZERO] = 0.0
    return factors.float().to(device)


GradientCodec = AnyCodec | Equalized
