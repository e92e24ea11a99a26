"""torch.distributed.pipelining: a `PipelineStage` whose messages go through channels.

Within `ClappingPipeline.step` the tensors that the stock stage would hand to torch's sends go into
channels, and what channels receive takes the place of the stock stage's receive buffers. All else is the
stock stage's: the exchange of shapes before the first step, local passing between neighbouring stages of
one rank (V schedules; nothing is compressed there), `schedule.eval`, and `schedule.step` called directly.

All messages of a step are announced when the step starts, and sends do not wait, so that no order of work
can deadlock that does not with torch's own messages. The payloads of a whole step are held at once for
that; the stock stage holds a receive buffer per micro-batch, too.
"""

from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage

from clapping_ds.channel import Spec
from clapping_ds.engines.stage import (
    ACTIVATIONS_FROM_PREVIOUS,
    ACTIVATIONS_TO_NEXT,
    GRADIENTS_FROM_NEXT,
    GRADIENTS_TO_PREVIOUS,
    Stage,
)

TESTED = ("2.13",)

if torch.__version__.rpartition(".")[0] not in TESTED:
    raise ImportError(
        f"torch {torch.__version__}: clapping_ds.engines.torch_pipelining takes the place of parts of "
        f"PipelineStage that differ between versions of torch; tested with torch {', '.join(TESTED)}"
    )


class ClappingStage(PipelineStage):
    """A `PipelineStage`, of the same arguments. Stock, but within `ClappingPipeline.step`."""

    clapping: Stage | None = None
    """The ends of this stage's channels, within a compressed step."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """As the stock stage's; none for what was announced to channels."""
        if self.clapping is None:
            return super().get_fwd_recv_ops(fwd_chunk_id)
        self._announce(self.clapping)
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        """As the stock stage's; none for what was announced to channels."""
        return super().get_bwd_recv_ops(bwd_chunk_id) if self.clapping is None else []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        """As the stock stage's, of which all is sent through the channel."""
        return self._sent(ACTIVATIONS_TO_NEXT, super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        """As the stock stage's, of which all is sent through the channel."""
        return self._sent(GRADIENTS_TO_PREVIOUS, super().get_bwd_send_ops(bwd_chunk_id))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """As the stock stage's, with the activations that the channel received."""
        if self.clapping is not None:
            self._announce(self.clapping)
            self._receive(self.clapping, ACTIVATIONS_FROM_PREVIOUS, self.args_recv_info, fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """As the stock stage's, with the gradients that the channel received."""
        if self.clapping is not None:
            self._receive(self.clapping, GRADIENTS_FROM_NEXT, self.grad_recv_info, bwd_chunk_id)
        return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def _announce(self, ends: Stage) -> None:
        """Announces the messages of the step, once."""
        for end, infos in (
            (ACTIVATIONS_FROM_PREVIOUS, self.args_recv_info),
            (GRADIENTS_FROM_NEXT, self.grad_recv_info),
        ):
            buffered = _buffered(infos, 0) if end in ends.channels else []
            if buffered:
                ends.expect(end, [Spec.of(info.buffer) for info in buffered], len(infos))

    def _sent(self, end: str, operations: list[Any]) -> list[Any]:
        if self.clapping is None or not operations:
            return operations
        self.clapping.send(end, [operation.tensor for operation in operations])
        return []

    def _receive(self, ends: Stage, end: str, infos: dict[int, Any], micro_batch: int) -> None:
        """Puts the end's next message where the stock stage looks for it."""
        buffered = _buffered(infos, micro_batch) if end in ends.channels else []
        if buffered:
            specs = [Spec.of(info.buffer) for info in buffered]
            for info, value in zip(buffered, ends.receive(end, specs, looks_ahead=False), strict=True):
                info.buffer = value


def _buffered(infos: dict[int, Any], micro_batch: int) -> list[Any]:
    """Those of a micro-batch's tensors that the stock stage would receive."""
    found = infos.get(micro_batch, ())
    return [info for info in found if not info.is_root_arg and info.buffer is not None]
