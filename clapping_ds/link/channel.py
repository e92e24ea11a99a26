"""One direction of one link: its memories, and what each message is made of.

    fresh slot:    m <- base + K(v - base)       base = 0 or m
    reused slot:   m <- m + D(v - m)

`send` runs at one end, `expect` and `receive` at the other. Both derive what a message is made of from state
that is equal at both ends (slot, fresh, the tensors' shapes and dtypes, the memories held), so that no
header is needed, and both update their memory with the same arithmetic, so that the memories stay equal,
bit for bit.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from clapping_ds.codecs import COMPRESSIBLE_DTYPES, AnyCodec, Context, Raw, State, Transform
from clapping_ds.codecs.base import width_of
from clapping_ds.config import Plan
from clapping_ds.link import verification
from clapping_ds.link.disk import DiskError
from clapping_ds.link.memories import Memories
from clapping_ds.link.message import Held, Learned, Message, Part, Spec, Wire
from clapping_ds.link.seeds import draw_word
from clapping_ds.link.traffic import Traffic
from clapping_ds.link.verification import Header, VerificationError

RAW = Raw()
NUM_READ_AHEAD = 3
"""Messages whose memories are read from disk before their turn."""


class Arrivals(NamedTuple):
    """Where a message goes to."""

    values: list[torch.Tensor]
    freed: Any
    """Event: they may be written. None on the CPU."""


class Channel:
    """One end of one direction of one link. Memory: pool x num_slots x tensor size, whatever the data set.

    plan        how the direction is compressed
    link        number of the link's first stage
    direction   "activations" or "gradients"
    seed        of what codecs draw at random; the same at both ends
    verifies    whether messages carry a header with checksums
    compiles    whether CPU ranks run the codecs through torch's C++ compiler
    """

    def __init__(
        self,
        plan: Plan,
        link: int,
        direction: str,
        wire: Wire,
        seed: int = 0,
        verifies: bool = False,
        compiles: bool = False,
    ) -> None:
        # Configuration
        self.plan = plan
        self.link = f"{link}-{link + 1}"
        self.direction = direction
        self.wire = wire
        self.seed = seed
        self.verifies = verifies
        self.compiles = compiles
        self.header_nbytes = verification.NBYTES if verifies else 0
        # State
        self.step = 0
        self.first_step: int | None = None
        """That the start is counted from; None: the next."""
        self.held: dict[int, dict[int, Held]] = {}
        """By slot and tensor, of the step's entry."""
        self.pool = {0: self.held}
        """By entry."""
        self.scale = 1.0
        """Of the values that are sent, against those of the start."""
        self.scales: dict[int, float] = {}
        """By entry, of what is held; it follows `scale` when the entry is used."""
        self._used: set[int] = set()
        """Slots of the step whose message was sent or received."""
        self.learned: dict[tuple[int, str], Learned] = {}
        """By tensor, and whether messages are keys or deltas."""
        self._in_use: frozenset[tuple[int, str]] = frozenset()
        """Those of which what is learned was in use when the step began."""
        self.traffic = Traffic()
        self.measures_error = False
        self.specs: Sequence[Spec] = ()
        """Of the last message."""
        self._expected: deque[Message] = deque()
        self.memories = Memories(wire.device, plan.memory)
        self._next: Arrivals | None = None
        """Where the message that was expected first goes to."""

    def begin_step(self, step: int, num_slots: int, measures_error: bool = False, entry: int = 0) -> None:
        """Messages are numbered by step and slot. entry: of the pool, that the slots are of; frees what it
        holds for the slots from `num_slots` on."""
        self.step = step
        self.first_step = step if self.first_step is None else self.first_step
        self._in_use = frozenset(self._list_in_use())
        self.measures_error = measures_error
        self.held = self.pool.setdefault(entry, {})
        self._used.clear()
        self.memories.end()
        self._follow_scale(entry)
        for slot in [slot for slot in self.held if slot >= num_slots]:
            tensors = self.held.pop(slot)
            self._drop(tensors, *list(tensors))
        for slot in range(NUM_READ_AHEAD):
            self._read(slot)

    def send(self, slot: int, fresh: bool, values: Sequence[torch.Tensor]) -> None:
        """Sends the tensors of one micro-batch. The peer must `receive` with equal specs."""
        with self.at(slot), self.wire.working(after_compute=True):
            message = self._message(slot, fresh, [Spec.of(value) for value in values])
            payload = self.wire.new_payload(message.num_bytes)
            header, *sections = self._sections(payload, message)
            expected = self._header(message)
            for part, value, section in zip(message.parts, values, sections, strict=True):
                self._encode(part, value.detach().contiguous(), section)
            if expected is not None:
                expected.with_payload(payload[len(header) :]).write_(header)
            self.wire.send(payload)
            self._put_back(message)
            self._fetch(slot + 1)
        self._count(message)

    def expect(self, slot: int, fresh: bool, specs: Sequence[Spec]) -> None:
        """Announces the peer's next message, so that it can arrive before `receive` asks for it."""
        with self.at(slot), self.wire.working():
            message = self._message(slot, fresh, specs)
            self.wire.expect(message.num_bytes)
        self._expected.append(message)

    def receive(self) -> list[torch.Tensor]:
        """The tensors of the message that was expected first: what the peer sent, up to the codec's
        error."""
        message = self._expected.popleft()
        values, freed = self._next or self._new_arrivals(message.specs)
        with self.at(message.slot), self.wire.working():
            payload = self.wire.receive()
            header, *sections = self._sections(payload, message)
            expected = self._header(message)
            if expected is not None:
                expected.with_payload(payload[len(header) :]).check(Header.read(header))
            self.wire.side.follow(freed)
            for part, value, section in zip(message.parts, values, sections, strict=True):
                part.codec.decode_(section, value, self._visited(part))
            self.wire.done_with(payload)
            self._put_back(message)
        self._prepare_next()
        self._count(message)
        return values

    def end_step(self) -> None:
        """Waits until everything sent has gone, where the host is what waits."""
        self.wire.drain()

    @property
    def memory_nbytes(self) -> int:
        """Bytes that error feedback and codecs hold at this end."""
        held = sum(held.nbytes for held in self.all_held())
        states = [learned.state for learned in self.learned.values()]
        return held + sum(state.nbytes for state in states if state is not None)

    def count_lacking_bytes(self, pool: int) -> int:
        """That memories of a pool of so many entries like the largest one will take besides those held."""
        sizes = []
        for slots in self.pool.values():
            memories = [held.memory for tensors in slots.values() for held in tensors.values()]
            sizes.append(sum(self.memories.count_bytes(each) for each in memories if each is not None))
        return max(0, pool * max(sizes) - sum(sizes) - self.memories.unused_bytes)

    def rescale(self, factor: float) -> None:
        """At both ends, between two steps: the values to come are so many times larger. What is held becomes
        so, each entry when it is used."""
        self.scale *= factor

    def _follow_scale(self, entry: int) -> None:
        factor = self.scale / self.scales.get(entry, self.scale)
        self.scales[entry] = self.scale
        if factor == 1:
            return
        self.wire.side.wait()
        self.memories.settle()
        with self.wire.side.active():
            for memory in [held.memory for tensors in self.held.values() for held in tensors.values()]:
                if memory is not None:
                    largest = torch.finfo(memory.dtype).max
                    memory.copy_((memory.float() * factor).clamp(-largest, largest))

    def state_dict(self) -> dict[str, Any]:
        """Counters, and what is held by slot and tensor, for `torch.save`."""
        self.wire.side.wait()
        self.memories.settle()
        self.traffic.settle()
        pool = {
            entry: {
                slot: {index: {**held._asdict(), "spec": tuple(held.spec)} for index, held in tensors.items()}
                for slot, tensors in slots.items()
            }
            for entry, slots in self.pool.items()
        }
        learned = {
            place: {"width": learned.width, "state": learned.state.state_dict()}
            for place, learned in self.learned.items()
            if learned.state is not None
        }
        counters = {"scale": self.scale, "scales": self.scales, "first_step": self.first_step}
        return {"traffic": asdict(self.traffic), "pool": pool, "learned": learned, **counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` of the same end gave, onto the devices where it belongs."""
        self.traffic = Traffic(**state["traffic"])
        self.forget()
        self.wire.side.follow()
        with self.wire.side.active():
            self.pool = {
                entry: {
                    slot: {index: self._load_held(saved) for index, saved in tensors.items()}
                    for slot, tensors in slots.items()
                }
                for entry, slots in state["pool"].items()
            }
            self.held = self.pool.setdefault(0, {})
            self.scale, self.scales = state["scale"], dict(state["scales"])
            self.first_step = state["first_step"]
            for (index, kind), saved in state["learned"].items():
                learned = self._state(index, kind, saved["width"])
                assert learned is not None
                learned.load_state_dict(saved["state"], self.wire.device)
        self.wire.side.wait()

    def forget(self) -> None:
        """Forgets what is held and what codecs have learned."""
        self.forget_held()
        self.forget_learned()

    def forget_held(self) -> None:
        """Forgets the memories alone."""
        self.memories.end()
        for tensors in (tensors for slots in self.pool.values() for tensors in slots.values()):
            self._drop(tensors, *list(tensors))
        self.held = {}
        self.pool = {0: self.held}
        self.scale, self.scales = 1.0, {}

    def forget_learned(self) -> None:
        """Forgets what codecs have learned: a start begins again."""
        self.learned.clear()
        self.first_step = None

    def all_held(self) -> Iterator[Held]:
        """Of all entries, slots and tensors."""
        return (held for slots in self.pool.values() for of in slots.values() for held in of.values())

    def _drop(self, tensors: dict[int, Held], *indexes: int) -> None:
        """What is held of some of a slot's tensors, where something is."""
        for index in indexes:
            if index in tensors:
                self.memories.free(tensors.pop(index).memory)

    def _load_held(self, saved: dict[str, Any]) -> Held:
        held = self._new(Spec(*saved["spec"]))
        if held.memory is not None:
            held.memory.copy_(saved["memory"])
        return held

    def _encode(self, part: Part, value: torch.Tensor, section: torch.Tensor) -> None:
        context = self._visited(part)
        measures_error = self.measures_error and part.codec is not RAW
        if measures_error and context.memory is None:  # for this message alone
            context = context._replace(memory=torch.zeros_like(value, dtype=torch.float32))
        part.codec.encode_(value, section, context)
        if measures_error:
            assert context.memory is not None
            received = value if isinstance(part.codec, Raw) else context.memory.to(value.dtype)
            self.traffic.count_error(value, received)

    def _visited(self, part: Part) -> Context:
        """With the memory where the codec can work on it."""
        memory = part.context.memory
        return part.context if memory is None else part.context._replace(memory=self.memories.fetch(memory))

    def _put_back(self, message: Message) -> None:
        """The memories of a message, to where they live."""
        self._used.add(message.slot)
        for part in message.parts:
            if part.context.memory is not None:
                self.memories.put_back(part.context.memory)

    def _fetch(self, slot: int) -> None:
        """Has the memories of a message that is to come on their way."""
        for memory in self._list_waiting(slot):
            self.memories.fetch(memory)
        self._read(slot + NUM_READ_AHEAD - 1)

    def _read(self, slot: int) -> None:
        """Has the memories of a message that is to come read from disk, where they are there."""
        for memory in self._list_waiting(slot):
            self.memories.read(memory)

    def _list_waiting(self, slot: int) -> Iterator[torch.Tensor]:
        """The memories of a slot whose message is still to come in this step."""
        held = () if slot in self._used else self.held.get(slot, {}).values()
        return (each.memory for each in held if each.memory is not None)

    def _prepare_next(self) -> None:
        """For the message that comes next, while compute goes on: what decoding it would wait for."""
        self._next = None
        if self._expected and self.wire.side.stream is not None:
            message = self._expected[0]
            self._next = self._new_arrivals(message.specs)
            with self.wire.side.active():
                self._fetch(message.slot)

    def _new_arrivals(self, specs: Sequence[Spec]) -> "Arrivals":
        """Memory of the compute stream, which is where it will be freed: once compute is done with what was
        in it before, it can be written."""
        values = [torch.empty(spec.shape, dtype=spec.dtype, device=self.wire.device) for spec in specs]
        return Arrivals(values, self.wire.side.mark_compute())

    @contextmanager
    def at(self, slot: int) -> Iterator[None]:
        """Errors of the wire and of verification say where they happened."""
        try:
            yield
        except (ConnectionError, VerificationError, DiskError) as error:
            place = f"link {self.link}, {self.direction}, step {self.step}, slot {slot}"
            raise type(error)(f"{place}: {error}") from error

    def _sections(self, payload: torch.Tensor, message: Message) -> Sequence[torch.Tensor]:
        """The header, and the part of the payload that belongs to each tensor."""
        return payload.split([self.header_nbytes, *(part.nbytes for part in message.parts)])

    def _header(self, message: Message) -> Header | None:
        """Of a message that is about to change the memories."""
        if not self.verifies:
            return None
        self.wire.side.wait()  # memories on the CPU are read by the host
        codecs = [part.codec for part in message.parts]
        return Header.of(self.step, message.slot, codecs, [self._visited(part) for part in message.parts])

    def _count(self, message: Message) -> None:
        self.specs = message.specs
        self.traffic.count(message.fresh, message.num_bytes, message.specs)

    def _message(self, slot: int, fresh: bool, specs: Sequence[Spec]) -> Message:
        """How each tensor is sent. A function of state that is equal at both ends."""
        held = self.held.setdefault(slot, {})
        self._drop(held, *[index for index in held if index >= len(specs)])
        parts = [self._part(slot, index, fresh, spec) for index, spec in enumerate(specs)]
        return Message(slot, fresh, specs, parts, self.header_nbytes + sum(part.nbytes for part in parts))

    def _part(self, slot: int, index: int, fresh: bool, spec: Spec) -> Part:
        tensors, plan = self.held[slot], self.plan
        if not is_compressed(spec, plan.min_numel):
            self._drop(tensors, index)
            return Part(RAW, Context(), RAW.nbytes(*spec))
        is_known = index in tensors and tensors[index].spec == spec
        if not is_known:
            self._drop(tensors, index)
            tensors[index] = self._new(spec)
        held = tensors[index]
        is_delta = not fresh and (is_known or not plan.holds_memory)
        kind = "delta" if is_delta else "key"
        codec = self._choose(index, kind, spec)
        context = Context(
            memory=held.memory,
            carry=held.memory is not None and (is_delta or plan.carries),
            seed=draw_word(self.seed, self.step, slot, index),
            state=None if codec is RAW else self._state(index, kind, width_of(spec.shape)),
            compiles=self.compiles,
        )
        return Part(codec, context, codec.nbytes(*spec))

    def _choose(self, index: int, kind: str, spec: Spec) -> AnyCodec:
        """The codec of a message: in the start that with more bits; `none` where that is smaller."""
        codec, start, raw_nbytes = self._codec(kind), self.plan.start, RAW.nbytes(*spec)
        if start is not None and start.nbytes(*spec) <= raw_nbytes:
            is_early = self.first_step is None or self.step < self.first_step + self.plan.start_steps
            learns = start.layout(width_of(spec.shape)) is not None
            if is_early or (learns and (index, kind) not in self._in_use):
                codec = start
        return codec if codec.nbytes(*spec) <= raw_nbytes else RAW

    def _list_in_use(self) -> Iterator[tuple[int, str]]:
        """The tensors and kinds of message of which what is learned is in use."""
        for place, (codec, width, state) in self.learned.items():
            if isinstance(codec, Transform) and state is not None and codec.has_learned(state, width):
                yield place

    def _codec(self, kind: str) -> AnyCodec:
        """Of the plan, after the start."""
        return self.plan.delta if kind == "delta" else self.plan.key

    def _state(self, index: int, kind: str, width: int) -> State | None:
        """Kept while the tensor's last dimension stays, and the codec."""
        codec, known = self._codec(kind), self.learned.get((index, kind))
        if known is None or (known.codec, known.width) != (codec, width):
            known = Learned(codec, width, codec.new_state(width, self.wire.device))
            self.learned[index, kind] = known
        return known.state

    def _new(self, spec: Spec) -> Held:
        """What is held of a tensor before its first message: zeros."""
        return Held(spec, self.memories.new(*spec) if self.plan.holds_memory else None)


def is_compressed(spec: Spec, min_numel: int) -> bool:
    """Whether the codecs of a direction are used for such a tensor. Others travel raw."""
    return spec.dtype in COMPRESSIBLE_DTYPES and spec.shape.numel() >= max(1, min_numel)
