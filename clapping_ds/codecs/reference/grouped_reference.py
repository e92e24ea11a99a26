"""The codecs with one scale per group: `clapping_ds.codecs.grouped` in plain torch."""

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from clapping_ds.codecs.base import Context
from clapping_ds.codecs.reference import rotation_reference as rotation
from clapping_ds.codecs.reference.numerics_reference import to_tiles, untile_

LARGEST = 2.0**112
SMALLEST_EXPONENT = 27
"""Biased, of 2^-100."""
SEGMENTS = {8: 1, 4: 2, 3: 8, 2: 4, 1: 8}
"""By bits: how many codes share a word."""


class Scheme(NamedTuple):
    """How the groups of a tensor are coded.

    A family is a module with two functions:
    encode_groups(y_GS, count_G, noise_GS, constants) -> (uint8 code_GS, fp32 scale_G, exact in bfloat16)
    decode_level(code_GS, constants) -> fp32 level_GS, at most 8 significant bits
    """

    bits: int
    """Of a code."""
    group_size: int
    constants: Any
    """What the family's functions are told: a named tuple."""
    rotates: bool = False
    """Whether groups are rotated at random before they are coded."""
    draws_noise: bool = False
    """Whether rounding is random."""

    @property
    def num_segments(self) -> int:
        """How many codes share a word."""
        return SEGMENTS[self.bits]


def encode_(
    family: ModuleType,
    scheme: Scheme,
    value: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    context: Context,
) -> None:
    """Writes codes and scales of value - base, and updates the memory as the receiver will."""
    num_groups, size = _count_groups(scheme, codes), scheme.group_size
    arithmetic = compile_arithmetic(family, scheme) if context.compiles else Arithmetic(family, scheme)
    key_G, count_G = _draw_keys_and_counts(scheme, num_groups, value, context.seed)
    value_GS = to_tiles(value, num_groups, size)
    memory_GS = None if context.memory is None else to_tiles(context.memory, num_groups, size)
    base_GS = memory_GS if context.carry else None
    code_GS, scale_G = arithmetic.code(value_GS, base_GS, key_G, count_G)
    _pack_(scheme, code_GS, codes)
    scales.view(torch.int16).copy_(scale_G.view(torch.int32)[: scales.numel()] >> 16)
    if context.memory is not None and memory_GS is not None:
        arithmetic.apply_(code_GS, scale_G, key_G, memory_GS, None, value.dtype, context.carry)
        untile_(context.memory, memory_GS)


def decode_(
    family: ModuleType,
    scheme: Scheme,
    codes: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    context: Context,
) -> None:
    """Updates the memory by what codes and scales say; `out` gets the result, NaN where not finite."""
    num_groups, size = _count_groups(scheme, codes), scheme.group_size
    arithmetic = compile_arithmetic(family, scheme) if context.compiles else Arithmetic(family, scheme)
    key_G, _ = _draw_keys_and_counts(scheme, num_groups, out, context.seed)
    scale_G = pad(scales.view(torch.int16).to(torch.int32) << 16, (0, num_groups - scales.numel()))
    memory_GS = None if context.memory is None else to_tiles(context.memory, num_groups, size)
    out_GS = to_tiles(out, num_groups, size)
    code_GS = _unpack(scheme, codes)
    arithmetic.apply_(
        code_GS, scale_G.view(torch.float32), key_G, memory_GS, out_GS, out.dtype, context.carry
    )
    if context.memory is not None and memory_GS is not None:
        untile_(context.memory, memory_GS)
    untile_(out, out_GS)


class Arithmetic:
    """What is done with the groups of a tensor: pure arithmetic, so that it can also be compiled."""

    def __init__(self, family: ModuleType, scheme: Scheme) -> None:
        self.encode_groups = family.encode_groups
        self.decode_level = family.decode_level
        self.constants = scheme.constants
        self.rotates = scheme.rotates
        self.draws_noise = scheme.draws_noise

    def code(
        self,
        value_GS: torch.Tensor,
        base_GS: torch.Tensor | None,
        key_G: torch.Tensor,
        count_G: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 code_GS and fp32 scale_G, exact in bfloat16, of value - base; NaN where not finite."""
        size = value_GS.shape[1]
        x_GS = value_GS.float() if base_GS is None else value_GS.float() - base_GS.float()
        largest_G = x_GS.abs().amax(1)
        finite_G = largest_G < torch.inf
        x_GS = x_GS.where(finite_G[:, None], 0.0).clamp(-LARGEST, LARGEST)
        exponent_G = largest_G.clamp(max=LARGEST).view(torch.int32) >> 23
        is_coded_G = finite_G & (exponent_G >= SMALLEST_EXPONENT)
        down_G = torch.where(is_coded_G, (254 - exponent_G) << 23, 0).view(torch.float32)
        up_G = torch.where(is_coded_G, exponent_G << 23, 0).view(torch.float32)
        y_GS = x_GS * down_G[:, None]
        if self.rotates:
            y_GS = rotation.apply_hadamard(rotation.flip_signs(y_GS, key_G))
            count_G = torch.full_like(count_G, size)
            up_G = up_G * (1.0 / size)
        noise_GS = rotation.draw_noise(key_G, size) if self.draws_noise else y_GS
        code_GS, scale_G = self.encode_groups(y_GS, count_G, noise_GS, self.constants)
        return code_GS, (scale_G * up_G).where(finite_G, torch.nan)

    def apply_(
        self,
        code_GS: torch.Tensor,
        scale_G: torch.Tensor,
        key_G: torch.Tensor,
        memory_GS: torch.Tensor | None,
        out_GS: torch.Tensor | None,
        dtype: torch.dtype,
        carry: bool,
    ) -> None:
        """Updates the memory by what codes and scales say and hands it out; `dtype` is the message's."""
        finite_G1 = scale_G.isfinite()[:, None]
        sent_GS = self.decode_level(code_GS, self.constants) * scale_G[:, None]
        if self.rotates:
            sent_GS = rotation.flip_signs(rotation.apply_hadamard(sent_GS), key_G)
        kept_dtype = dtype if memory_GS is None else memory_GS.dtype
        bound = min(torch.finfo(dtype).max, torch.finfo(kept_dtype).max)
        if memory_GS is not None and carry:
            sent_GS = memory_GS.float() + sent_GS
        kept_GS = sent_GS.clamp(-bound, bound).to(kept_dtype)
        if out_GS is not None:
            out_GS.copy_(kept_GS.where(finite_G1, torch.nan))
        if memory_GS is not None:
            memory_GS.copy_(kept_GS.where(finite_G1, memory_GS))


@cache
def compile_arithmetic(family: ModuleType, scheme: Scheme) -> Arithmetic:
    """The same through torch's C++ compiler; where there is none, as they are, with a warning."""
    from clapping_ds.codecs.reference.compiled import Compiled  # with torch's compiler: a second

    arithmetic = Arithmetic(family, scheme)
    arithmetic.code = Compiled(arithmetic.code)  # type: ignore[method-assign, assignment]
    arithmetic.apply_ = Compiled(arithmetic.apply_)  # type: ignore[method-assign, assignment]
    return arithmetic


def _count_groups(scheme: Scheme, codes: torch.Tensor) -> int:
    """Groups with room in the codes: a multiple of the number of segments."""
    return codes.numel() * 8 // (scheme.bits * scheme.group_size)


def _draw_keys_and_counts(
    scheme: Scheme, num_groups: int, value: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of the groups, and how many values (at least 1) each has."""
    group_G = torch.arange(num_groups, device=value.device)
    count_G = (value.numel() - group_G * scheme.group_size).clamp(1, scheme.group_size).float()
    is_random = scheme.rotates or scheme.draws_noise
    return rotation.make_group_keys(group_G, seed) if is_random else group_G, count_G


def _list_places(scheme: Scheme) -> list[tuple[int, int, int]]:
    """(segment, row, shift): bits of a segment's code that are in a byte row, shifted left so far."""
    found = []
    for segment in range(scheme.num_segments):
        for row in range(scheme.bits * scheme.num_segments // 8):
            shift = segment * scheme.bits - 8 * row
            if -scheme.bits < shift < 8:
                found.append((segment, row, shift))
    return found


def _pack_(scheme: Scheme, code_GS: torch.Tensor, codes: torch.Tensor) -> None:
    """Writes uint8 codes in the byte layout that `clapping_ds.codecs.grouped` states."""
    code_PW = code_GS.view(scheme.num_segments, -1)
    byte_RW = codes.view(-1, code_PW.shape[1])
    written = set()
    for segment, row, shift in _list_places(scheme):
        code_W = _shift(code_PW[segment], shift)
        if row in written:
            byte_RW[row].bitwise_or_(code_W)
        else:
            byte_RW[row].copy_(code_W)
            written.add(row)


def _unpack(scheme: Scheme, codes: torch.Tensor) -> torch.Tensor:
    """uint8 [G, S], the inverse of `_pack_`."""
    byte_RW = codes.view(scheme.bits * scheme.num_segments // 8, -1)
    code_PW = torch.empty(scheme.num_segments, byte_RW.shape[1], dtype=torch.uint8, device=codes.device)
    written = set()
    for segment, row, shift in _list_places(scheme):
        code_W = _shift(byte_RW[row], -shift)
        if segment in written:
            code_PW[segment].bitwise_or_(code_W)
        else:
            code_PW[segment].copy_(code_W)
            written.add(segment)
    if scheme.bits < 8:
        code_PW.bitwise_and_((1 << scheme.bits) - 1)
    return code_PW.view(-1, scheme.group_size)


def _shift(byte_W: torch.Tensor, left: int) -> torch.Tensor:
    """uint8, shifted left, or right where negative; bits that leave the byte are lost."""
    return byte_W << left if left > 0 else byte_W >> -left if left < 0 else byte_W
