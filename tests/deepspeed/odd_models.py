"""Models that pipelines trip over: frozen layers, adapters, odd tensors between stages. Imported by ranks.

Layers are built here, all on every rank, in one order from one seed; the pipeline keeps its share. `Helped`
makes of each a layer that computes the same and that the stock engine can train over several stages.
"""

from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from torch import nn

from clapping_ds.hosts.deepspeed.shapes import to_tuple
from tests import models
from tests.models import VOCABULARY, WIDTH, Embed, Mix


class LowRank(nn.Module):
    """LoRA (arXiv 2106.09685): a frozen linear layer, plus a trained product of two thin matrices."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(x))


def adapted(layer: nn.Module) -> nn.Module:
    """The layer with adapters beside its linear layers and nothing else that trains."""
    layer.requires_grad_(False)
    if isinstance(layer, nn.Linear):
        return LowRank(layer)
    for name, child in list(layer.named_children()):
        if isinstance(child, nn.Linear):
            setattr(layer, name, LowRank(child))
    return layer


class Turned(nn.Module):
    """A layer whose output is a transposed view, and whose input is one if it is floating."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.transpose(1, 2) if x.is_floating_point() else x).transpose(1, 2)


class TurnBack(nn.Module):
    """Undoes the turn that `Turned` gives to the last layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).transpose(1, 2)


class Empty(nn.Module):
    """Passes on (hidden, a float tensor without elements, an integer one without elements)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Any) -> tuple[torch.Tensor, ...]:
        if torch.is_tensor(inputs):
            hidden = self.layer(inputs)
            return hidden, hidden[:0], inputs[:, :0]
        hidden, empty, none = inputs
        return self.layer(hidden) + empty.sum() + none.sum(), empty * 2, none


class Masked(nn.Module):
    """Passes on a float mask that needs no gradient, first or last in the tuple.

    how   "passed": the mask that came in; "cut": what comes in is cut off from autograd; "unused": it is
          passed on and used by no layer; "made": each layer makes a new one
    """

    def __init__(self, layer: nn.Module, how: str, mask_first: bool) -> None:
        super().__init__()
        self.layer = layer
        self.how = how
        self.mask_first = mask_first

    def forward(self, inputs: Any) -> tuple[torch.Tensor, ...]:
        if torch.is_tensor(inputs):
            hidden, mask = self.layer(inputs), (inputs > 3).float()[..., None]
        else:
            hidden, mask = reversed(inputs) if self.mask_first else inputs
            mask = mask.detach() if self.how == "cut" else mask
            hidden = self.layer(hidden) if self.how == "unused" else self.layer(hidden) * mask
            mask = (hidden > 0).float() if self.how == "made" else mask
        return (mask, hidden) if self.mask_first else (hidden, mask)


class OneHot(nn.Module):
    """No parameters: a single tensor that needs no gradient."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(tokens, WIDTH).float()


class Pick(nn.Module):
    """A layer for one tensor of the tuple."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.layer = layer
        self.index = index

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.layer(inputs[self.index])


class Helped(nn.Module):
    """Stock wants a gradient for every floating tensor that one stage sends to another, and for a weight of
    each stage. The outputs of this layer ask for one, its inputs get one, zeros if need be, it has a weight
    that changes nothing, and what it sends is contiguous."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Any) -> Any:
        zero = 0 * self.nothing + sum(0 * x.sum() for x in to_tuple(inputs) if x.requires_grad)
        outputs = self.layer(inputs)
        helped = [x.contiguous() for x in to_tuple(outputs)]
        largest = max(range(len(helped)), key=lambda index: helped[index].numel())
        helped[largest] = helped[largest] + zero
        for x in helped:
            x.requires_grad_(x.is_floating_point())
        return tuple(helped) if isinstance(outputs, tuple) else helped[0]


def layers(kind: str) -> list[nn.Module]:
    """Eight layers: an embedding, six blocks, a head. Two stages have four each, four stages two each."""
    torch.manual_seed(7)
    first, *blocks, head = Embed(), *(Mix() for _ in range(6)), nn.Linear(WIDTH, VOCABULARY)
    name, *details = kind.split(":")
    if name == "turned":
        return [Turned(layer) for layer in (first, *blocks, TurnBack(head))]
    if name == "empty":
        return [Empty(first), *(Empty(block) for block in blocks), Pick(head, 0)]
    if name == "masked":
        how, place = details
        mask_first = place == "first"
        masked = [Masked(layer, how, mask_first) for layer in (first, *blocks)]
        return [*masked, Pick(head, int(mask_first))]
    if name == "frozen":
        found = [first, *blocks, head]
        for number in range(*map(int, details)):
            found[number].requires_grad_(False)
        return found
    if name == "adapters":
        start = int(details[0])
        found = [first, *blocks, head]
        for layer in found[:start]:
            layer.requires_grad_(False)
        return [*found[:start], *(adapted(layer) for layer in found[start:])]
    if name == "no parameters first":
        identity = [nn.Identity() for _ in range(int(details[0]) - 1)]
        return [OneHot(), *identity, *blocks[: 6 - len(identity)], head]
    raise ValueError(kind)


def start(
    layers: list[nn.Module], num_stages: int, clapping: Any, ds: Any = None, **module_options: Any
) -> Any:
    """An engine with four micro-batches; without a block the stock engine."""
    model = PipelineModule(
        layers, num_stages=num_stages, loss_fn=models._loss, partition_method="uniform", **module_options
    )
    config = {
        "train_micro_batch_size_per_gpu": models.BATCH, "gradient_accumulation_steps": 4,
        "steps_per_print": 1000, **(ds or {}),
    }  # fmt: skip
    if clapping is not None:
        config["clapping"] = clapping
    return models.start(model, config, stock=clapping is None)
