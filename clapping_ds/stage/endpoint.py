"""One pipeline stage, whatever the host: its ends of channels, and the batches that are held for it.

`Endpoints` has all of a rank, and runs their steps; within a step a host calls `send` and `receive` in the
order of its schedule. Messages are counted per end and step, which gives their slots; a host whose schedule
names the slot passes it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
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


ACTIVATIONS_TO_NEXT = End("activations", sends=True, neighbour=1)
ACTIVATIONS_FROM_PREVIOUS = End("activations", sends=False, neighbour=-1)
GRADIENTS_TO_PREVIOUS = End("gradients", sends=True, neighbour=-1)
GRADIENTS_FROM_NEXT = End("gradients", sends=False, neighbour=1)
ENDS = (ACTIVATIONS_TO_NEXT, ACTIVATIONS_FROM_PREVIOUS, GRADIENTS_TO_PREVIOUS, GRADIENTS_FROM_NEXT)


class Endpoint:
    """Channels and lazy sampling of one stage.

    peers          the neighbours of this rank's stages, as `make_peers` gives them
    replica        number of this pipeline among its data-parallel replicas
    most_pending   sends that may be on their way at each end; None: as many as `in_flight` needs
    """

    def __init__(
        self,
        config: ClappingConfig,
        stage_id: int,
        peers: Mapping[tuple[int, int], Peer],
        device: torch.device,
        replica: int = 0,
        most_pending: int | None = None,
    ) -> None:
        # Configuration
        self.config = config
        self.stage_id = stage_id
        self.device = device
        self.replica = replica
        self.in_flight = 0 if config.in_flight == "auto" else config.in_flight
        most_pending = self.in_flight + 1 if most_pending is None else most_pending
        self.wires: dict[End, Wire] = {}
        for end in ENDS:
            peer = peers.get((stage_id, stage_id + end.neighbour))
            if peer is not None:
                group = getattr(peer, end.direction)
                self.wires[end] = Wire(peer.rank, device, group, most_pending, config.overlap)
        plans = config.plans
        self.channels = {end: self._channel(end, plans[end.direction]) for end in self.wires}
        # State
        self.sampler = LazySampler()
        self.fresh: Sequence[bool] = []
        """By slot of the step."""
        self._num_messages: Counter[End] = Counter()
        self._num_expected: Counter[End] = Counter()

    def draw(self, num_fresh: int, next_batch: Callable[[], Any] | None) -> bool:
        """Draws what the coming step lacks; whether all was there. next_batch: None where no data is read."""
        if next_batch is not None:
            try:
                self.sampler.draw(num_fresh, next_batch)
            except StopIteration:
                return False
        return True

    def begin_step(self, step: int, fresh: Sequence[bool], replays: bool, measures_error: bool) -> None:
        """Starts a step. fresh: by slot. replays: whether the sampler has the step's batches."""
        if replays:
            self.sampler.begin(fresh)
        self.fresh = fresh
        self._num_messages.clear()
        self._num_expected.clear()
        for channel in self.channels.values():
            channel.begin_step(step, len(fresh), measures_error)

    def end_step(self) -> None:
        """Waits until the step's last messages have gone."""
        for channel in self.channels.values():
            channel.end_step()

    def send(self, end: End, values: Sequence[torch.Tensor], slot: int | None = None) -> None:
        """Sends the tensors of a slot; None: of the end's next one."""
        if slot is None:
            slot = self._num_messages[end]
            self._num_messages[end] += 1
        self.channels[end].send(slot, self.fresh[slot], values)

    def expect(self, end: End, specs: Sequence[Spec], slot: int) -> None:
        """Announces the message of a slot: messages are announced in the order in which they are sent."""
        self.channels[end].expect(slot, self.fresh[slot], specs)

    def expect_ahead(self, end: End, specs: Sequence[Spec], num_messages: int) -> None:
        """Announces the end's next messages, of equal specs, so that up to `num_messages` besides those
        received are announced."""
        last = min(self._num_messages[end] + num_messages, len(self.fresh))
        for slot in range(self._num_expected[end], last):
            self.expect(end, specs, slot)
            self._num_expected[end] += 1

    def receive(self, end: End) -> list[torch.Tensor]:
        """The tensors of the message that was announced first."""
        return self.channels[end].receive()

    def receive_next(self, end: End, specs: Sequence[Spec], looks_ahead: bool) -> list[torch.Tensor]:
        """The tensors of the end's next slot. looks_ahead: the messages after it have the same specs, so
        that they can arrive while this one is used."""
        self.expect_ahead(end, specs, self.num_ahead if looks_ahead else 1)
        self._num_messages[end] += 1
        return self.receive(end)

    def at_next(self, end: End) -> AbstractContextManager[None]:
        """Within it, errors of the end's wire name its link, direction, step and next slot."""
        return self.channels[end].at(self._num_messages[end])

    @property
    def num_ahead(self) -> int:
        """Messages of a direction that are announced at the same time."""
        return self.in_flight + 2 if self.config.overlap else 1

    def rescale_gradients(self, factor: float) -> None:
        """Between two steps: gradients will be so many times larger, and what is held of them becomes so."""
        for end, channel in self.channels.items():
            if end.direction == "gradients":
                channel.rescale(factor)

    def set_depth(self, in_flight: int) -> None:
        """Between two steps: micro-batches that each link holds beyond stock 1F1B."""
        self.in_flight = in_flight
        for wire in self.wires.values():
            wire.most_pending = in_flight + 1

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

    def match_plans(self, state: Mapping[str, Any]) -> dict[End, Plan] | None:
        """The plans that a state's channels had; None if this configuration does not allow them."""
        saved = state["channels"]
        if set(saved) != {str(end) for end in self.channels}:
            return None
        found = {}
        for end in self.channels:
            plans = [plan for plan in self._allowed(end) if plan.describe() == saved[str(end)]["plan"]]
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

    def forget(self) -> None:
        """Forgets what is held."""
        self.sampler = LazySampler()
        for channel in self.channels.values():
            channel.held.clear()

    def _allowed(self, end: End) -> Iterable[Plan]:
        """The plans that an end may get from a state: what `links` may choose, else what it has."""
        links = self.config.links
        if links is None or links.read is not None:
            return [self.channels[end].plan]
        plan = self.config.plan(end.direction)
        codecs: list[AnyCodec] = [Raw(), *links.ladder]
        return [plan, *(plan.with_codec(codec) for codec in codecs)]

    def _channel(self, end: End, plan: Plan) -> Channel:
        """A new end of a channel, with its wire."""
        config, link = self.config, end.link(self.stage_id)
        seed = draw_word(config.seed, self.replica, link, end.direction == "gradients")
        return Channel(plan, link, end.direction, self.wires[end], seed, config.verify, config.compile)
