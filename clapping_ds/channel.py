"""One direction of one link: its memories, and what each message is made of.

    fresh slot:    m <- base + K(v - base)       base = 0 or m
    reused slot:   m <- m + D(v - m)

`send` runs at one end, `expect` and `receive` at the other. Both derive the plan of a message from state
that is equal at both ends (slot, fresh, the tensors' shapes and dtypes, the memories held), so that no
header is needed, and both update their memory with the same arithmetic, so that the memories stay equal,
bit for bit.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch

from clapping_ds.codecs import COMPRESSIBLE_DTYPES, Codec, Context, Raw
from clapping_ds.config import ClappingConfig
from clapping_ds.sampling import drawn
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

    def working(self, *values: torch.Tensor) -> AbstractContextManager[None]: ...

    def new_payload(self, num_bytes: int) -> torch.Tensor: ...

    def send(self, payload: torch.Tensor) -> None: ...

    def expect(self, num_bytes: int) -> None: ...

    def receive(self) -> torch.Tensor: ...

    def done_with(self, payload: torch.Tensor) -> None: ...

    def join(self) -> None: ...

    def drain(self) -> None: ...


class Part(NamedTuple):
    """How one tensor of a message is sent."""

    codec: Codec
    context: Context
    nbytes: int


class Message(NamedTuple):
    """What a receiving end knows of a message before it arrives."""

    fresh: bool
    specs: Sequence[Spec]
    parts: Sequence[Part]


class Held(NamedTuple):
    """What both ends hold for one slot and one tensor."""

    spec: Spec
    memory: torch.Tensor | None
    """The reconstruction."""
    key_state: torch.Tensor | None
    delta_state: torch.Tensor | None
    """What the codecs keep besides."""

    @property
    def nbytes(self) -> int:
        tensors = (self.memory, self.key_state, self.delta_state)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


RAW = Raw()


class Channel:
    """One end of one direction of one link. Memory: num_slots x tensor size, whatever the data set.

    link         number of the link's first stage
    direction    "activations" or "gradients"
    replica      number of the pipeline among its data-parallel replicas
    """

    def __init__(
        self, config: ClappingConfig, link: int, direction: str, wire: Wire, replica: int = 0
    ) -> None:
        # Configuration
        self.link = f"{link}-{link + 1}"
        self.direction = direction
        self.seed = drawn(config.seed, replica, link, direction == "gradients")
        self.key = config.key_codec(direction)
        self.delta = config.delta_codec(direction)
        self.carries = config.carries(direction)
        self.holds_memory = config.holds_memory(direction)
        self.min_numel = config.direction(direction).min_numel
        self.memory_config = config.memory
        self.compiles = config.compile
        self.wire = wire
        # State
        self.step = 0
        self.held: dict[int, dict[int, Held]] = {}
        self.traffic = Traffic()
        self.measures_error = False
        self.specs: Sequence[Spec] = ()
        """Of the last message."""
        self._expected: deque[Message] = deque()

    def begin_step(self, step: int, num_slots: int, measures_error: bool = False) -> None:
        """Messages are numbered by step and slot. Frees what is held for the slots from `num_slots` on."""
        self.step = step
        self.measures_error = measures_error
        for slot in [slot for slot in self.held if slot >= num_slots]:
            del self.held[slot]

    def send(self, slot: int, fresh: bool, values: Sequence[torch.Tensor]) -> None:
        """Sends the tensors of one micro-batch. The peer must `receive` with equal specs."""
        self.specs = [Spec.of(value) for value in values]
        parts = self._plan(slot, fresh, self.specs)
        with self.wire.working(*values):
            payload = self.wire.new_payload(_nbytes(parts))
            for part, value, section in zip(parts, values, _sections(payload, parts), strict=True):
                self._encode(part, value.detach().contiguous(), section)
            self.wire.send(payload)
        self.traffic.count(fresh, _nbytes(parts), self.specs)

    def expect(self, slot: int, fresh: bool, specs: Sequence[Spec]) -> None:
        """Announces the peer's next message, so that it can arrive before `receive` asks for it."""
        parts = self._plan(slot, fresh, specs)
        self._expected.append(Message(fresh, specs, parts))
        self.wire.expect(_nbytes(parts))

    def receive(self) -> list[torch.Tensor]:
        """The tensors of the message that was expected first: what the peer sent, up to the codec's
        error."""
        fresh, self.specs, parts = self._expected.popleft()
        device = self.wire.device
        values = [torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in self.specs]
        with self.wire.working():
            payload = self.wire.receive()
            for part, value, section in zip(parts, values, _sections(payload, parts), strict=True):
                with _on_device(part.context, device) as context:
                    part.codec.decode_(section, value, context)
            self.wire.done_with(payload)
        self.wire.join()
        self.traffic.count(fresh, _nbytes(parts), self.specs)
        return values

    def end_step(self) -> None:
        """Waits until everything sent has gone."""
        self.wire.drain()
        self.wire.join()

    @property
    def memory_nbytes(self) -> int:
        """Bytes that error feedback and codecs hold at this end."""
        return sum(held.nbytes for tensors in self.held.values() for held in tensors.values())

    def state_dict(self) -> dict[int, dict[int, dict[str, Any]]]:
        """What is held, by slot and tensor, for `torch.save`."""
        return {
            slot: {index: {**held._asdict(), "spec": tuple(held.spec)} for index, held in tensors.items()}
            for slot, tensors in self.held.items()
        }

    def load_state_dict(self, state: dict[int, dict[int, dict[str, Any]]]) -> None:
        """Takes what `state_dict` of the same end gave, onto the devices where it belongs."""
        self.held = {
            slot: {index: self._loaded(saved) for index, saved in tensors.items()}
            for slot, tensors in state.items()
        }

    def _loaded(self, saved: dict[str, Any]) -> Held:
        held = self._new(Spec(*saved["spec"]))
        for name in ("memory", "key_state", "delta_state"):
            if saved[name] is not None:
                getattr(held, name).copy_(saved[name])
        return held

    def _encode(self, part: Part, value: torch.Tensor, section: torch.Tensor) -> None:
        with _on_device(part.context, value.device) as context:
            part.codec.encode_(value, section, context)
            if self.measures_error and part.codec is not RAW:
                received = _reconstruction(part.codec, value, section, context)
                self.traffic.count_error(value, received)

    def _plan(self, slot: int, fresh: bool, specs: Sequence[Spec]) -> list[Part]:
        """How each tensor is sent. A function of state that is equal at both ends."""
        held = self.held.setdefault(slot, {})
        for index in [index for index in held if index >= len(specs)]:
            del held[index]
        return [self._plan_tensor(slot, index, fresh, spec) for index, spec in enumerate(specs)]

    def _plan_tensor(self, slot: int, index: int, fresh: bool, spec: Spec) -> Part:
        tensors = self.held[slot]
        if not is_compressed(spec, self.min_numel):
            tensors.pop(index, None)
            return Part(RAW, Context(), RAW.nbytes(*spec))
        known = index in tensors and tensors[index].spec == spec
        if not known:
            tensors[index] = self._new(spec)
        held = tensors[index]
        is_delta = self.delta is not None and not fresh and (known or not self.holds_memory)
        codec = self.delta if self.delta is not None and is_delta else self.key
        context = Context(
            memory=held.memory,
            carry=held.memory is not None and (is_delta or self.carries),
            seed=drawn(self.seed, self.step, slot, index),
            state=held.delta_state if is_delta else held.key_state,
            compiles=self.compiles,
        )
        return Part(codec, context, codec.nbytes(*spec))

    def _new(self, spec: Spec) -> Held:
        """What is held of a tensor before its first message: zeros."""
        memory = None
        if self.holds_memory:
            device = self.wire.device if self.memory_config.device == "same" else "cpu"
            dtype = self.memory_config.torch_dtype(spec.dtype)
            memory = torch.zeros(spec.shape, dtype=dtype, device=device)
        delta = self.key if self.delta is None else self.delta
        states = [codec.new_state(spec.shape, self.wire.device) for codec in (self.key, delta)]
        return Held(spec, memory, *states)


def is_compressed(spec: Spec, min_numel: int) -> bool:
    """Whether the codecs of a direction are used for such a tensor. Others travel raw."""
    return spec.dtype in COMPRESSIBLE_DTYPES and spec.shape.numel() >= max(1, min_numel)


def _nbytes(parts: Sequence[Part]) -> int:
    return sum(part.nbytes for part in parts)


def _sections(payload: torch.Tensor, parts: Sequence[Part]) -> Sequence[torch.Tensor]:
    """The part of the payload that belongs to each tensor."""
    return payload.split([part.nbytes for part in parts])


@contextmanager
def _on_device(context: Context, device: torch.device) -> Iterator[Context]:
    """The memory where the codec can work on it; copied back where that is not its home."""
    if context.memory is None or context.memory.device == device:
        yield context
    else:
        visiting = context.memory.to(device)
        yield context._replace(memory=visiting)
        context.memory.copy_(visiting)


def _reconstruction(
    codec: Codec, value: torch.Tensor, section: torch.Tensor, context: Context
) -> torch.Tensor:
    """What the receiver will compute with."""
    if isinstance(codec, Raw):
        return value
    if context.memory is not None:
        return context.memory
    out = torch.empty_like(value)
    codec.decode_(section, out, context)
    return out
