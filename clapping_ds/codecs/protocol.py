"""What a codec is: pure arithmetic on one tensor, its memory and its section of a payload."""

from typing import ClassVar, Protocol

import torch
from pydantic import ConfigDict

COMPRESSIBLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SECTION_ALIGNMENT_BYTES = 16

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def padded(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole sections, so that each section starts 16-byte aligned."""
    return -(-num_bytes // SECTION_ALIGNMENT_BYTES) * SECTION_ALIGNMENT_BYTES


def power_of_two(number: int) -> int:
    """A pydantic check: `number`, or ValueError."""
    if number & (number - 1):
        raise ValueError("a power of two")
    return number


class Codec(Protocol):
    """Turns (value, memory) into a section of a payload and back.

    Both methods leave the same bits in `memory`, and `decode_` leaves in `out` what the receiving
    stage computes with: the memory, or without one the decompressed value.

    value, out   contiguous tensor of any shape; fp32, fp16 or bf16 (`none`: any dtype)
    memory       contiguous tensor of as many elements; fp32, fp16 or bf16; None: nothing is kept
    payload      contiguous uint8 tensor of `nbytes(shape, dtype)`, 16-byte aligned; every byte of it
                 is written by `encode_`
    carry        True: what crosses the wire is the difference to `memory`; False: the value itself

    A codec compresses groups of consecutive values. A group in which any difference is not finite
    arrives as NaN throughout and leaves its part of the memory as it was (`none`: per value).
    """

    @property
    def name(self) -> str: ...

    carries_by_default: ClassVar[bool]

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int: ...

    def encode_(
        self, value: torch.Tensor, memory: torch.Tensor | None, payload: torch.Tensor, carry: bool
    ) -> None: ...

    def decode_(
        self, payload: torch.Tensor, memory: torch.Tensor | None, out: torch.Tensor, carry: bool
    ) -> None: ...


def bits_per_value(codec: Codec, dtype: torch.dtype) -> float:
    """Bits on the wire per value of a large tensor, scales and indexes included."""
    num_values = 1 << 24
    return codec.nbytes((num_values,), dtype) * 8 / num_values
