"""A pipeline's links in one process: the package's own channels between the blocks of a whole model.

What a stage would get from its neighbour is what its blocks compute with here, so losses are those of real
ranks, as many as there are, on a machine that has no room for them.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from benchmarks.codecs.peers import Peer
from clapping_ds.config import ClappingConfig
from clapping_ds.link.channel import Channel
from clapping_ds.link.message import Spec
from clapping_ds.link.seeds import draw_word
from clapping_ds.streams import SideStream

CPU = torch.device("cpu")


class LocalWire:
    """Both ends of one direction of one link: messages are handed over."""

    device = CPU

    def __init__(self) -> None:
        self.side = SideStream(CPU)
        self._payloads: deque[torch.Tensor] = deque()

    def working(self, after_compute: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def new_payload(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, payload: torch.Tensor) -> None:
        self._payloads.append(payload)

    def expect(self, num_bytes: int) -> None:
        """Nothing has to be announced."""

    def receive(self) -> torch.Tensor:
        return self._payloads.popleft()

    def done_with(self, payload: torch.Tensor) -> None:
        """Payloads are not used again."""

    def drain(self) -> None:
        """Nothing is on its way."""


class Direction:
    """One direction of one link, with both its ends."""

    def __init__(self, config: ClappingConfig, link: int, direction: str) -> None:
        wire, plan = LocalWire(), config.plan(direction)
        seed = draw_word(config.seed, 0, link, direction == "gradients")  # as an endpoint's, of replica 0
        self.sender, self.receiver = (Channel(plan, link, direction, wire, seed) for _ in range(2))

    def begin_step(self, step: int, num_slots: int, entry: int) -> None:
        for end in (self.sender, self.receiver):
            end.begin_step(step, num_slots, entry=entry)

    def carry(self, slot: int, fresh: bool, value: torch.Tensor) -> torch.Tensor:
        """What arrives of a value."""
        self.sender.send(slot, fresh, [value])
        self.receiver.expect(slot, fresh, [Spec.of(value)])
        return self.receiver.receive()[0]


class Link(torch.autograd.Function):
    """Hidden states cross it in the forward pass, their gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, links: "Links", number: int) -> torch.Tensor:
        ctx.links, ctx.number, ctx.slot = links, number, links.slot
        return links.carry("activations", number, links.slot, value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.links.carry("gradients", ctx.number, ctx.slot, gradient), None, None


class Links:
    """All links of a pipeline.

    blocks   of the configuration: the "clapping" block of each link
    peer     another's quantiser, of activations and gradients, in place of the codecs of the blocks
    """

    def __init__(self, *blocks: Mapping[str, Any], peer: Peer | None = None) -> None:
        configs = [ClappingConfig.from_ds_config({"clapping": block}) for block in blocks]
        self.config = configs[0]
        self.peer = peer
        self.directions = {
            (name, link): Direction(config, link, name)
            for name in ("activations", "gradients")
            for link, config in enumerate(configs)
        }
        self.fresh: Sequence[bool] = ()
        self.slot = 0
        """Of the micro-batch that is computed."""
        self.codec_s = 0.0
        """That this thread's core spent on both ends of all messages."""

    def begin_step(self, step: int, fresh: Sequence[bool], entry: int = 0) -> None:
        """fresh: by slot. entry: of the pool."""
        self.fresh = fresh
        for direction in self.directions.values():
            direction.begin_step(step, len(fresh), entry)

    def carry(self, direction: str, link: int, slot: int, value: torch.Tensor) -> torch.Tensor:
        """What arrives of a value at the other end."""
        start_s = time.thread_time()
        if self.peer is None:
            arrived = self.directions[direction, link].carry(slot, self.fresh[slot], value)
        else:
            arrived = self.peer.decode(self.peer.encode(value), value)
        self.codec_s += time.thread_time() - start_s
        return arrived

    @contextmanager
    def behind(self, blocks: Sequence[torch.nn.Module]) -> Iterator[None]:
        """While inside, what these blocks put out crosses the links, one each."""
        handles = [
            block.register_forward_hook(lambda _, __, out, link=link: Link.apply(out, self, link))
            for link, block in enumerate(blocks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def bits_per_value(self) -> float:
        """Sent so far, mean of both directions."""
        if self.peer is not None:
            return self.peer.bits
        traffics = [direction.sender.traffic for direction in self.directions.values()]
        num_values = sum(traffic.raw_bytes for traffic in traffics) / 4
        return 8 * sum(traffic.payload_bytes for traffic in traffics) / num_values

    @property
    def memory_nbytes(self) -> int:
        """Held at all ends."""
        ends = (end for each in self.directions.values() for end in (each.sender, each.receiver))
        return sum(end.memory_nbytes for end in ends)
