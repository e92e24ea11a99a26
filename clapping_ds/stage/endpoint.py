"""One pipeline stage, whatever the host: its ends of channels, and the batches that are held for it.

`Endpoints` has all of a rank, and runs their steps; within a step a host calls `send` and `receive` in the
order of its schedule. Messages are counted per end and step, which gives their slots; a host whose schedule
names the slot passes it.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from clapping_ds.codecs import AnyCodec, Raw
from clapping_ds.config import ClappingConfig, Plan
from clapping_ds.link.channel import Channel
from clapping_ds.link.groups import Peer
from clapping_ds.link.message import Spec
from clapping_ds.link.seeds import draw_word
from clapping_ds.link.wire import Wire
from clapping_ds.stage.sampling import LazySampler


class End(NamedTuple):
    """One of the up to four ends of channels that a stage has."""

    direction: str
    """"activations" or "gradients"."""
    sends: bool
    """False: it receives."""
    neighbour: int
    """At the other end: 1, the next stage, or -1, the previous one."""

    def __str__(self) -> str:
        where = "next" if self.neighbour > 0 else "previous"
        return f"{self.direction} {'to' if self.sends else 'from'} {where}"

    def link(self, stage_id: int) -> int:
        """The number of the link: of its first stage."""
        return min(stage_id, stage_id + self.neighbour)

    @property
    def way_back(self) -> "End":
        """The end of the same link where the other direction goes the other way."""
        other = "gradients" if self.direction == "activations" else "activations"
        return End(other, not self.sends, self.neighbour)


ACTIVATIONS_TO_NEXT = End("activations", sends=True, neighbour=1)
ACTIVATIONS_FROM_PREVIOUS = End("activations", sends=False, neighbour=-1)
GRADIENTS_TO_PREVIOUS = End("gradients", sends=True, neighbour=-1)
GRADIENTS_FROM_NEXT = End("gradients", sends=False, neighbour=1)
ENDS = (ACTIVATIONS_TO_NEXT, ACTIVATIONS_FROM_PREVIOUS, GRADIENTS_TO_PREVIOUS, GRADIENTS_FROM_NEXT)


class Endpoint:
    """Channels and lazy sampling of one stage.

    peers           the neighbours of this rank's stages, as `make_peers` gives them
    replica         number of this pipeline among its data-parallel replicas
    most_pending    sends that may be on their way at each end; None: as many as `in_flight` needs
    control_group   a gloo group of all ranks: shapes are told there
    """

    def __init__(
        self,
        config: ClappingConfig,
        stage_id: int,
        peers: Mapping[tuple[int, int], Peer],
        device: torch.device,
        replica: int = 0,
        most_pending: int | None = None,
        control_group: Any = None,
    ) -> None:
        # Configuration
        self.config = config
        self.stage_id = stage_id
        self.device = device
        self.replica = replica
        self.in_flight = 0 if config.in_flight == "auto" else config.in_flight
        self.most_pending = self.in_flight + 1 if most_pending is None else most_pending
        self.control_group = control_group
        self.wires: dict[End, Wire] = {}
        for end in ENDS:
            peer = peers.get((stage_id, stage_id + end.neighbour))
            if peer is not None:
                group = getattr(peer, end.direction)
                self.wires[end] = Wire(peer.rank, device, group, self.most_pending)
        plans = config.plans
        self.channels = {end: self._channel(end, plans[end.direction]) for end in self.wires}
        # State
        self.sampler = LazySampler()
        self.fresh: Sequence[bool] = []
        """By slot of the step."""
        self.leads: Mapping[End, int] = {}
        """Where messages are queued (NCCL), by receiving end: how many may be announced before this stage has
        sent anything back on the link; each message that it sends back allows one more."""
        self._num_sent: Counter[End] = Counter()
        self._num_received: Counter[End] = Counter()
        self._num_announced: Counter[End] = Counter()
        self.order: dict[End, Sequence[int]] = {}
        """By receiving end, the step's slots as the peer sends them: ascending, unless a host sets it after
        `begin_step`."""
        self._specs: dict[End, Sequence[Spec]] = {}
        """Of the messages to come at an end, where all will have the same."""
        self._tellers: dict[End, Wire] = {}
        """By end, how shapes are told there."""

    def draw(self, num_fresh: int, next_batch: Callable[[], Any] | None) -> bool:
        """Draws what the coming step lacks; whether all was there. next_batch: None where no data is read."""
        if next_batch is not None:
            try:
                self.sampler.draw(num_fresh, next_batch)
            except StopIteration:
                return False
        return True

    def begin_step(
        self, step: int, fresh: Sequence[bool], replays: bool, measures_error: bool, entry: int = 0
    ) -> None:
        """Starts a step. fresh: by slot. replays: whether the sampler has the step's batches. entry: of the
        pool, that the slots are of."""
        if replays:
            self.sampler.begin(fresh, entry)
        self.fresh = fresh
        for counter in (self._num_sent, self._num_received, self._num_announced):
            counter.clear()
        self._specs.clear()
        self.order = {end: range(len(fresh)) for end in self.channels if not end.sends}
        for channel in self.channels.values():
            channel.begin_step(step, len(fresh), measures_error, entry)

    def end_step(self) -> None:
        """Waits until the step's messages are there, and, where the host is what waits, have gone."""
        self.wait_for_arrivals()
        for channel in self.channels.values():
            channel.end_step()
        for teller in self._tellers.values():
            teller.drain()

    def send(self, end: End, values: Sequence[torch.Tensor], slot: int | None = None) -> None:
        """Sends the tensors of a slot; None: of the end's next one."""
        slot = self._num_sent[end] if slot is None else slot
        self._num_sent[end] += 1
        self.channels[end].send(slot, self.fresh[slot], values)
        self._announce(end.way_back)

    def next_slot(self, end: End) -> int:
        """Of the message that is received next at an end."""
        return self.order[end][self._num_received[end]]

    def look_ahead(self, end: End, specs: Sequence[Spec]) -> None:
        """From now on the messages of an end, all of these specs, are announced as early as may be."""
        self._specs[end] = specs
        self._announce(end)

    def expect(self, end: End, specs: Sequence[Spec], number: int) -> None:
        """Announces the messages of an end up to the step's `number`-th (from 0), all of these specs."""
        while self._num_announced[end] <= number:
            slot = self.order[end][self._num_announced[end]]
            self.channels[end].expect(slot, self.fresh[slot], specs)
            self._num_announced[end] += 1

    def receive(self, end: End, specs: Sequence[Spec], looks_ahead: bool = True) -> list[torch.Tensor]:
        """The tensors of an end's next message. looks_ahead: the messages after it have the same specs."""
        self.expect(end, specs, self._num_received[end])
        if looks_ahead:
            self.look_ahead(end, specs)
        self._num_received[end] += 1
        return self.channels[end].receive()

    def _announce(self, end: End) -> None:
        """What may be announced of an end."""
        if end in self._specs:
            self.expect(end, self._specs[end], min(self._count_ahead(end), len(self.fresh)) - 1)

    def _count_ahead(self, end: End) -> int:
        """How many of a step's messages may be announced by now, whether they were asked for or not.

        Where the host waits for messages (gloo), none of them holds up anything else. A queued one (NCCL)
        holds up whoever waits for the whole GPU: see `find_leads`.
        """
        if not self.config.overlap:
            return 0
        if not self.queues:
            return self._num_received[end] + self.most_pending + 1
        if end not in self.leads:
            return 0
        num_sent_back = self._num_sent[end.way_back]
        return len(self.fresh) if num_sent_back == len(self.fresh) else self.leads[end] + num_sent_back

    @property
    def queues(self) -> bool:
        """Whether messages are queued on the device, which the host does not wait for."""
        return any(wire.carrier.type != "cpu" for wire in self.wires.values())

    def wait_for_sends(self) -> None:
        """All that this stage has sent goes before compute goes on."""
        for channel in self.channels.values():
            channel.end_step()
            channel.wire.side.hold_compute(channel.wire.side.mark())

    def wait_for_arrivals(self) -> None:
        """Waits until all that was received is there; raises ConnectionError for a peer that is gone."""
        for end, channel in self.channels.items():
            if not end.sends:
                with channel.at(self._num_received[end] - 1):
                    self.wires[end].wait_for_arrivals(self.config.timeout_s)

    def tell(self, end: End, item: Any) -> None:
        """Tells the peer something of the end's next message, as JSON, on the CPU."""
        text = torch.frombuffer(bytearray(json.dumps(item).encode()), dtype=torch.uint8)
        teller = self._teller(end)
        with self.channels[end].at(self._num_sent[end]):
            for part in (torch.tensor([len(text)], device="cpu").view(torch.uint8), text):
                teller.send(teller.new_payload(len(part)).copy_(part))

    def hear(self, end: End) -> Any:
        """What the peer told of the end's next message."""
        teller = self._teller(end)

        def receive(num_bytes: int) -> bytes:
            teller.expect(num_bytes)
            payload = teller.receive()
            text = bytes(payload.tolist())
            teller.done_with(payload)
            return text

        with self.channels[end].at(self._num_received[end]):
            return json.loads(receive(int.from_bytes(receive(8), sys.byteorder)))

    def _teller(self, end: End) -> Wire:
        if end not in self._tellers:
            tag = 1 + 2 * end.link(self.stage_id) + (end.direction == "gradients")
            cpu, no_limit = torch.device("cpu"), sys.maxsize
            self._tellers[end] = Wire(self.wires[end].peer, cpu, self.control_group, no_limit, tag)
        return self._tellers[end]

    def rescale_gradients(self, factor: float) -> None:
        """Between two steps: gradients will be so many times larger, and what is held of them becomes so."""
        for end, channel in self.channels.items():
            if end.direction == "gradients":
                channel.rescale(factor)

    def set_depth(self, in_flight: int) -> None:
        """Between two steps: micro-batches that each link holds beyond stock 1F1B."""
        self.in_flight = in_flight
        self.most_pending = in_flight + 1
        for wire in self.wires.values():
            wire.most_pending = self.most_pending

    def set_plan(self, end: End, plan: Plan) -> None:
        """Between two steps. A channel whose plan changes starts with no memory."""
        channel = self.channels[end]
        if plan != channel.plan:
            self.channels[end] = self._channel(end, plan)
            self.channels[end].traffic = channel.traffic

    def state_dict(self) -> dict[str, Any]:
        """Held batches, memories, codecs and counters, between two steps."""
        channels = {
            str(end): {"plan": channel.plan.describe(), **channel.state_dict()}
            for end, channel in self.channels.items()
        }
        return {"sampler": self.sampler.state_dict(), "channels": channels}

    def match_plans(self, state: Mapping[str, Any], is_lazy: bool = True) -> dict[End, Plan] | None:
        """The plans that a state's channels had; None if this configuration does not allow them. is_lazy:
        whether samples were replayed, where the configuration says so."""
        saved = state["channels"]
        if set(saved) != {str(end) for end in self.channels}:
            return None
        found = {}
        for end in self.channels:
            allowed = self._allowed(end, is_lazy)
            plans = [plan for plan in allowed if plan.describe() == saved[str(end)]["plan"]]
            if not plans:
                return None
            found[end] = plans[0]
        return found

    def load_state_dict(self, state: Mapping[str, Any], plans: Mapping[End, Plan]) -> None:
        """Takes what `state_dict` gave. plans: of its channels."""
        self.sampler.load_state_dict(state["sampler"], self.device)
        for end, plan in plans.items():
            self.channels[end] = self._channel(end, plan)
            self.channels[end].load_state_dict(state["channels"][str(end)])

    def forget_held(self) -> None:
        """Forgets batches and memories alone."""
        self.sampler = LazySampler()
        for channel in self.channels.values():
            channel.forget_held()

    def forget_learned(self) -> None:
        """Forgets what codecs have learned."""
        for channel in self.channels.values():
            channel.forget_learned()

    def _allowed(self, end: End, is_lazy: bool) -> Iterable[Plan]:
        """The plans that an end may get from a state: what `links` may choose, else what it has."""
        links = self.config.links
        if links is None or links.read is not None:
            return [self.channels[end].plan]
        plan = self.config.plan(end.direction)
        codecs: list[AnyCodec] = [Raw(), *links.ladder]
        if not is_lazy:
            return map(plan.as_direct, codecs)
        return [plan, *map(plan.with_codec, codecs)]

    def _channel(self, end: End, plan: Plan) -> Channel:
        """A new end of a channel, with its wire."""
        config, link = self.config, end.link(self.stage_id)
        seed = draw_word(config.seed, self.replica, link, end.direction == "gradients")
        return Channel(plan, link, end.direction, self.wires[end], seed, config.verify, config.compile)
