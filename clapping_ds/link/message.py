"""What a message is made of, what both ends hold because of it, and what a channel needs of a wire."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch

from clapping_ds.codecs import Codec, Context, State
from clapping_ds.streams import SideStream


class Spec(NamedTuple):
    """What a receiver knows of a tensor before it arrives."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Spec":
        return cls(tensor.shape, tensor.dtype)

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Wire(Protocol):
    """What a channel needs of `wire`."""

    device: torch.device
    side: SideStream

    def working(self, after_compute: bool = False) -> AbstractContextManager[None]: ...

    def new_payload(self, num_bytes: int) -> torch.Tensor: ...

    def send(self, payload: torch.Tensor) -> None: ...

    def expect(self, num_bytes: int) -> None: ...

    def receive(self) -> torch.Tensor: ...

    def done_with(self, payload: torch.Tensor) -> None: ...

    def drain(self) -> None: ...


class Part(NamedTuple):
    """How one tensor of a message is sent."""

    codec: Codec
    context: Context
    nbytes: int


class Message(NamedTuple):
    """What both ends know of a message before it is sent."""

    slot: int
    fresh: bool
    specs: Sequence[Spec]
    parts: Sequence[Part]
    num_bytes: int


class Held(NamedTuple):
    """What both ends hold for one slot and one tensor."""

    spec: Spec
    memory: torch.Tensor | None
    """The reconstruction."""

    @property
    def nbytes(self) -> int:
        return 0 if self.memory is None else self.memory.nbytes


class Learned(NamedTuple):
    """What one codec has learned of one tensor, whatever the slot."""

    codec: Codec
    width: int
    """The tensor's last dimension."""
    state: State | None
