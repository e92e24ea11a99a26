"""Segments of layers that keep little for the backward pass.

Of each layer its x and the seven products x A are kept, and the outputs once per segment: those before its
first layer, or of that layer if it is an anchor (`forward`), or of its last layer (`inverse`). In the
backward pass the others are rebuilt,

    forward     Y_l     = b Y_(l-1) + (x_l A_l) B_l          the same operations: the same bits
    inverse     Y_(l-1) = (Y_l - (x_l A_l) B_l) / b          each step divides the rounding error by |b|

then each layer runs again by itself, from its last to its first, for its gradients; of low-rank maps whose
outputs were rebuilt nothing is multiplied again. `forward` rebuilds the outputs of a whole segment first;
`inverse` those of one layer at a time. Hooks may watch maps, but not change what they give: rebuilding does
not call them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from clapping_ds.crnet.config import POSITIONS, CRNetConfig
from clapping_ds.crnet.model import NUM_OUTPUTS, CRLayer, Outputs, Products

Kept = list[torch.Tensor | None]
Autocast = tuple[str, bool, torch.dtype]
"""Of a device: its kind, whether it is on, and to what it casts."""


class Segment(nn.Module):
    """Consecutive layers. Takes x, and the seven outputs before unless its first layer is an anchor; gives x,
    and the seven outputs unless what comes next is an anchor or no layer."""

    def __init__(self, config: CRNetConfig, first: int, anchors: frozenset[int], gives_outputs: bool) -> None:
        super().__init__()
        numbers = range(first, first + config.checkpoint_every)
        self.layers = nn.ModuleList(CRLayer(config, number, number in anchors) for number in numbers)
        self.recompute = config.recompute
        self.largest_growth = config.largest_growth
        self.gives_outputs = gives_outputs

    def list_layers(self) -> list[CRLayer]:
        return cast(list[CRLayer], list(self.layers))

    def forward(self, given: torch.Tensor | tuple[torch.Tensor, ...]) -> Any:
        x, *before = given if isinstance(given, tuple) else (given,)
        expected = 0 if self.list_layers()[0].is_anchor else NUM_OUTPUTS
        if len(before) != expected:
            raise ValueError(
                f"a segment was given {1 + len(before)} tensors; accepted: {1 + expected}, x"
                f"{' and the seven outputs of the layer before' if expected else ', as it begins anew'}"
            )
        if self.recompute is None or not torch.is_grad_enabled():
            outputs = Outputs(*before) if before else None
            for layer in self.list_layers():
                x, outputs, _ = layer(x, outputs)
            assert outputs is not None
            return (x, *outputs) if self.gives_outputs else x
        if self.recompute == "inverse" and self.largest_growth < math.inf:
            self._check_growth()
        result = self._run_rebuilt(x, before)
        return result if self.gives_outputs else result[0]

    @torch.compiler.disable
    def _run_rebuilt(self, x: torch.Tensor, before: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Not compiled: the backward pass repeats these very operations."""
        return Rebuilt.apply(self, len(before), x, *before, *self.parameters())

    @torch.no_grad()
    def _check_growth(self) -> None:
        """Raises ValueError where inverting a segment multiplies errors by more than is allowed."""
        inverted = [layer for layer in self.list_layers() if not layer.is_anchor]
        if not inverted:
            return
        factors = [layer.find_map(name).factor for layer in inverted for name in POSITIONS]
        steps = -torch.stack(factors).float().abs().log().view(len(inverted), -1)
        run = most = steps[0]
        for step in steps[1:]:  # of all runs of consecutive layers, the largest
            run = step + run.clamp(min=0)
            most = torch.maximum(most, run)
        growth = most.exp()
        worst = int(growth.argmax())
        if not growth[worst] <= self.largest_growth:
            raise ValueError(
                f"recompute = 'inverse' with 1 / |b| of {POSITIONS[worst]} multiplied up to "
                f"{float(growth[worst]):.3g} over {len(inverted)} layers; accepted: at most largest_growth = "
                f"{self.largest_growth:g}, a shorter segment, or recompute = 'forward'"
            )


class Rebuilt(torch.autograd.Function):
    """A segment's forward pass, of which little is kept."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, num_before: int, *tensors: torch.Tensor) -> Any:
        x, before = tensors[0], tensors[1 : 1 + num_before]
        outputs = Outputs(*before) if before else None
        kept: Kept = []
        anchored: Sequence[torch.Tensor] = before
        for number, layer in enumerate(segment.list_layers()):
            kept.append(x)
            x, outputs, products = layer(x, outputs)
            kept += products
            if number == 0 and layer.is_anchor:
                anchored = outputs
        assert outputs is not None
        ctx.segment, ctx.num_before = segment, num_before
        ctx.versions = _find_versions(segment)
        ctx.set_materialize_grads(False)
        is_inverse = segment.recompute == "inverse"
        ctx.save_for_backward(*kept, *(outputs if is_inverse else anchored))
        ctx.autocast = _find_autocast(x.device.type)
        return (x, *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        if ctx.versions != _find_versions(ctx.segment):
            raise RuntimeError("a weight was changed in place between a segment's forward and backward pass")
        layers, saved = ctx.segment.list_layers(), ctx.saved_tensors
        size = 1 + NUM_OUTPUTS
        kept = saved[: size * len(layers)]
        xs, products = kept[::size], [kept[n * size + 1 : (n + 1) * size] for n in range(len(layers))]
        rebuilt = _rebuild(ctx.segment, Outputs(*(y.detach() for y in saved[size * len(layers) :])), products)
        of_parameters: dict[nn.Parameter, torch.Tensor | None] = dict.fromkeys(ctx.segment.parameters())
        for layer, x, of_layer in reversed(list(zip(layers, xs, products, strict=True))):
            with _like(ctx.autocast), torch.no_grad():
                before, known = next(rebuilt)
            gradients, of_own = _find_gradients(layer, x, before, of_layer, known, gradients, ctx.autocast)
            for parameter, found in zip(layer.parameters(), of_own, strict=True):
                others = of_parameters[parameter]
                of_parameters[parameter] = found if others is None or found is None else others + found
        return None, None, *gradients[: 1 + ctx.num_before], *of_parameters.values()


def _find_versions(segment: Segment) -> list[int]:
    """Of weights: how often each was changed in place."""
    return [parameter._version for parameter in segment.parameters()]


Gradients = tuple[torch.Tensor | None, ...]


def _find_gradients(
    layer: CRLayer, x: torch.Tensor, before: Outputs | None, products: Products, known: Outputs | None,
    of_results: Gradients, autocast: Autocast | None,
) -> tuple[Gradients, list[torch.Tensor | None]]:  # fmt: skip
    """Runs a layer again. Returns the gradients of x and the outputs before (None for an anchor), and of
    the parameters."""
    given = [each.detach().requires_grad_(True) for each in (x, *(before or ()))]
    # Copies of the parameters, or their hooks would run here and once more outside.
    own = {name: p.detach().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    with _like(autocast), torch.enable_grad():
        arguments = given[0], Outputs(*given[1:]) if before else None, products, known
        result, found, _ = functional_call(layer, own, arguments)
    pairs = zip((result, *found), of_results, strict=True)
    roots, of_roots = zip(*(pair for pair in pairs if pair[1] is not None), strict=True)
    torch.autograd.backward(roots, of_roots)  # all leaves are copies; `grad` would forbid hooks
    of_given = tuple(each.grad for each in given) + (None,) * (1 + NUM_OUTPUTS - len(given))
    return of_given, [each.grad for each in own.values()]


def _rebuild(
    segment: Segment, kept: Outputs, products: Sequence[Sequence[torch.Tensor | None]]
) -> Iterator[tuple[Outputs | None, Outputs | None]]:
    """For each layer, from the last to the first: the outputs before it (None before an anchor), and its own
    (None where they are not known). kept: before the first layer, or of that if it is an anchor; with
    `inverse` of the last layer."""
    pairs = list(zip(segment.list_layers(), products, strict=True))
    if segment.recompute == "inverse":
        for layer, of_layer in reversed(pairs):
            before = None if layer.is_anchor else _apply("invert", layer, kept, of_layer)
            yield before, kept
            kept = before or kept
        return
    outputs: list[Outputs | None] = [None, kept] if pairs[0][0].is_anchor else [kept]
    for layer, of_layer in pairs[len(outputs) - 1 : -1]:
        kept = _apply("rebuild", layer, kept, of_layer)
        outputs.append(kept)
    own = outputs.pop() if len(outputs) > len(pairs) else None
    while outputs:
        before = outputs.pop()
        yield before, own
        own = before


def _apply(step: str, layer: CRLayer, outputs: Outputs, products: Sequence[torch.Tensor | None]) -> Outputs:
    return Outputs(*(
        getattr(layer.find_map(name), step)(y, product)
        for name, y, product in zip(POSITIONS, outputs, products, strict=True)
    ))  # fmt: skip


def _find_autocast(device: str) -> Autocast | None:
    if not torch.amp.is_autocast_available(device):
        return None
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _like(found: Autocast | None) -> Any:
    if found is None:
        return nullcontext()
    device, is_enabled, dtype = found
    return torch.autocast(device, dtype=dtype, enabled=is_enabled)
