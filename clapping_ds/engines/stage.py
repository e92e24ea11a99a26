"""One rank's pipeline stage, whatever the host: its channel ends, its coin, its held batches.

A host's engine calls `begin_step`, then `send` and `receive` in the order of its schedule, then
`end_step`. Messages are counted per channel and step, which gives their slots.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from clapping_ds.channel import Channel
from clapping_ds.config import ClappingConfig
from clapping_ds.engines.peers import Peer
from clapping_ds.links import Decision
from clapping_ds.message import Spec
from clapping_ds.sampling import Coin, LazySampler
from clapping_ds.transport import Wire, all_agree

ACTIVATIONS_TO_NEXT = "activations to next"
ACTIVATIONS_FROM_PREVIOUS = "activations from previous"
GRADIENTS_TO_PREVIOUS = "gradients to previous"
GRADIENTS_FROM_NEXT = "gradients from next"
ACTIVATIONS = (ACTIVATIONS_TO_NEXT, ACTIVATIONS_FROM_PREVIOUS)
SENDING_ENDS = (ACTIVATIONS_TO_NEXT, GRADIENTS_TO_PREVIOUS)


class Stage:
    """Channel ends and lazy sampling of one rank.

    peers     the neighbours of this rank's stages, as `make_peers` gives them
    replica   number of this pipeline among its data-parallel replicas
    """

    def __init__(
        self,
        config: ClappingConfig,
        stage_id: int,
        peers: Mapping[tuple[int, int], Peer],
        device: torch.device,
        replica: int = 0,
    ) -> None:
        # Configuration
        self.config = config
        self.stage_id = stage_id
        self.replica = replica
        self.coin = Coin(config.p_new, config.refresh, config.seed)
        self.device = device
        self.in_flight = 0 if config.in_flight == "auto" else config.in_flight
        self.wires: dict[str, Wire] = {}
        previous, following = (peers.get((stage_id, stage_id + step)) for step in (-1, 1))
        if previous is not None:
            self.wires[ACTIVATIONS_FROM_PREVIOUS] = self._wire(previous.rank, previous.activations)
            self.wires[GRADIENTS_TO_PREVIOUS] = self._wire(previous.rank, previous.gradients)
        if following is not None:
            self.wires[ACTIVATIONS_TO_NEXT] = self._wire(following.rank, following.activations)
            self.wires[GRADIENTS_FROM_NEXT] = self._wire(following.rank, following.gradients)
        self.channels = {end: self._channel(end, config) for end in self.wires}
        # State
        self.sampler = LazySampler()
        self.step = 0
        self.num_drawn = 0
        """Batches that the finished steps took from each data iterator; a resumed run skips as many."""
        self.fresh: list[bool] = []
        self.shapes_differ = False
        self.loss_scale = 1.0
        self.decision: Decision | None = None
        self._num_messages: Counter[str] = Counter()
        self._num_expected: Counter[str] = Counter()

    def draw(self, num_slots: int, next_batch: Callable[[], Any] | None) -> bool:
        """Draws what the coming step lacks; whether all was there. `begin_step` does so as well."""
        if next_batch is not None:
            try:
                self.sampler.draw(self._tossed(num_slots), next_batch)
            except StopIteration:
                return False
        return True

    def begin_step(
        self,
        num_slots: int,
        next_batch: Callable[[], Any] | None,
        measures_error: bool = False,
        has_data: bool = True,
    ) -> None:
        """Tosses the coin and draws the new batches. A collective of all ranks when a slot is fresh.

        next_batch   returns the data iterator's next batch; None on stages that load no data
        has_data     whether all that this rank needs besides was there
        Raises StopIteration on every rank if `next_batch` did on one. No message was sent then, and
        what was drawn is used when the step is tried again.
        """
        fresh = self._tossed(num_slots)
        has_data = self.draw(num_slots, next_batch) and has_data
        if any(fresh):
            shapes_are_one = len(self.sampler.shapes()) <= 1
            has_data, shapes_are_one = all_agree([has_data, shapes_are_one], self.device)
            self.shapes_differ = not shapes_are_one
        if not has_data:
            raise StopIteration(
                f"data_iter ended in step {self.step}, which needs {sum(fresh)} new micro-batches on "
                "each rank that loads data; accepted: an iterator that holds them, or that repeats "
                "(deepspeed.utils.RepeatingLoader). Nothing of this step was trained or lost."
            )
        if next_batch is not None:
            self.sampler.begin(fresh)
        self.fresh = fresh
        self._num_messages.clear()
        self._num_expected.clear()
        for channel in self.channels.values():
            channel.begin_step(self.step, num_slots, measures_error)

    def _tossed(self, num_slots: int) -> list[bool]:
        """For each slot of the coming step, whether it is fresh."""
        fresh = self.coin.fresh(self.step, num_slots)
        return [is_fresh or slot >= len(self.fresh) for slot, is_fresh in enumerate(fresh)]

    def end_step(self) -> None:
        """Waits until the step's last messages have gone."""
        for channel in self.channels.values():
            channel.end_step()
        self.step += 1
        self.num_drawn += sum(self.fresh)

    def adopt(self, decision: Decision) -> None:
        """Between two steps: the decided depth and, with `links`, codecs. Channels whose codec changes
        start with no memory."""
        self.decision = decision
        self.in_flight = decision.in_flight
        for end, channel in self.channels.items():
            self.wires[end].most_pending = decision.in_flight + 1
            if self.config.links is not None:
                config = decision.config(self.config, channel.link, channel.direction)
                new = self._channel(end, config)
                if (new.key, new.delta) != (channel.key, channel.delta):
                    new.traffic = channel.traffic
                    self.channels[end] = new

    def send(self, end: str, values: Sequence[torch.Tensor]) -> None:
        """Sends the tensors of the end's next slot."""
        slot = self._num_messages[end]
        self._num_messages[end] += 1
        self.channels[end].send(slot, self.fresh[slot], values)

    def expect(self, end: str, specs: Sequence[Spec], num_messages: int) -> None:
        """Announces an end's messages, so that up to `num_messages` besides those received are announced.
        They have the specs `specs`."""
        last = min(self._num_messages[end] + num_messages, len(self.fresh))
        for slot in range(self._num_expected[end], last):
            self.channels[end].expect(slot, self.fresh[slot], specs)
            self._num_expected[end] += 1

    def receive(self, end: str, specs: Sequence[Spec], looks_ahead: bool) -> list[torch.Tensor]:
        """The tensors of the end's next slot. looks_ahead: the messages after it have the same specs, so
        that they can arrive while this one is used."""
        self.expect(end, specs, self.num_ahead if looks_ahead else 1)
        self._num_messages[end] += 1
        return self.channels[end].receive()

    def at_next(self, end: str) -> AbstractContextManager[None]:
        """Within it, errors of the end's wire name its link, direction, step and next slot."""
        return self.channels[end].at(self._num_messages[end])

    @property
    def num_ahead(self) -> int:
        """Messages of a direction that are announced at the same time."""
        return self.in_flight + 2 if self.config.overlap else 1

    def rescale_gradients(self, scale: float) -> None:
        """Between two steps: the loss scale of the next one. What is held of gradients follows it."""
        if scale != self.loss_scale:
            for end in (GRADIENTS_TO_PREVIOUS, GRADIENTS_FROM_NEXT):
                if end in self.channels:
                    self.channels[end].rescale(scale / self.loss_scale)
        self.loss_scale = scale

    def state_dict(self) -> dict[str, Any]:
        """Step, held batches, memories, codec states, counters and decided links of this rank, between
        two steps."""
        return {
            "written by": self._identity(len(self.fresh)),
            "step": self.step,
            "num_drawn": self.num_drawn,
            "fresh": self.fresh,
            "shapes_differ": self.shapes_differ,
            "loss_scale": self.loss_scale,
            "decision": None if self.decision is None else self.decision.model_dump_json(),
            "sampler": self.sampler.state_dict(),
            "channels": {end: channel.state_dict() for end, channel in self.channels.items()},
        }

    def load_state_dict(self, state: dict[str, Any] | None, num_slots: int) -> str | None:
        """Takes what `state_dict` gave, if every rank has it, from the same configuration; else forgets
        what is held, so that the next step is all fresh, and says why. A collective of all ranks.

        num_slots   micro-batches of the steps to come
        """
        self.num_drawn = 0 if state is None else state["num_drawn"]
        is_ours = state is not None and state["written by"] == self._identity(num_slots)
        is_there, is_ours = all_agree([state is not None, is_ours], self.device)
        if state is None or not is_ours:
            self.forget()
            if not is_there:
                return "the checkpoint has no state of clapping_ds for every rank"
            return "the checkpoint is of another configuration, number of micro-batches, stages or ranks"
        self.decision = None
        self.channels = {end: self._channel(end, self.config) for end in self.wires}
        if state["decision"] is not None:
            self.adopt(Decision.model_validate_json(state["decision"]))
        self.step, self.fresh, self.shapes_differ = state["step"], state["fresh"], state["shapes_differ"]
        self.loss_scale = state["loss_scale"]
        self.sampler.load_state_dict(state["sampler"])
        for end, channel in self.channels.items():
            channel.load_state_dict(state["channels"][end])
        return None

    def forget(self) -> None:
        """Forgets what is held: the next step is all fresh."""
        self.fresh = []
        self.sampler = LazySampler()
        for channel in self.channels.values():
            channel.held.clear()

    def _identity(self, num_slots: int) -> dict[str, Any]:
        """What a state belongs to."""
        codecs = {"strategy", "p_new", "refresh", "seed", "activations", "gradients", "memory"}
        return {
            **self.config.model_dump(include=codecs),
            "stage": self.stage_id,
            "replica": self.replica,
            "ends": sorted(self.channels),
            "slots": num_slots,
        }

    def _wire(self, peer: int, group: Any) -> Wire:
        return Wire(peer, self.device, group, self.in_flight + 1, self.config.overlap)

    def _channel(self, end: str, config: ClappingConfig) -> Channel:
        """A new channel end with its wire."""
        link = self.stage_id if end in (ACTIVATIONS_TO_NEXT, GRADIENTS_FROM_NEXT) else self.stage_id - 1
        direction = "activations" if end in ACTIVATIONS else "gradients"
        return Channel(config, link, direction, self.wires[end], self.replica)
