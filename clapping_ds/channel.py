"""One direction of one link: its memories, and what each message is made of.

    fresh slot:    m <- base + K(v - base)       base = 0 or m
    reused slot:   m <- m + D(v - m)

`send` and `receive` run at the two ends. Both derive the plan of a message from state that is equal at
both ends (slot, fresh, the tensors' shapes and dtypes, the memories held), so that no header is needed,
and both update their memory with the same arithmetic, so that the memories stay equal, bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from clapping_ds.codecs import COMPRESSIBLE_DTYPES, Codec, Raw
from clapping_ds.config import ClappingConfig
from clapping_ds.telemetry import Traffic


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
    """What a channel needs of the transport."""

    device: torch.device

    def send(self, payload: torch.Tensor) -> None: ...

    def receive(self, num_bytes: int) -> torch.Tensor: ...


class Part(NamedTuple):
    """How one tensor of a message is sent."""

    codec: Codec
    memory: torch.Tensor | None
    carry: bool
    nbytes: int


class Memory(NamedTuple):
    """The reconstruction that both ends hold for one slot and one tensor."""

    spec: Spec
    tensor: torch.Tensor


RAW = Raw()


class Channel:
    """One end of one direction of one link. Memory: num_slots x tensor size, whatever the data set.

    link         names the two stages in logs and errors, for example "0-1"
    direction    "activations" or "gradients"
    """

    def __init__(self, config: ClappingConfig, link: str, direction: str, wire: Wire) -> None:
        # Configuration
        self.link = link
        self.direction = direction
        self.key = config.key_codec(direction)
        self.delta = config.delta_codec(direction)
        self.carries = config.carries(direction)
        self.holds_memory = config.holds_memory(direction)
        self.min_numel = config.direction(direction).min_numel
        self.memory_config = config.memory
        self.wire = wire
        # State
        self.memories: dict[int, dict[int, Memory]] = {}
        self.traffic = Traffic()
        self.measures_error = False

    def send(self, slot: int, fresh: bool, values: Sequence[torch.Tensor]) -> None:
        """Sends the tensors of one micro-batch. The peer must `receive` with equal specs."""
        specs = [Spec.of(value) for value in values]
        parts = self._plan(slot, fresh, specs)
        payload = torch.empty(_nbytes(parts), dtype=torch.uint8, device=self.wire.device)
        for part, value, section in zip(parts, values, _sections(payload, parts), strict=True):
            contiguous = value.detach().contiguous()
            with _on_device(part.memory, payload.device) as memory:
                part.codec.encode_(contiguous, memory, section, part.carry)
                if self.measures_error and part.codec is not RAW:
                    self.traffic.count_error(contiguous, _reconstruction(part, contiguous, memory, section))
        self.wire.send(payload)
        self.traffic.count(fresh, payload.numel(), specs)

    def receive(self, slot: int, fresh: bool, specs: Sequence[Spec]) -> list[torch.Tensor]:
        """The tensors of the peer's next micro-batch: what it sent, up to the codec's error."""
        parts = self._plan(slot, fresh, specs)
        payload = self.wire.receive(_nbytes(parts))
        values = [torch.empty(spec.shape, dtype=spec.dtype, device=payload.device) for spec in specs]
        for part, value, section in zip(parts, values, _sections(payload, parts), strict=True):
            with _on_device(part.memory, payload.device) as memory:
                part.codec.decode_(section, memory, value, part.carry)
        self.traffic.count(fresh, payload.numel(), specs)
        return values

    def keep_slots(self, num_slots: int) -> None:
        """Frees the memories of the slots from `num_slots` on."""
        for slot in [slot for slot in self.memories if slot >= num_slots]:
            del self.memories[slot]

    @property
    def memory_nbytes(self) -> int:
        """Bytes that error feedback holds at this end."""
        return sum(memory.spec.shape.numel() * memory.tensor.element_size()
                   for held in self.memories.values() for memory in held.values())  # fmt: skip

    def _plan(self, slot: int, fresh: bool, specs: Sequence[Spec]) -> list[Part]:
        """How each tensor is sent. A function of state that is equal at both ends."""
        held = self.memories.setdefault(slot, {})
        for index in [index for index in held if index >= len(specs)]:
            del held[index]
        return [self._plan_tensor(held, index, fresh, spec) for index, spec in enumerate(specs)]

    def _plan_tensor(self, held: dict[int, Memory], index: int, fresh: bool, spec: Spec) -> Part:
        if spec.dtype not in COMPRESSIBLE_DTYPES or spec.shape.numel() < max(1, self.min_numel):
            held.pop(index, None)
            return Part(RAW, None, False, RAW.nbytes(*spec))
        known = index in held and held[index].spec == spec
        if self.holds_memory and not known:
            held[index] = Memory(spec, self._new_memory(spec))
        is_delta = self.delta is not None and not fresh and (known or not self.holds_memory)
        codec = self.delta if self.delta is not None and is_delta else self.key
        memory = held[index].tensor if self.holds_memory else None
        return Part(codec, memory, is_delta or self.carries, codec.nbytes(*spec))

    def _new_memory(self, spec: Spec) -> torch.Tensor:
        device = self.wire.device if self.memory_config.device == "same" else "cpu"
        dtype = self.memory_config.torch_dtype(spec.dtype)
        return torch.zeros(spec.shape, dtype=dtype, device=device)


def _nbytes(parts: Sequence[Part]) -> int:
    return sum(part.nbytes for part in parts)


def _sections(payload: torch.Tensor, parts: Sequence[Part]) -> Sequence[torch.Tensor]:
    """The part of the payload that belongs to each tensor."""
    return payload.split([part.nbytes for part in parts])


@contextmanager
def _on_device(memory: torch.Tensor | None, device: torch.device) -> Iterator[torch.Tensor | None]:
    """The memory where the codec can work on it; copied back where that is not its home."""
    if memory is None or memory.device == device:
        yield memory
    else:
        visiting = memory.to(device)
        yield visiting
        memory.copy_(visiting)


def _reconstruction(
    part: Part, value: torch.Tensor, memory: torch.Tensor | None, section: torch.Tensor
) -> torch.Tensor:
    """What the receiver will compute with."""
    if isinstance(part.codec, Raw):
        return value
    if memory is not None:
        return memory
    out = torch.empty_like(value)
    part.codec.decode_(section, None, out, part.carry)
    return out
