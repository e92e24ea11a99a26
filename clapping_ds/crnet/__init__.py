"""CR-Net (arXiv 2509.18993): a Llama-like model of low-rank differences between layers, with recomputation
that keeps little, and a form whose pipeline links carry one tensor.

    model = crnet.build(crnet.CRNetConfig(**crnet.SIZES["60M"]))                      # a torch module
    layers = crnet.list_parts(config, num_stages=2)                                  # for pipelines
"""

from typing import Any, NamedTuple

from torch import nn

from clapping_ds.crnet.config import POSITIONS, SIZES, CRNetConfig
from clapping_ds.crnet.initialize import fit_residuals
from clapping_ds.crnet.model import CRLayer, CRLinear, Embedding, Head
from clapping_ds.crnet.recompute import Segment


class Part(NamedTuple):
    """A layer of a pipeline, not yet made."""

    kind: type[nn.Module]
    arguments: tuple[Any, ...]

    def make(self) -> nn.Module:
        return self.kind(*self.arguments)


def list_parts(config: CRNetConfig, num_stages: int = 1) -> list[Part]:
    """Embedding, segments, head: each takes what the one before gives. Every stage has equally many segments.

    num_stages   of the pipeline: with anchor "stage" the first layer of each is full rank
    Raises ValueError where the segments cannot be spread evenly.
    """
    anchors = frozenset(config.find_anchors(num_stages))
    starts = range(0, config.num_layers, config.checkpoint_every)
    segments = []
    for first in starts:
        after = first + config.checkpoint_every
        gives_outputs = after < config.num_layers and after not in anchors
        segments.append(Part(Segment, (config, first, anchors, gives_outputs)))
    return [Part(Embedding, (config,)), *segments, Part(Head, (config,))]


def build(config: CRNetConfig, num_stages: int = 1) -> nn.Sequential:
    """The whole model as one module: tokens (int64 [batch, tokens]) to logits. As `list_parts`."""
    return nn.Sequential(*(part.make() for part in list_parts(config, num_stages)))


__all__ = [
    "POSITIONS",
    "SIZES",
    "CRLayer",
    "CRLinear",
    "CRNetConfig",
    "Embedding",
    "Head",
    "Part",
    "Segment",
    "build",
    "fit_residuals",
    "list_parts",
]
