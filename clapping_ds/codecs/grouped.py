"""What the codecs with one scale per group share: one function to encode, one to decode.

A family of such codecs (`quant`, `eden`, `float8`) is a pair of small functions, given twice, for Triton
in `kernels` and in plain torch in `reference`:

    encode_groups(y, count, noise, CONSTANTS)   codes, and the scale of each group of `count` values
    decode_level(code, CONSTANTS)               what a code stands for, in units of the scale

For the groups x = fp32(v - base) of a tensor:

    u = x * 2^-e          e: exponent of the group's largest magnitude, so that 1 <= max|u| < 2
    y = u, or H(s * u)    with random signs s and the Hadamard matrix H of the group (unnormalised)
    code, scale = encode_groups(y)
    h = scale * 2^e       (with H: over the size S of the group), stored in bfloat16
    D = decode_level(code) * h, or s * H(decode_level(code) * h)
    m <- base + D

A level has at most 8 significant bits and so has h: their product is exact in fp32, additions have a
fixed order, and so every machine computes the same memory, with or without fused multiply-add. (The
launchers switch that off all the same, so that payloads are equal too.) Differences saturate at
2^112, and a group whose largest is below 2^-100 is sent as zeros.

Wire, for G groups of S values and b bits: the codes, then one bfloat16 per group, then padding to 16
bytes. The tensor is cut into P segments of N = ceil(G / P) groups (P = 1, 2, 8, 4, 8 for b = 8, 4, 3,
2, 1), and word w of b*P bits holds the codes of the w-th values of all segments, the first segment in
the lowest bits; the word of b = 3 is three bytes, stored as three rows of N*S bytes. So every access
to values and to codes is contiguous, and no code has to change threads to be packed.
"""

from types import ModuleType
from typing import ClassVar

import torch
from pydantic import BaseModel

from clapping_ds.codecs.base import STRICT, Context, GroupSize, ceil_div, pad_nbytes
from clapping_ds.codecs.reference import grouped_reference
from clapping_ds.codecs.reference.grouped_reference import Scheme


class GroupedCodec(BaseModel):
    """A codec with one bfloat16 scale per group of `group_size` values."""

    model_config = STRICT
    carries_by_default: ClassVar[bool] = False

    group_size: GroupSize = 128
    """Values that share a scale: a power of two."""

    @property
    def scheme(self) -> Scheme:
        """How groups are coded: what both implementations are told."""
        raise NotImplementedError

    @staticmethod
    def family(on_gpu: bool) -> ModuleType:
        """The module with this family's `encode_groups` and `decode_level`: for Triton, or in plain torch."""
        raise NotImplementedError

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Codes of whole words, 2 bytes per group, padded to 16."""
        codes_nbytes, num_groups = self._sizes(torch.Size(shape).numel())
        return pad_nbytes(codes_nbytes + 2 * num_groups)

    def new_state(self, width: int, device: torch.device) -> None:
        return None

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        codes, scales, padding = self._sections(payload, value.numel())
        on_gpu = value.is_cuda
        _implementation(on_gpu).encode_(self.family(on_gpu), self.scheme, value, codes, scales, context)
        padding.zero_()

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        codes, scales, _ = self._sections(payload, out.numel())
        on_gpu = out.is_cuda
        _implementation(on_gpu).decode_(self.family(on_gpu), self.scheme, codes, scales, out, context)

    def _sizes(self, num_values: int) -> tuple[int, int]:
        """Bytes of codes, and number of groups."""
        scheme = self.scheme
        num_groups = ceil_div(num_values, scheme.group_size)
        num_rows = ceil_div(num_groups, scheme.num_segments)
        return num_rows * scheme.group_size * scheme.bits * scheme.num_segments // 8, num_groups

    def _sections(
        self, payload: torch.Tensor, num_values: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the payload: codes (uint8), scales (bfloat16), padding (uint8)."""
        codes_nbytes, num_groups = self._sizes(num_values)
        end = codes_nbytes + 2 * num_groups
        return payload[:codes_nbytes], payload[codes_nbytes:end].view(torch.bfloat16), payload[end:]


def _implementation(on_gpu: bool) -> ModuleType:
    """In Triton for tensors on a GPU, in plain torch for others."""
    if on_gpu:
        from clapping_ds.codecs.kernels import grouped_kernel

        return grouped_kernel
    return grouped_reference
