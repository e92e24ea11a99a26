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


class Parts(nn.Sequential):
    """Parts in a row. Takes one tensor, or a tuple, or the tensors of a tuple one by one, as
    torch.distributed.pipelining hands them over."""

    def forward(self, *given: Any) -> Any:
        return super().forward(given if len(given) > 1 else given[0])


def build(config: CRNetConfig, num_stages: int = 1) -> Parts:
    """The whole model as one module: tokens (int64 [batch, tokens]) to logits. As `list_parts`."""
    return Parts(*(part.make() for part in list_parts(config, num_stages)))


def build_stage(config: CRNetConfig, stage: int, num_stages: int) -> Parts:
    """One stage of a pipeline as a module, for torch.distributed.pipelining. As `list_parts`.

    stage   from 0; the first has the embedding, the last the head
    """
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage = {stage} of {num_stages}; accepted: 0 to {num_stages - 1}")
    embedding, *segments, head = list_parts(config, num_stages)
    size = len(segments) // num_stages
    mine = segments[stage * size : (stage + 1) * size]
    if stage == 0:
        mine.insert(0, embedding)
    if stage == num_stages - 1:
        mine.append(head)
    return Parts(*(part.make() for part in mine))


__all__ = [
    "POSITIONS",
    "SIZES",
    "CRLayer",
    "CRLinear",
    "CRNetConfig",
    "Embedding",
    "Head",
    "Part",
    "Parts",
    "Segment",
    "build",
    "build_stage",
    "fit_residuals",
    "list_parts",
]
