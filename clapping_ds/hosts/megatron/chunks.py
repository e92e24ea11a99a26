"""A rank's model chunks: a stage for each, and whose message comes next at each end.

With P pipeline ranks, chunk c of rank r is stage c * P + r of the pipeline. Megatron's schedules name no
chunk when they send and receive. They run the chunks in a fixed order, though, so counting the messages of
an end gives the chunk, and each stage counts its own messages, which gives the slot.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from clapping_ds.link.message import Spec
from clapping_ds.stage.endpoint import (
    ACTIVATIONS_FROM_PREVIOUS,
    ACTIVATIONS_TO_NEXT,
    GRADIENTS_FROM_NEXT,
    GRADIENTS_TO_PREVIOUS,
    End,
    Endpoint,
)


class Arrival:
    """A message on its way into `tensor`, which is empty until `wait` returns."""

    def __init__(
        self, tensor: torch.Tensor, take: Callable[[], torch.Tensor], before: "Arrival | None"
    ) -> None:
        self.tensor = tensor
        self._take: Callable[[], torch.Tensor] | None = take
        self._before = before

    def wait(self) -> None:
        """Messages of an end come in order: those before this one are waited for first."""
        if self._before is not None:
            self._before.wait()
        if self._take is not None:
            self.tensor.data = self._take()
        self._take = self._before = None


class Chunks:
    """The order in which the messages of a rank's stages, first chunk first, come within a step.

    rank, num_ranks   of the pipeline
    dtype             of all messages
    tells_shapes      each message is preceded by its shape; else all have the shape that the schedule names
    overlaps          False: what is sent has gone before the schedule goes on
    """

    def __init__(
        self,
        stages: Sequence[Endpoint],
        rank: int,
        num_ranks: int,
        dtype: torch.dtype,
        tells_shapes: bool,
        overlaps: bool = True,
    ) -> None:
        # Configuration
        self.stages = stages
        self.rank = rank
        self.num_ranks = num_ranks
        self.dtype = dtype
        self.tells_shapes = tells_shapes
        self.overlaps = overlaps
        # State
        self._turns: dict[End, Iterator[int]] = {}
        self._last: dict[tuple[int, End], Arrival] = {}
        self._num_asked: Counter[tuple[int, End]] = Counter()

    def begin_step(self, chunk_ids: Sequence[int]) -> None:
        """chunk_ids: the chunk of every forward pass of this rank, in order."""
        found = order_messages(chunk_ids, len(self.stages), self.rank, self.num_ranks)
        self._turns = {end: iter(order) for end, order in found.items()}
        self._last.clear()
        self._num_asked.clear()

    def send(self, end: End, value: torch.Tensor) -> None:
        """Sends an end's next message."""
        if value.dtype != self.dtype:
            raise ValueError(
                f"a tensor of {value.dtype} is sent with pipeline_dtype = {self.dtype}; accepted: the same"
            )
        stage = self._turn(end)
        if self.tells_shapes:
            stage.tell(end, list(value.shape))
        stage.send(end, [value])

    def arrival(self, end: End, shape: Sequence[int] | None) -> Arrival:
        """An end's next message, announced if its shape is known."""
        stage = self._turn(end)
        key = (stage.stage_id, end)
        specs = None if self.tells_shapes else [Spec(torch.Size(shape or ()), self.dtype)]
        if specs is not None:
            stage.look_ahead(end, specs)
        elif stage.queues:  # announced where stock would, or the peer's GPU may wait for this one's for ever
            specs = self._hear(stage, end)
        if specs is not None:
            stage.expect(end, specs, self._num_asked[key])
            self._num_asked[key] += 1
        tensor = torch.empty(0, dtype=self.dtype, device=stage.device, requires_grad=True)
        self._last[key] = Arrival(tensor, partial(self._take, stage, end, specs), self._last.get(key))
        return self._last[key]

    def wait_for_sends(self) -> None:
        """Waits until all that was sent has gone."""
        for stage in self.stages:
            stage.wait_for_sends()

    def _turn(self, end: End) -> Endpoint:
        """The stage whose message comes next at an end."""
        chunk = next(self._turns[end], None)
        if chunk is None:
            raise ValueError(
                f"rank {self.rank} of the pipeline, {end}: more messages than micro-batches and chunks; "
                "accepted: one tensor per micro-batch and direction"
            )
        return self.stages[chunk]

    def _take(self, stage: Endpoint, end: End, specs: Sequence[Spec] | None) -> torch.Tensor:
        """specs: None where the peer tells the shape, and has not yet been heard."""
        specs = specs or self._hear(stage, end)
        return stage.receive(end, specs, looks_ahead=not self.tells_shapes)[0]

    def _hear(self, stage: Endpoint, end: End) -> list[Spec]:
        return [Spec(torch.Size(stage.hear(end)), self.dtype)]


def order_messages(
    chunk_ids: Sequence[int], num_chunks: int, rank: int, num_ranks: int
) -> dict[End, list[int]]:
    """For each end, the chunk of each message of a step, in order. chunk_ids: see `Chunks.begin_step`.

    What the last rank sends on, the first rank receives for its next chunk, in the order in which the last
    rank sent it; all other messages stay within a chunk. Backward passes run the chunks from the last to
    the first.
    """
    last = num_chunks - 1
    forward, backward = list(chunk_ids), [last - chunk for chunk in chunk_ids]
    is_first, is_last = rank == 0, rank == num_ranks - 1
    return {
        ACTIVATIONS_TO_NEXT: [chunk for chunk in forward if not (is_last and chunk == last)],
        ACTIVATIONS_FROM_PREVIOUS: [c + 1 for c in forward if c != last] if is_first else forward,
        GRADIENTS_TO_PREVIOUS: [chunk for chunk in backward if not (is_first and chunk == 0)],
        GRADIENTS_FROM_NEXT: [c - 1 for c in backward if c != 0] if is_last else backward,
    }
