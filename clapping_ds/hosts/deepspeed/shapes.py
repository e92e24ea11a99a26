"""Shapes of activations: told to the next stage once, and again only while they may differ."""

from typing import Any

import torch

from clapping_ds.link.message import Spec
from clapping_ds.stage.endpoint import ACTIVATIONS_FROM_PREVIOUS, ACTIVATIONS_TO_NEXT

Tensors = torch.Tensor | tuple[torch.Tensor, ...]


def to_tuple(tensors: Tensors) -> tuple[torch.Tensor, ...]:
    return (tensors,) if isinstance(tensors, torch.Tensor) else tensors


def make_contiguous(tensors: Tensors) -> Tensors:
    """What the stock engine can send: no backend takes a view with gaps."""
    copies = tuple(tensor.contiguous() for tensor in to_tuple(tensors))
    return copies[0] if isinstance(tensors, torch.Tensor) else copies


class Shapes:
    """Of one engine's activations."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.sent: list[Spec] | None = None
        self.received: list[Spec] | None = None
        self.receives_tuple = False

    def forget(self) -> None:
        self.sent = self.received = None

    def are_told_each_time(self) -> bool:
        return bool(self.engine.dynamic_shape or self.engine._endpoints.shapes_differ)

    def tell(self, outputs: Tensors) -> None:
        """Before activations are sent. Raises ValueError if their shapes are known and other than now."""
        specs = [Spec.of(output) for output in to_tuple(outputs)]
        if self.sent is None or self.are_told_each_time():
            told = [[list(spec.shape), str(spec.dtype).removeprefix("torch.")] for spec in specs]
            self.engine._endpoint.tell(
                ACTIVATIONS_TO_NEXT, {"tuple": isinstance(outputs, tuple), "specs": told}
            )
        elif specs != self.sent:
            raise ValueError(
                f"stage {self.engine.stage_id}: activations changed from {self.sent} to {specs} while the "
                "batch kept its shape; accepted: PipelineModule(dynamic_shape=True), or "
                "engine.reset_activation_shape() on every rank before the step"
            )
        self.sent = specs

    def hear(self) -> list[Spec]:
        """Before activations are received."""
        if self.received is None or self.are_told_each_time():
            told = self.engine._endpoint.hear(ACTIVATIONS_FROM_PREVIOUS)
            self.receives_tuple = told["tuple"]
            self.received = [Spec(torch.Size(shape), getattr(torch, dtype)) for shape, dtype in told["specs"]]
        return self.received

    def known(self, specs: list[Spec] | None) -> list[Spec]:
        """`specs`, if all messages of the step will have them; else nothing."""
        return [] if specs is None or self.are_told_each_time() else specs
