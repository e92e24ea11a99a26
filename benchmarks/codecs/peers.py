"""Quantisers of other libraries, where installed, and of a paper, as methods of the benchmarks.

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
            lambda message, x: bnb.dequantize_4bit(message[0], message[1], blocksize=GROUP, quant_type=kind),
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


def tah_quant() -> Peer:
    """TAH-Quant (arXiv 2506.01352v1), as its authors' published code has it, with their settings.

    Tiles of 64 values. 4 bits for the four fifths of a sample's tokens whose magnitudes have the largest
    entropy, 3 for the others. Tiles whose largest value is at least twice the second get it swapped to the
    front, and are Hadamard-transformed. A minimum and a scale in fp16 per tile.
    bits: with a pivot's index for every tile, for which its buffers have room.
    """
    bits = 0.8 * 4 + 0.2 * 3 + (2 * 16 + 1 + 6) / TILE
    return Peer("TAH-Quant", "TAH-Quant", bits, _tah_quant, lambda message, x: message)


TILE = 64
LARGE_BITS, SMALL_BITS, SMALL_SHARE = 4, 3, 0.2


def _tah_quant(x: torch.Tensor) -> torch.Tensor:
    """What arrives of fp32 x [samples, tokens, channels]."""
    share_BTC = x.abs() / (x.abs().sum(-1, keepdim=True) + 1e-30)
    entropy_BT = -(share_BTC * (share_BTC + 1e-30).log()).sum(-1)
    num_small = int(x.shape[1] * SMALL_SHARE)
    highest_BT = torch.full_like(entropy_BT, 2**LARGE_BITS - 1)
    highest_BT.scatter_(1, entropy_BT.argsort(1)[:, :num_small], 2**SMALL_BITS - 1)

    x_NK = x.reshape(-1, TILE)
    largest_N2 = x_NK.abs().topk(2, 1).values
    swaps_N1 = (largest_N2[:, :1] >= 2 * largest_N2[:, 1:]).expand(-1, TILE)
    pivot_N = x_NK.abs().argmax(1)
    tile_NK = torch.where(swaps_N1, _swap(x_NK, pivot_N) @ _hadamard(), x_NK)
    lowest_N1 = tile_NK.amin(1, keepdim=True)
    highest_N1 = highest_BT[..., None].expand(-1, -1, x.shape[2] // TILE).reshape(-1, 1)
    scale_N1 = ((tile_NK.amax(1, keepdim=True) - lowest_N1) / highest_N1).clamp(min=1e-30)
    code_NK = torch.minimum(((tile_NK - lowest_N1) / scale_N1).round().clamp(min=0), highest_N1)
    out_NK = code_NK * scale_N1.half().float() + lowest_N1.half().float()
    out_NK = torch.where(swaps_N1, _swap(out_NK @ _hadamard(), pivot_N), out_NK)
    return out_NK.view(x.shape)


def _swap(x_NK: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    """The first of a tile's values and another one, exchanged."""
    rows, swapped_NK = torch.arange(len(x_NK)), x_NK.clone()
    swapped_NK[rows, index_N] = x_NK[:, 0]
    swapped_NK[:, 0] = x_NK[rows, index_N]
    return swapped_NK


def _hadamard() -> torch.Tensor:
    """[TILE, TILE], orthonormal and symmetric."""
    matrix = torch.ones(1, 1)
    while len(matrix) < TILE:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / TILE**0.5
