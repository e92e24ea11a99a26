"""What `links` decides by: time and memory of a stage's passes, cost of codecs, speed of links."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from clapping_ds.autotune.decision import Candidate, Speed
from clapping_ds.codecs import AnyCodec, CodecSequence, Context, Raw, State, Transform, bits_per_value
from clapping_ds.codecs.base import width_of
from clapping_ds.config import LinksConfig, Plan
from clapping_ds.link.channel import Channel, is_compressed
from clapping_ds.link.message import Spec
from clapping_ds.link.wire import Wire
from clapping_ds.stage.endpoint import (
    ACTIVATIONS_FROM_PREVIOUS,
    ACTIVATIONS_TO_NEXT,
    GRADIENTS_FROM_NEXT,
    GRADIENTS_TO_PREVIOUS,
    End,
    Endpoint,
)
from clapping_ds.streams import Stopwatch

NUM_PINGS = 8
LONG_ENOUGH_S = 0.1
MOST_BYTES = 1 << 26


class Passes:
    """Forward and backward passes of one stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stored_bytes = 0
        """Kept of one micro-batch from its forward to its backward pass, besides the parameters."""
        self._steps: list[tuple[Stopwatch, int]] = []
        """The steps that were timed, with their numbers of micro-batches."""
        self._stopwatch = Stopwatch(device)

    def timed(self) -> AbstractContextManager[None]:
        """Around every pass of a step that is timed."""
        return self._stopwatch.running()

    def end_step(self, num_micro_batches: int) -> None:
        self._steps.append((self._stopwatch, num_micro_batches))
        self._stopwatch = Stopwatch(self.device)

    def find_per_micro_batch_s(self) -> float:
        """Of the fastest of the steps that were timed. The host waits for the last of them."""
        times_s = [(stopwatch.read_s(), num_micro_batches) for stopwatch, num_micro_batches in self._steps]
        return min((step_s / number for step_s, number in times_s if step_s), default=float("inf"))

    @contextmanager
    def weighed(self, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
        """Around one forward pass."""
        stored: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            stored[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        for parameter in parameters:
            stored.pop(parameter.untyped_storage().data_ptr(), None)
        self.stored_bytes = max(self.stored_bytes, sum(stored.values()))


def list_candidates(channel: Channel, plan: Plan, links: LinksConfig | None) -> list[Candidate]:
    """What the last message of a channel would cost with each codec that the channel may get: that of its
    plan, or one of `links`, to which lazy sampling adds that of the plan's deltas. Lightest first."""
    if links is None:
        return [_candidate(channel, plan)]
    codecs: list[AnyCodec] = [Raw(), *links.ladder]
    found = [_candidate(channel, plan.with_codec(codec)) for codec in codecs]
    if plan.p_new < 1 and plan.delta not in codecs:
        found.append(_candidate(channel, plan)._replace(is_of_ladder=False))
    return sorted(found, key=lambda candidate: -bits_per_value(candidate.codec, torch.float32))


def _candidate(channel: Channel, plan: Plan) -> Candidate:
    compressed = [spec for spec in channel.specs if is_compressed(spec, plan.min_numel)]
    raw_bytes = sum(spec.nbytes for spec in channel.specs if spec not in compressed)
    key_bytes, delta_bytes = (
        raw_bytes + sum(codec.nbytes(*spec) for spec in compressed) for codec in (plan.key, plan.delta)
    )
    codec_s = 0.0
    if not isinstance(plan.delta, Raw):
        codec_s = sum(_codec_s(plan, spec, channel) for spec in compressed)
    return Candidate(plan.delta, key_bytes, delta_bytes, codec_s)


def _codec_s(plan: Plan, spec: Spec, channel: Channel) -> float:
    """To encode and to decode one tensor as a delta: the fastest of three."""
    codec, device = plan.delta, channel.wire.device
    value = torch.randn(spec.shape, device=device).to(spec.dtype)
    payload = torch.empty(codec.nbytes(*spec), dtype=torch.uint8, device=device)
    memory = torch.zeros_like(value) if plan.holds_memory else None
    contexts = []
    for _ in range(2):  # the two ends
        state = codec.new_state(width_of(spec.shape), device)
        _warm_up(codec, state, width_of(spec.shape))
        contexts.append(Context(memory, memory is not None, 0, state, channel.compiles))

    def once() -> float:
        stopwatch = Stopwatch(device)
        with stopwatch.running():
            codec.encode_(value, payload, contexts[0])
            codec.decode_(payload, value, contexts[1])
        return stopwatch.read_s()

    once()  # kernels are compiled
    return min(once() for _ in range(3))


def _warm_up(codec: AnyCodec, state: State | None, width: int) -> None:
    """Lets a state be as after many messages."""
    if isinstance(codec, CodecSequence) and state is not None:
        for member, of_member in zip(codec.codecs, state.members, strict=True):
            _warm_up(member, of_member, width)
    elif isinstance(codec, Transform) and state is not None:
        codec.warm_up_(state, width)


class Speaker(NamedTuple):
    """By which the two ends of a link tell each other what comes next, on the CPU."""

    tell: Callable[[int], None]
    hear: Callable[[], int]


def probe_links(stage: Endpoint) -> dict[End, Speed]:
    """How fast a stage's links are, by sending end. Every stage of a pipeline calls it, between two steps.
    Every second link is measured at the same time, so that no stage is in two probes."""
    links = [
        (stage.stage_id - 1, GRADIENTS_TO_PREVIOUS, ACTIVATIONS_FROM_PREVIOUS),
        (stage.stage_id, ACTIVATIONS_TO_NEXT, GRADIENTS_FROM_NEXT),
    ]
    speeds = {}
    for _, outgoing, incoming in sorted(links, key=lambda link: link[0] % 2):
        if outgoing in stage.wires:
            ends = [stage.wires[end] for end in (outgoing, incoming)]
            # Where the group takes its bytes: a copy from the GPU to gloo is not the link's.
            there, back = (Wire(wire.peer, wire.carrier, wire.group) for wire in ends)
            speaker = Speaker(partial(stage.tell, outgoing), partial(stage.hear, incoming))
            speeds[outgoing] = probe(there, back, speaker, leads=outgoing == ACTIVATIONS_TO_NEXT)
    return speeds


def probe(outgoing: Wire, incoming: Wire, speaker: Speaker, leads: bool) -> Speed:
    """How fast messages to the peer are. Both ends call it, one of them with `leads`, while nothing is on
    its way. Messages grow until one takes a tenth of a second."""
    if leads:
        speed = _time_messages(outgoing, incoming, speaker)
        _answer_messages(outgoing, incoming, speaker)
    else:
        _answer_messages(outgoing, incoming, speaker)
        speed = _time_messages(outgoing, incoming, speaker)
    return speed


def _time_messages(outgoing: Wire, incoming: Wire, speaker: Speaker) -> Speed:
    round_trip_s = min(_round_trip_s(outgoing, incoming, speaker, 1) for _ in range(NUM_PINGS))
    num_bytes, took_s = 1 << 14, 0.0
    while took_s < LONG_ENOUGH_S and num_bytes < MOST_BYTES:
        num_bytes *= 4
        took_s = _round_trip_s(outgoing, incoming, speaker, num_bytes) - round_trip_s
    speaker.tell(0)
    return Speed(num_bytes / max(took_s, 1e-9), round_trip_s / 2)


def _round_trip_s(outgoing: Wire, incoming: Wire, speaker: Speaker, num_bytes: int) -> float:
    """Until a message is answered by a byte. Payloads are there, and the peer has announced the message,
    before the clock starts."""
    payload = _prepare(outgoing, num_bytes)
    speaker.tell(num_bytes)
    speaker.hear()
    start_s = time.perf_counter()
    _send(outgoing, payload)
    incoming.expect(1)
    _take(incoming)
    took_s = time.perf_counter() - start_s
    outgoing.drain()
    return took_s


def _answer_messages(outgoing: Wire, incoming: Wire, speaker: Speaker) -> None:
    while num_bytes := speaker.hear():
        answer = _prepare(outgoing, 1)
        incoming.expect(num_bytes)
        speaker.tell(num_bytes)
        _take(incoming)
        _send(outgoing, answer)
        outgoing.drain()


def _prepare(wire: Wire, num_bytes: int) -> torch.Tensor:
    with wire.working():
        payload = wire.new_payload(num_bytes).zero_()
    wire.side.wait()
    return payload


def _send(wire: Wire, payload: torch.Tensor) -> None:
    with wire.working():
        wire.send(payload)


def _take(wire: Wire) -> None:
    """The host waits for the peer's message."""
    with wire.working():
        wire.done_with(wire.receive())
    wire.side.wait()
