"""One rank's pipeline stage, whatever the host: its channel ends, its coin, its held batches.

A host's engine calls `begin_step`, then `send` and `receive` in the order of its schedule, then
`end_step`. Messages are counted per channel and step, which gives their slots.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from clapping_ds.channel import Channel, Spec
from clapping_ds.config import ClappingConfig
from clapping_ds.sampling import Coin, LazySampler
from clapping_ds.transport import Wire, all_agree

ACTIVATIONS_TO_NEXT = "activations to next"
ACTIVATIONS_FROM_PREVIOUS = "activations from previous"
GRADIENTS_TO_PREVIOUS = "gradients to previous"
GRADIENTS_FROM_NEXT = "gradients from next"


class Stage:
    """Channel ends and lazy sampling of one rank.

    previous_rank, next_rank   global rank of the neighbouring stage; None at the pipeline's ends
    replica                    number of this pipeline among its data-parallel replicas
    """

    def __init__(
        self,
        config: ClappingConfig,
        stage_id: int,
        previous_rank: int | None,
        next_rank: int | None,
        device: torch.device,
        replica: int = 0,
    ) -> None:
        # Configuration
        self.coin = Coin(config.p_new, config.refresh, config.seed)
        self.device = device
        self.channels: dict[str, Channel] = {}
        if next_rank is not None:
            self._connect(config, stage_id, next_rank, replica, ACTIVATIONS_TO_NEXT, GRADIENTS_FROM_NEXT)
        if previous_rank is not None:
            link, ends = stage_id - 1, (ACTIVATIONS_FROM_PREVIOUS, GRADIENTS_TO_PREVIOUS)
            self._connect(config, link, previous_rank, replica, *ends)
        # State
        self.sampler = LazySampler()
        self.step = 0
        self.fresh: list[bool] = []
        self.shapes_differ = False
        self._num_messages: Counter[str] = Counter()

    def begin_step(
        self, num_slots: int, next_batch: Callable[[], Any] | None, measures_error: bool = False
    ) -> None:
        """Tosses the coin and draws the new batches. A collective of all ranks when a slot is fresh.

        next_batch   returns the data iterator's next batch; None on stages that load no data
        Raises StopIteration on every rank if `next_batch` did on one. No message was sent then, and
        what was drawn is used when the step is tried again.
        """
        fresh = self.coin.fresh(self.step, num_slots)
        fresh = [is_fresh or slot >= len(self.fresh) for slot, is_fresh in enumerate(fresh)]
        has_data = True
        if next_batch is not None:
            try:
                self.sampler.draw(fresh, next_batch)
            except StopIteration:
                has_data = False
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
            self.sampler.begin(num_slots)
        self.fresh = fresh
        self._num_messages.clear()
        for channel in self.channels.values():
            channel.begin_step(self.step, num_slots, measures_error)

    def end_step(self) -> None:
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Step, held batches, memories and codec states of this rank, between two steps."""
        channels = {end: channel.state_dict() for end, channel in self.channels.items()}
        return {
            "step": self.step,
            "fresh": self.fresh,
            "shapes_differ": self.shapes_differ,
            "sampler": self.sampler.state_dict(),
            "channels": channels,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Takes what `state_dict` gave, if every rank has it; else forgets: the next step is all fresh.
        A collective of all ranks."""
        (all_have_it,) = all_agree([state is not None], self.device)
        if state is None or not all_have_it:
            self.fresh = []
            return
        self.step, self.fresh, self.shapes_differ = state["step"], state["fresh"], state["shapes_differ"]
        self.sampler.load_state_dict(state["sampler"])
        for end, channel in self.channels.items():
            channel.load_state_dict(state["channels"][end])

    def send(self, end: str, values: Sequence[torch.Tensor]) -> None:
        """Sends the tensors of the end's next slot."""
        slot = self._next_slot(end)
        self.channels[end].send(slot, self.fresh[slot], values)

    def receive(self, end: str, specs: Sequence[Spec]) -> list[torch.Tensor]:
        """The tensors of the end's next slot."""
        slot = self._next_slot(end)
        return self.channels[end].receive(slot, self.fresh[slot], specs)

    def _connect(
        self, config: ClappingConfig, link: int, peer: int, replica: int, activations: str, gradients: str
    ) -> None:
        """The two channel ends of a link."""
        wire = Wire(peer, self.device)
        self.channels[activations] = Channel(config, link, "activations", wire, replica)
        self.channels[gradients] = Channel(config, link, "gradients", wire, replica)

    def _next_slot(self, end: str) -> int:
        slot = self._num_messages[end]
        self._num_messages[end] += 1
        return slot
