"""The codecs with one scale per group: `clapping_ds.codecs.grouped` in plain torch."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from clapping_ds.codecs.memory import limit
from clapping_ds.codecs.protocol import Context
from clapping_ds.codecs.reference import random_bits
from clapping_ds.codecs.reference.steps import deliver_, differences, grouped, keep_, stepped

if TYPE_CHECKING:
    from clapping_ds.codecs.grouped import GroupedCodec

LARGEST = 2.0**112
SMALLEST_EXPONENT = 27  # biased: 2^-100
NAN_BFLOAT16_BITS = 0x7FC0

Constants = tuple[Any, ...]


class Functions(NamedTuple):
    """encoded(y_GS, count_G, noise_GS, constants) -> (int32 code_GS, fp32 scale_G, exact in bfloat16);
    level(code_GS, constants) -> fp32 level_GS, at most 8 significant bits."""

    encoded: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    level: Callable[[torch.Tensor, Constants], torch.Tensor]


def encode_(
    codec: "GroupedCodec", value: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, context: Context
) -> None:
    """Writes codes and scales of value - base, and steps the memory as the receiver will."""
    num_groups, size = _num_groups(codec, codes), codec.group_size
    base = context.memory if context.carry else None
    x_GS, base_GS, finite_G = differences(value, base, num_groups, size)
    y_GS, up_G = _normalised(x_GS.clamp(-LARGEST, LARGEST))
    group_G = torch.arange(num_groups, device=value.device)
    key_G = random_bits.group_keys(group_G, context.seed)
    count_G = (value.numel() - group_G * size).clamp(1, size).float()
    if codec.rotates:
        y_GS = random_bits.hadamard(random_bits.with_signs(y_GS, key_G))
        count_G = torch.full_like(count_G, size)
        up_G = up_G * (1.0 / size)
    noise_GS = random_bits.noise(key_G, size) if codec.draws_noise else y_GS
    family = codec.family
    code_GS, scale_G = family.plain.encoded(y_GS, count_G, noise_GS, family.constants)
    scale_G = scale_G * up_G

    codes.copy_(_packed(codec, code_GS))
    scales.copy_(scale_G[: scales.numel()])
    scales.view(torch.int16).masked_fill_(~finite_G[: scales.numel()], NAN_BFLOAT16_BITS)
    if context.memory is not None:
        sent_GS = _sent(codec, code_GS, scale_G, key_G)
        keep_(context.memory, stepped(base_GS, sent_GS, limit(value, context.memory)), finite_G)


def decode_(
    codec: "GroupedCodec", codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, context: Context
) -> None:
    """Steps the memory by what codes and scales say; `out` gets the result, NaN where not finite."""
    num_groups, size = _num_groups(codec, codes), codec.group_size
    scale_G = grouped(scales, num_groups, 1)[:, 0]
    key_G = random_bits.group_keys(torch.arange(num_groups, device=out.device), context.seed)
    sent_GS = _sent(codec, _unpacked(codec, codes), scale_G, key_G)
    base_GS = torch.zeros_like(sent_GS)
    if context.memory is not None and context.carry:
        base_GS = grouped(context.memory, num_groups, size)
    memory_GS = stepped(base_GS, sent_GS, limit(out, context.memory))
    deliver_(context.memory, out, memory_GS, scale_G.isfinite())


def _num_groups(codec: "GroupedCodec", codes: torch.Tensor) -> int:
    """Groups with room in the codes: a multiple of the number of segments."""
    return codes.numel() * 8 // (codec.bits * codec.group_size)


def _normalised(x_GS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x_GS * 2^-e with e the exponent of the group's largest magnitude, and 2^e; zeros for tiny groups."""
    exponent_G = x_GS.abs().amax(1).view(torch.int32) >> 23
    is_tiny_G = exponent_G < SMALLEST_EXPONENT
    down_G = ((254 - exponent_G) << 23).masked_fill(is_tiny_G, 0).view(torch.float32)
    up_G = (exponent_G << 23).masked_fill(is_tiny_G, 0).view(torch.float32)
    return x_GS * down_G[:, None], up_G


def _sent(
    codec: "GroupedCodec", code_GS: torch.Tensor, scale_G: torch.Tensor, key_G: torch.Tensor
) -> torch.Tensor:
    """fp32 [G, S]: what the codes stand for."""
    sent_GS = codec.family.plain.level(code_GS, codec.family.constants) * scale_G[:, None]
    if codec.rotates:
        sent_GS = random_bits.with_signs(random_bits.hadamard(sent_GS), key_G)
    return sent_GS


def _packed(codec: "GroupedCodec", code_GS: torch.Tensor) -> torch.Tensor:
    """uint8 of the codes, in the byte layout that `clapping_ds.codecs.grouped` states."""
    code_PW = code_GS.view(codec.num_segments, -1)
    word_W = code_PW[0]
    for segment in range(1, codec.num_segments):
        word_W = word_W | (code_PW[segment] << (segment * codec.bits))
    rows = [(word_W >> (8 * row)) & 0xFF for row in range(codec.bits * codec.num_segments // 8)]
    return torch.stack(rows).to(torch.uint8).view(-1)


def _unpacked(codec: "GroupedCodec", codes: torch.Tensor) -> torch.Tensor:
    """int32 [G, S], the inverse of `_packed`."""
    byte_RW = codes.view(codec.bits * codec.num_segments // 8, -1).to(torch.int32)
    word_W = byte_RW[0]
    for row in range(1, byte_RW.shape[0]):
        word_W = word_W | (byte_RW[row] << (8 * row))
    mask = (1 << codec.bits) - 1
    segments = [(word_W >> (segment * codec.bits)) & mask for segment in range(codec.num_segments)]
    return torch.stack(segments).view(-1, codec.group_size)
