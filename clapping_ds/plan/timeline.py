"""One optimizer step of a pipeline as a discrete-event model: when each stage computes, sends and waits.

    stock   DeepSpeed's order; a send holds the stage until the receiver has posted its receive and the
            bytes are over, less what the sender's buffer takes; a receive, until they have arrived
    ours    1F1B with `in_flight`: sends are asynchronous, in_flight + 2 payloads may be pending;
            in_flight + 2 receives are posted ahead

Both orders are lists of operations per stage. An operation's time follows from the operations before it
on its stage and from messages, so the model is evaluated by dependency: each stage runs until it needs
what is not known yet. A channel carries one message at a time, in order: bytes / bandwidth, after which
it arrives `latency_s` later. The two directions of a link do not disturb each other, and the notice that
a receive is posted reaches the sender at once.

Not modelled: jitter, slow starts of TCP, a stage that computes slower while its link is busy.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from clapping_ds.autotune import depth

Operation = tuple[str, int]
"""What, and the slot. What: forward, backward, or send, await or receive with a direction. `await` ends
when the slot's message no longer needs its sender."""
Order = Literal["stock", "ours"]


@dataclass(frozen=True)
class Stage:
    """Seconds per micro-batch; of encoding and decoding, per message."""

    forward_s: float
    backward_s: float
    encode_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Link:
    """Each direction of a link has this bandwidth of its own."""

    bytes_per_s: float
    latency_s: float = 0.0
    buffer_bytes: float = 0.0
    """A send is done for its sender when no more than this is still to go over."""


@dataclass(frozen=True)
class Step:
    """One optimizer step. Every link carries the same messages."""

    stages: tuple[Stage, ...]
    links: tuple[Link, ...]
    """Link i is between stages i and i + 1."""
    activation_bytes: tuple[float, ...]
    """Per slot: as many as there are micro-batches."""
    gradient_bytes: tuple[float, ...]
    overhead_s: float = 0.0
    """After the last backward: data-parallel all-reduce, optimizer, broadcast of the loss."""
    codecs_overlap: bool = False
    """True: encoding and decoding delay their message only; False: they also occupy their stage."""

    def __post_init__(self) -> None:
        if len(self.links) != len(self.stages) - 1:
            raise ValueError(f"links = {len(self.links)} of them; accepted: one fewer than stages")
        if not self.activation_bytes or len(self.activation_bytes) != len(self.gradient_bytes):
            raise ValueError(
                f"activation_bytes, gradient_bytes = {len(self.activation_bytes)}, "
                f"{len(self.gradient_bytes)} slots; accepted: as many in both, one at least"
            )

    @property
    def num_micro_batches(self) -> int:
        return len(self.activation_bytes)


@dataclass(frozen=True)
class Timeline:
    """What `simulate` found. Shares are of `step_s`."""

    step_s: float
    ends_s: tuple[float, ...]
    """When each stage had finished its last operation."""
    busy_shares: tuple[float, ...]
    """Per stage: computing, and encoding and decoding where they occupy it. Else it waits."""
    activation_shares: tuple[float, ...]
    """Per link: carrying bytes."""
    gradient_shares: tuple[float, ...]


def slot_bytes(num_slots: int, key_bytes: float, delta_bytes: float, fresh_share: float) -> tuple[float, ...]:
    """A step's message sizes. Fresh slots are spread evenly; the first is fresh where any is."""
    num_fresh = [math.ceil(slot * fresh_share) for slot in range(num_slots + 1)]
    return tuple(key_bytes if after > before else delta_bytes for before, after in pairwise(num_fresh))


def stock_operations(num_micro_batches: int, num_stages: int, stage_id: int) -> Iterator[Operation]:
    """The instructions of DeepSpeed's TrainSchedule that compute or communicate.

    Its steps are numbered: stage s runs forward i in step 2 i + s, backward i in step
    2 i + 2 num_stages - 1 - s, and sends a result in the step after the one that computed it.
    """
    is_first, is_last = stage_id == 0, stage_id == num_stages - 1
    for step in range(2 * (num_micro_batches + num_stages - 1)):
        forward, odd = divmod(step - stage_id, 2)
        if odd:
            backward, previous = forward + 1 + stage_id - num_stages, forward
            if 0 <= backward < num_micro_batches and not is_last:
                yield "receive gradients", backward
            if 0 <= previous < num_micro_batches and not is_last:
                yield "send activations", previous
                yield "await activations", previous
            if 0 <= backward < num_micro_batches:
                yield "backward", backward
        else:
            previous = forward + stage_id - num_stages
            if 0 <= previous < num_micro_batches and not is_first:
                yield "send gradients", previous
                yield "await gradients", previous
            if 0 <= forward < num_micro_batches and not is_first:
                yield "receive activations", forward
            if 0 <= forward < num_micro_batches:
                yield "forward", forward


def our_operations(
    num_micro_batches: int, num_stages: int, stage_id: int, in_flight: int
) -> Iterator[Operation]:
    """`clapping_ds.autotune.depth` with the messages around it."""
    for name, slot in depth.order_work(num_micro_batches, num_stages, stage_id, in_flight):
        is_forward = name == "forward"
        direction = "activations" if is_forward else "gradients"
        from_previous, from_next = stage_id > 0, stage_id < num_stages - 1
        arrives, leaves = (from_previous, from_next) if is_forward else (from_next, from_previous)
        if arrives:
            yield f"receive {direction}", slot
        yield name, slot
        if leaves:
            if slot >= in_flight + 2:
                yield f"await {direction}", slot - in_flight - 2
            yield f"send {direction}", slot


class Wire:
    """One direction of one link: when each slot's message was asked for, sent, and arrived, in seconds.

    `send`, `await_sent` and `receive` take a slot and the time at which the stage gets there, and return
    the time at which it goes on, or None while that is unknown.
    """

    def __init__(
        self,
        link: Link,
        slot_bytes: Iterable[float],
        sender: Stage,
        receiver: Stage,
        ahead: int,
        overlap: bool,
    ) -> None:
        """ahead: receives that the receiver keeps posted; 0: each is posted when it is waited for."""
        self.durations_s = [num_bytes / link.bytes_per_s for num_bytes in slot_bytes]
        self.latency_s = link.latency_s
        self.buffered_s = link.buffer_bytes / link.bytes_per_s
        self.encode_s, self.decode_s = sender.encode_s, receiver.decode_s
        self.overlap = overlap
        self.num_ahead = max(1, ahead)
        self.issued_s: list[float] = []
        self.posted_s = [0.0] * min(ahead, len(self.durations_s))
        self.sent_s: list[float] = []
        self.arrived_s: list[float] = []
        self.free_s = 0.0
        self.starts_s: list[float] = []

    def send(self, slot: int, now_s: float) -> float:
        encoded_s = now_s + self.encode_s
        assert slot == len(self.issued_s), "messages leave in the order of their slots"
        self.issued_s.append(encoded_s)
        self._carry()
        return now_s if self.overlap else encoded_s

    def await_sent(self, slot: int, now_s: float) -> float | None:
        return max(now_s, self.sent_s[slot]) if slot < len(self.sent_s) else None

    def receive(self, slot: int, now_s: float) -> float | None:
        num_posted = min(slot + self.num_ahead, len(self.durations_s))
        if num_posted > len(self.posted_s):
            self.posted_s += [now_s] * (num_posted - len(self.posted_s))
            self._carry()
        if slot >= len(self.arrived_s):
            return None
        if self.overlap:
            return max(now_s, self.arrived_s[slot] + self.decode_s)
        return max(now_s, self.arrived_s[slot]) + self.decode_s

    def _carry(self) -> None:
        """Carries the messages that are both sent and asked for."""
        for slot in range(len(self.arrived_s), min(len(self.issued_s), len(self.posted_s))):
            ready_s = max(self.issued_s[slot], self.posted_s[slot])
            self.starts_s.append(max(ready_s, self.free_s))
            self.free_s = self.starts_s[-1] + self.durations_s[slot]
            self.sent_s.append(max(ready_s, self.free_s - self.buffered_s))
            self.arrived_s.append(self.free_s + self.latency_s)


Handler = Callable[[int, float], float | None]


class Rank:
    """A stage that works off its operations."""

    def __init__(self, operations: Iterable[Operation], handlers: dict[str, Handler]) -> None:
        self.operations = list(operations)
        self.handlers = handlers
        self.position = 0
        self.now_s = 0.0
        self.starts_s: list[float] = []
        """Of each operation, so far."""

    def advance(self) -> bool:
        """Runs until a time is needed that is unknown. Whether anything ran."""
        start = self.position
        while self.position < len(self.operations):
            name, slot = self.operations[self.position]
            end_s = self.handlers[name](slot, self.now_s)
            if end_s is None:
                break
            self.starts_s.append(self.now_s)
            self.now_s = end_s
            self.position += 1
        return self.position > start


def simulate(step: Step, order: Order, in_flight: int = 0) -> Timeline:
    """One step with the stock order, or with ours at a depth of `in_flight`."""
    return run(step, *_list_operations(step, order, in_flight))


def _list_operations(step: Step, order: Order, in_flight: int) -> tuple[list[Iterator[Operation]], int]:
    """Of each stage; and the receives that it keeps posted."""
    shape = step.num_micro_batches, len(step.stages)
    if order == "stock":
        return [stock_operations(*shape, stage_id) for stage_id in range(shape[1])], 0
    operations = [our_operations(*shape, stage_id, in_flight) for stage_id in range(shape[1])]
    return operations, in_flight + 2


def run(step: Step, operations: Sequence[Iterable[Operation]], ahead: int) -> Timeline:
    """Any order, one list of operations per stage. RuntimeError where stages wait for each other forever.

    ahead: receives kept posted, from the start of the step; 0: each is posted when it is waited for.
    """
    ranks, _ = _play(step, operations, ahead)
    step_s = max(rank.now_s for rank in ranks) + step.overhead_s
    sums = sum(step.activation_bytes), sum(step.gradient_bytes)
    activations, gradients = (tuple(x / link.bytes_per_s / step_s for link in step.links) for x in sums)
    return Timeline(
        step_s,
        tuple(rank.now_s for rank in ranks),
        tuple(work_s(step, stage_id) / step_s for stage_id in range(len(ranks))),
        activations,
        gradients,
    )


def _play(
    step: Step, operations: Sequence[Iterable[Operation]], ahead: int
) -> tuple[list[Rank], dict[tuple[int, str], Wire]]:
    """Stages, and wires by link and direction, after all operations."""
    wires = _wires(step, ahead)
    handlers = _handlers(step, wires)
    ranks = [Rank(*of_stage) for of_stage in zip(operations, handlers, strict=True)]
    while sum(rank.advance() for rank in ranks):
        pass
    stuck = [(number, rank) for number, rank in enumerate(ranks) if rank.position < len(rank.operations)]
    if stuck:
        waits = (f"stage {number} at {rank.operations[rank.position]}" for number, rank in stuck)
        raise RuntimeError(f"deadlock: {', '.join(waits)}")
    return ranks, wires


class Span(NamedTuple):
    """What a stage computed, or a channel carried, and when."""

    slot: int
    start_s: float
    end_s: float


def trace(step: Step, order: Order, in_flight: int = 0) -> dict[tuple[int, str], list[Span]]:
    """As `simulate`: when each stage had its "forward" and "backward" passes, and when bytes of each link's
    "activations" and "gradients" were on the way. By number of the stage or link, and what."""
    ranks, wires = _play(step, *_list_operations(step, order, in_flight))
    found = {
        key: [
            Span(slot, start_s, start_s + wire.durations_s[slot])
            for slot, start_s in enumerate(wire.starts_s)
        ]
        for key, wire in wires.items()
    }
    for number, (rank, stage) in enumerate(zip(ranks, step.stages, strict=True)):
        for name, seconds in (("forward", stage.forward_s), ("backward", stage.backward_s)):
            found[number, name] = [
                Span(slot, start_s, start_s + seconds)
                for (what, slot), start_s in zip(rank.operations, rank.starts_s, strict=True)
                if what == name
            ]
    return found


def work_s(step: Step, stage_id: int) -> float:
    """Seconds for which a stage is occupied."""
    stage = step.stages[stage_id]
    num_links = (stage_id > 0) + (stage_id < len(step.stages) - 1)
    codecs_s = 0.0 if step.codecs_overlap else num_links * (stage.encode_s + stage.decode_s)
    return step.num_micro_batches * (stage.forward_s + stage.backward_s + codecs_s)


def _wires(step: Step, ahead: int) -> dict[tuple[int, str], Wire]:
    """By link and direction."""
    found = {}
    for i, link in enumerate(step.links):
        here, there = step.stages[i : i + 2]
        forth, back = step.activation_bytes, step.gradient_bytes
        found[i, "activations"] = Wire(link, forth, here, there, ahead, step.codecs_overlap)
        found[i, "gradients"] = Wire(link, back, there, here, ahead, step.codecs_overlap)
    return found


def _handlers(step: Step, wires: Mapping[tuple[int, str], Wire]) -> list[dict[str, Handler]]:
    """What runs each stage's operations."""
    handlers: list[dict[str, Handler]] = [
        {"forward": _takes(stage.forward_s), "backward": _takes(stage.backward_s)} for stage in step.stages
    ]
    for (i, direction), wire in wires.items():
        source, target = (i, i + 1) if direction == "activations" else (i + 1, i)
        handlers[source] |= {f"send {direction}": wire.send, f"await {direction}": wire.await_sent}
        handlers[target] |= {f"receive {direction}": wire.receive}
    return handlers


def _takes(seconds: float) -> Handler:
    return lambda slot, now_s: now_s + seconds
