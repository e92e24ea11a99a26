"""Quantisers of other libraries, where installed, as methods of `benchmarks.codecs.quality`.

torchao's affine primitives with groups of 128 values and bitsandbytes' blockwise ones. `bits` is what a
wire would need: codes packed without gaps (torchao's are not: it spends a byte on each), and scales and
zero points in the dtypes used here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GROUP = 128
SMALLEST_SCALE = 2.0**-100
"""torchao's default is 2^-23, which is larger than most gradients."""


@dataclass(frozen=True)
class Peer:
    """One quantiser: encode gives any object, decode a tensor of as many values."""

    name: str
    family: str
    bits: float
    encode: Callable[[torch.Tensor], Any]
    decode: Callable[[Any, torch.Tensor], torch.Tensor]

    def bits_per_value(self, x: torch.Tensor) -> float:
        return self.bits


def peers() -> list[Peer]:
    """Those whose library is importable; a printed line for the others."""
    found: list[Peer] = []
    for make in (torchao_peers, bitsandbytes_peers):
        try:
            found += make()
        except ImportError as error:
            print(f"left out: {make.__name__.removesuffix('_peers')} ({error})")
    return found


def torchao_peers() -> list[Peer]:
    from torchao.quantization.quant_primitives import MappingType

    symmetric, asymmetric = MappingType.SYMMETRIC, MappingType.ASYMMETRIC
    kinds = [
        (8, symmetric),
        (4, symmetric),
        (4, asymmetric),
        (3, asymmetric),
        (2, symmetric),
        (2, asymmetric),
    ]
    return [_torchao(bits, kind, kind is symmetric) for bits, kind in kinds]


def _torchao(bits: int, kind: Any, symmetric: bool) -> Peer:
    from torchao.quantization import quant_primitives as ao

    if symmetric:
        dtype, lowest, highest = torch.int8, -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    else:
        dtype, lowest, highest = torch.uint8, 0, (1 << bits) - 1
    size = (1, GROUP)

    def encode(x: torch.Tensor) -> Any:
        x_GS = x.view(-1, GROUP)
        scale, zero = ao.choose_qparams_affine(
            x_GS, kind, size, dtype, lowest, highest, SMALLEST_SCALE, torch.bfloat16, torch.int8
        )
        return ao.quantize_affine(x_GS, size, scale, zero, dtype, lowest, highest), scale, zero

    def decode(message: Any, x: torch.Tensor) -> torch.Tensor:
        code, scale, zero = message
        y = ao.dequantize_affine(code, size, scale, zero, dtype, lowest, highest, output_dtype=x.dtype)
        return y.view(x.shape)

    zero_bits = 0 if symmetric else 8
    name = f"torchao int{bits} {'symmetric' if symmetric else 'asymmetric'}"
    return Peer(name, "torchao", bits + (16 + zero_bits) / GROUP, encode, decode)


def bitsandbytes_peers() -> list[Peer]:
    import bitsandbytes.functional as bnb

    def four_bit(kind: str) -> Peer:
        return Peer(
            f"bitsandbytes {kind}",
            "bitsandbytes",
            4 + 32 / GROUP,
            lambda x: bnb.quantize_4bit(x, blocksize=GROUP, quant_type=kind),
            lambda message, x: bnb.dequantize_4bit(*message, blocksize=GROUP, quant_type=kind),
        )

    def eight_bit() -> Peer:
        return Peer(
            "bitsandbytes int8 dynamic",
            "bitsandbytes",
            8 + 32 / GROUP,
            lambda x: bnb.quantize_blockwise(x, blocksize=GROUP),
            lambda message, x: bnb.dequantize_blockwise(*message),
        )

    return [eight_bit(), four_bit("nf4"), four_bit("fp4")]
