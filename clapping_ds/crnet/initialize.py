"""A start for b from the data: how much of each map's output its layer before's would explain."""

import torch
from torch import nn

from clapping_ds.crnet.config import POSITIONS
from clapping_ds.crnet.model import Embedding, Outputs
from clapping_ds.crnet.recompute import Segment

SMALLEST = 1e-3
"""Of a start: from zero b would not move."""


@torch.no_grad()
def fit_residuals(model: nn.Sequential, tokens_BT: torch.Tensor) -> None:
    """Sets every b to the least-squares <x A B, Y> / <Y, Y>, Y the output of the same map in the layer
    before. Of new weights, which know nothing of each other, that is what chance gives.

    model    as `build` makes it: the whole model
    tokens   a probe batch, int64
    """
    embedding, *segments, _ = model
    assert isinstance(embedding, Embedding)
    x, before = embedding(tokens_BT), None
    for segment in segments:
        assert isinstance(segment, Segment)
        for layer in segment.list_layers():
            if layer.is_anchor:
                before = None
            if before is not None:
                _, alone, _ = layer(x, None)
                for name, y, y_before in zip(POSITIONS, alone, before, strict=True):
                    residual = layer.find_map(name).residual
                    assert residual is not None
                    fit = (y.float() * y_before.float()).sum() / y_before.float().square().sum()
                    residual.fill_(torch.where(fit.abs() < SMALLEST, SMALLEST, fit))
            x, found, _ = layer(x, before)
            before = Outputs(*found)
