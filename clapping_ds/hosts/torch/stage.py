"""torch.distributed.pipelining: a `PipelineStage` whose messages go through channels.

Within `ClappingPipeline.step` the tensors that the stock stage would hand to torch's sends go into
channels, and what channels receive takes the place of the stock stage's receive buffers. All else is the
stock stage's: the exchange of shapes before the first step, local passing between neighbouring stages of
one rank (V schedules; nothing is compressed there), `schedule.eval`, and `schedule.step` called directly.

Sends do not wait, so that no order of work can deadlock that does not with torch's own messages. The payloads
of a whole step are held at once for that; the stock stage holds a receive buffer per micro-batch, too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from packaging.version import Version
from torch.distributed.pipelining import PipelineStage

from clapping_ds.link.message import Spec
from clapping_ds.stage.endpoint import (
    ACTIVATIONS_FROM_PREVIOUS,
    ACTIVATIONS_TO_NEXT,
    GRADIENTS_FROM_NEXT,
    GRADIENTS_TO_PREVIOUS,
    End,
    Endpoint,
)

TESTED = ("2.13",)

if ".".join(map(str, Version(torch.__version__).release[:2])) not in TESTED:
    raise ImportError(
        f"torch {torch.__version__}: clapping_ds.hosts.torch takes the place of parts of "
        f"PipelineStage that differ between versions of torch; tested with torch {', '.join(TESTED)}"
    )


class ClappingStage(PipelineStage):
    """A `PipelineStage`, of the same arguments. Stock, but within `ClappingPipeline.step`."""

    endpoint: Endpoint | None = None
    """This stage's channels, within a step. None: messages go torch's own way."""

    def begin_step(self, endpoint: Endpoint, orders: Mapping[End, Sequence[int]]) -> None:
        """Starts a step whose messages go through channels. orders: for each end that may receive, the
        micro-batches as the peer sends them."""
        self.endpoint = endpoint
        endpoint.order.update(orders)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """As the stock stage's; what it would receive is announced to the channel."""
        if self.endpoint is None:
            return super().get_fwd_recv_ops(fwd_chunk_id)
        self._expect(self.endpoint, ACTIVATIONS_FROM_PREVIOUS, fwd_chunk_id)
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        """As the stock stage's; what it would receive is announced to the channel."""
        if self.endpoint is None:
            return super().get_bwd_recv_ops(bwd_chunk_id)
        self._expect(self.endpoint, GRADIENTS_FROM_NEXT, bwd_chunk_id)
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        """As the stock stage's, of which all is sent through the channel."""
        return self._sent(ACTIVATIONS_TO_NEXT, fwd_chunk_id, super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        """As the stock stage's, of which all is sent through the channel."""
        return self._sent(GRADIENTS_TO_PREVIOUS, bwd_chunk_id, super().get_bwd_send_ops(bwd_chunk_id))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """As the stock stage's, with the activations that the channel received."""
        if self.endpoint is not None:
            self._receive(self.endpoint, ACTIVATIONS_FROM_PREVIOUS, fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """As the stock stage's, with the gradients that the channel received."""
        if self.endpoint is not None:
            self._receive(self.endpoint, GRADIENTS_FROM_NEXT, bwd_chunk_id)
        return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def _sent(self, end: End, slot: int, operations: list[Any]) -> list[Any]:
        """The stock stage's operations, or none once their tensors have gone another way."""
        if self.endpoint is None or not operations:
            return operations
        values = [operation.tensor for operation in operations]
        self.endpoint.send(end, values, slot)
        return []

    def _expect(self, endpoint: Endpoint, end: End, slot: int) -> None:
        """Announces a message where the stock stage would. The order of a step's messages is the peer's."""
        buffered = self._buffered(end, slot) if end in endpoint.channels else []
        if buffered:
            specs = [Spec.of(info.buffer) for info in buffered]
            endpoint.look_ahead(end, specs)
            endpoint.expect(end, specs, endpoint.order[end].index(slot))

    def _receive(self, endpoint: Endpoint, end: End, slot: int) -> None:
        """Puts the end's next message where the stock stage looks for it."""
        buffered = self._buffered(end, slot) if end in endpoint.channels else []
        if not buffered:
            return
        due = endpoint.next_slot(end)
        if due != slot:
            raise ValueError(
                f"stage {self.stage_index} needs the {end} for micro-batch {slot}, where {due} is next; "
                "accepted: a schedule that uses micro-batches in the order in which they are sent"
            )
        values = endpoint.receive(end, [Spec.of(info.buffer) for info in buffered])
        for info, value in zip(buffered, values, strict=True):
            info.buffer = value

    def _buffered(self, end: End, slot: int) -> list[Any]:
        """Those of a micro-batch's tensors that the stock stage would receive."""
        infos = self.args_recv_info if end == ACTIVATIONS_FROM_PREVIOUS else self.grad_recv_info
        return [info for info in infos.get(slot, ()) if not info.is_root_arg and info.buffer is not None]
