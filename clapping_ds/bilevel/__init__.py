"""Decentralized bilevel optimization over sites that talk to neighbours only: SPARKLE (arXiv 2411.14166) and
D-SOBA (2402.03167), with compressed messages."""

from clapping_ds.bilevel.curvature import Autograd, CentralDifference, Curvature, Directions, Penalty
from clapping_ds.bilevel.gossip import Gossip, LocalGossip, RankGossip
from clapping_ds.bilevel.mixture import DomainLoss, Mixture, adam_scales, align
from clapping_ds.bilevel.modules import flatten
from clapping_ds.bilevel.solver import Losses, Plan, Sparkle
from clapping_ds.bilevel.strategies import NAMED, General
from clapping_ds.bilevel.topology import Topology, exponential, from_edges, full, make_lazy, ring, torus

__all__ = [
    "NAMED",
    "Autograd",
    "CentralDifference",
    "Curvature",
    "Directions",
    "DomainLoss",
    "General",
    "Gossip",
    "LocalGossip",
    "Losses",
    "Mixture",
    "Penalty",
    "Plan",
    "RankGossip",
    "Sparkle",
    "Topology",
    "adam_scales",
    "align",
    "exponential",
    "flatten",
    "from_edges",
    "full",
    "make_lazy",
    "ring",
    "torus",
]
