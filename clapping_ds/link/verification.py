"""With `verify`, what goes before each payload: who it is from, and checksums of what both ends hold.

A header is six int64: a magic number, step, slot, a number for the codecs of the message, the checksum of
the memories before the message, the checksum of the payload.
"""

from collections.abc import Iterable, Sequence
from ctypes import c_ubyte
from typing import NamedTuple
from zlib import crc32

import torch

from clapping_ds.codecs import Context
from clapping_ds.codecs.base import pad_nbytes

MAGIC = 0x636C617070696E67  # "clapping"
NBYTES = pad_nbytes(6 * 8)


class VerificationError(RuntimeError):
    """The two ends of a channel are out of step, or bytes changed on their way."""


class Header(NamedTuple):
    """What both ends know alike of a message, and what only the payload tells."""

    magic: int
    step: int
    slot: int
    codecs: int
    memory: int
    payload: int = 0

    @classmethod
    def of(cls, step: int, slot: int, codecs: Sequence[object], contexts: Iterable[Context]) -> "Header":
        """contexts: before the message changes memories and states."""
        held = [checksum(tensor) for context in contexts for tensor in _list_held(context)]
        return cls(MAGIC, step, slot, crc32(repr(codecs).encode()), hash(tuple(held)))

    def with_payload(self, payload: torch.Tensor) -> "Header":
        """payload: uint8, without its header."""
        return self._replace(payload=checksum(payload))

    @classmethod
    def read(cls, section: torch.Tensor) -> "Header":
        return cls(*section.view(torch.int64).tolist())

    def write_(self, section: torch.Tensor) -> None:
        section.copy_(torch.tensor(self, dtype=torch.int64, device="cpu").view(torch.uint8))

    def check(self, found: "Header") -> None:
        """Raises VerificationError naming each field that is not as expected."""
        wrong = [
            f"{name}: expected {mine}, found {other}"
            for name, mine, other in zip(self._fields, self, found, strict=True)
            if mine != other
        ]
        if wrong:
            raise VerificationError("; ".join(wrong))


def _list_held(context: Context) -> list[torch.Tensor]:
    """All that the two ends must hold alike."""
    memories = [] if context.memory is None else [context.memory]
    if context.state is None:
        return memories
    counts = torch.tensor(context.state.list_counts(), dtype=torch.int64, device="cpu")
    return [*memories, *context.state.list_shared(), counts]


def checksum(tensor: torch.Tensor) -> int:
    """Of the bytes of a contiguous tensor: their CRC-32; on a GPU words, each times an odd number of its own,
    modulo 2^64. Either way a change of any one word changes it."""
    flat = tensor.view(-1).view(torch.uint8)
    if flat.device.type == "cpu":
        return crc32((c_ubyte * flat.numel()).from_address(flat.data_ptr())) if flat.numel() else 0
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 4)).view(torch.int32).long()
    odd = 2 * torch.arange(words.numel(), device=words.device) + 1
    return int((words * odd).sum())
