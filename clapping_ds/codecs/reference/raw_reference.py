"""The codec `none`: `clapping_ds.codecs.raw` in plain torch."""

import torch

from clapping_ds.codecs.base import ceil_div, limit
from clapping_ds.codecs.reference.numerics_reference import keep_, subtract_base

RUN = 16
"""Values that `copy_` keeps or leaves together: a run of 16 bytes or more, one access of the kernel."""


def copy_(source: torch.Tensor, target: torch.Tensor, memory: torch.Tensor) -> None:
    """target <- source; memory <- source in the runs that are finite."""
    target.copy_(source)
    value_GS, _, finite_G = subtract_base(source, None, ceil_div(source.numel(), RUN), RUN)
    bound = limit(source, memory)
    keep_(memory, value_GS.clamp(-bound, bound), finite_G)
