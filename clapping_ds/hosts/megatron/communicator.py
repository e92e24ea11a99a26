"""The one method of Megatron-Core's `P2PCommunicator` in which all its sends and receives end.

Overriding `_communicate` is enough for every schedule, `overlap_p2p_comm` and `batch_p2p_comm` included. A
sent tensor is encoded before the call returns, so that `deallocate_pipeline_outputs` may free it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from clapping_ds.hosts.megatron.chunks import Chunks
from clapping_ds.hosts.megatron.core import P2PCommunicator
from clapping_ds.stage.endpoint import (
    ACTIVATIONS_FROM_PREVIOUS,
    ACTIVATIONS_TO_NEXT,
    GRADIENTS_FROM_NEXT,
    GRADIENTS_TO_PREVIOUS,
)

HANDLES = {
    ACTIVATIONS_TO_NEXT: "send_next",
    GRADIENTS_TO_PREVIOUS: "send_prev",
    ACTIVATIONS_FROM_PREVIOUS: "recv_prev",
    GRADIENTS_FROM_NEXT: "recv_next",
}


class Sent:
    """The handle of a send: there is nothing to wait for, since the tensor was encoded."""

    def wait(self) -> None:
        pass


class ClappingCommunicator(P2PCommunicator):
    """Of one training step: its messages go through the channels of `chunks`, which outlive it."""

    def __init__(self, pp_group: Any, config: Any, chunks: Chunks) -> None:
        super().__init__(pp_group, config)
        self.chunks = chunks

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Sequence[int] | None,
        wait_on_reqs: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[str, Any] | None]:
        """As `P2PCommunicator._communicate`. Sends do not wait for the peer, so that receives are announced
        after them: what arrives may depend on what is sent."""
        wanted = {ACTIVATIONS_FROM_PREVIOUS: recv_prev, GRADIENTS_FROM_NEXT: recv_next}
        values = {ACTIVATIONS_TO_NEXT: tensor_send_next, GRADIENTS_TO_PREVIOUS: tensor_send_prev}
        handles: dict[str, Any] = {}
        for end, value in values.items():
            if value is not None:
                self.chunks.send(end, value.detach())
                handles[HANDLES[end]] = Sent()
        arrivals = {end: self.chunks.arrival(end, tensor_shape) for end in wanted if wanted[end]}
        handles |= {HANDLES[end]: arrival for end, arrival in arrivals.items()}
        if wait_on_reqs:
            for arrival in arrivals.values():
                arrival.wait()
            if not self.chunks.overlaps:
                self.chunks.wait_for_sends()
        from_previous, from_next = (arrivals[end].tensor if end in arrivals else None for end in wanted)
        return from_previous, from_next, None if wait_on_reqs else handles
