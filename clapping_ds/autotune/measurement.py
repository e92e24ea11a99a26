"""What `links` decides by: time and memory of a stage's passes, cost of codecs, speed of links."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks

from clapping_ds.autotune.decision import Candidate, Speed
from clapping_ds.codecs import AnyCodec, Context, Raw
from clapping_ds.config import LinksConfig, Plan
from clapping_ds.link.channel import Channel, is_compressed
from clapping_ds.link.message import Spec
from clapping_ds.link.wire import Wire

NUM_PINGS = 8
LONG_ENOUGH_S = 0.1
MOST_BYTES = 1 << 26


class Passes:
    """Forward and backward passes of one stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.per_micro_batch_s = float("inf")
        """The fastest of the steps that were timed."""
        self.stored_bytes = 0
        """Kept of one micro-batch from its forward to its backward pass, besides the parameters."""
        self._step_s = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around every pass of a step that is timed. Waits for the device before and after."""
        start = _read_clock_s(self.device)
        yield
        self._step_s += _read_clock_s(self.device) - start

    def end_step(self, num_micro_batches: int) -> None:
        if self._step_s:
            self.per_micro_batch_s = min(self.per_micro_batch_s, self._step_s / num_micro_batches)
        self._step_s = 0.0

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
    """What the last message of a channel would cost with each codec that the channel may get: that of
    its plan, or one of `links`."""
    if links is None:
        return [_candidate(channel, plan)]
    codecs: list[AnyCodec] = [Raw(), *links.ladder]
    return [_candidate(channel, plan.with_codec(codec)) for codec in codecs]


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
    state = codec.new_state(spec.shape, device)
    context = Context(memory, memory is not None, 0, state, channel.compiles)

    def once() -> float:
        start = _read_clock_s(device)
        codec.encode_(value, payload, context)
        codec.decode_(payload, value, context)
        return _read_clock_s(device) - start

    once()  # kernels are compiled
    return min(once() for _ in range(3))


def probe(outgoing: Wire, incoming: Wire, leads: bool) -> Speed:
    """How fast messages to the peer are. Both ends call it, one of them with `leads`, while nothing is on
    its way. Messages grow until one takes a tenth of a second."""
    if leads:
        speed = _time_messages(outgoing, incoming)
        _answer_messages(outgoing, incoming)
    else:
        _answer_messages(outgoing, incoming)
        speed = _time_messages(outgoing, incoming)
    return speed


def _time_messages(outgoing: Wire, incoming: Wire) -> Speed:
    round_trip_s = min(_round_trip_s(outgoing, incoming, 1) for _ in range(NUM_PINGS))
    num_bytes, took_s = 1 << 14, 0.0
    while took_s < LONG_ENOUGH_S and num_bytes < MOST_BYTES:
        num_bytes *= 4
        took_s = _round_trip_s(outgoing, incoming, num_bytes) - round_trip_s
    _put(outgoing, torch.zeros(1, dtype=torch.int64))
    outgoing.drain()
    return Speed(num_bytes / max(took_s, 1e-9), round_trip_s / 2)


def _answer_messages(outgoing: Wire, incoming: Wire) -> None:
    while num_bytes := int(_get(incoming, 8).view(torch.int64)):
        _get(incoming, num_bytes)
        _put(outgoing, torch.zeros(1, dtype=torch.uint8))
    outgoing.drain()


def _round_trip_s(outgoing: Wire, incoming: Wire, num_bytes: int) -> float:
    """Until a message, told of by one with its size, is answered by a byte."""
    start = time.perf_counter()
    _put(outgoing, torch.tensor([num_bytes]))
    _put(outgoing, torch.zeros(num_bytes, dtype=torch.uint8))
    _get(incoming, 1)
    return time.perf_counter() - start


def _put(wire: Wire, message: torch.Tensor) -> None:
    with wire.working():
        payload = wire.new_payload(message.numel() * message.element_size())
        wire.send(payload.copy_(message.view(torch.uint8)))


def _get(wire: Wire, num_bytes: int) -> torch.Tensor:
    """The first bytes of the peer's next message, on the CPU."""
    with wire.working():
        wire.expect(num_bytes)
        payload = wire.receive()
        start = payload[:8].to("cpu", copy=True)
        wire.done_with(payload)
    return start


def _read_clock_s(device: torch.device) -> float:
    """Once the device has done what was asked of it so far."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
