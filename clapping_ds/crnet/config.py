"""The size and form of a CR-Net, and the published ones."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from clapping_ds.codecs.base import STRICT, list_to_tuple

POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""Of linear maps in a layer, in the order in which they run."""


class CRNetConfig(BaseModel):
    """A Llama-like model whose layers send each other low-rank differences."""

    model_config = STRICT

    vocabulary: Annotated[int, Field(ge=1)] = 32000
    """Different tokens."""
    width: Annotated[int, Field(ge=2)] = 512
    """Values per token between two layers."""
    intermediate: Annotated[int, Field(ge=1)] = 1376
    """Values per token inside the gated MLP."""
    num_layers: Annotated[int, Field(ge=2)] = 8
    num_heads: Annotated[int, Field(ge=1)] = 8
    """Of attention; they share the width."""
    rank: Annotated[int | tuple[int, ...], BeforeValidator(list_to_tuple)] = 128
    """Of the low-rank maps: one for all layers, or one per layer (an anchor's is not used)."""
    anchor: Literal["model", "stage"] = "model"
    """Which layers are full rank: the first of the model, or the first of each stage, so that one tensor
    crosses a link."""
    first_layer: Literal["full", "low_rank"] = "full"
    """Of anchors. `low_rank`: no better (section 4 of the paper); for comparisons."""
    residual: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What every b starts at; not 0, where it would stay."""
    low_rank_gain: Annotated[float, Field(gt=0)] | None = None
    """What the first values of every B are multiplied with where a layer adds to the one before. None: 1 /
    num_layers, so that all layers start as the first one. 1: as CoLA starts its maps; the outputs grow with
    depth then, and attention starts one-hot."""
    recompute: Literal["forward", "inverse"] | None = None
    """How outputs are rebuilt in the backward pass: from the last kept ones on, with the same bits, or back
    from the next kept ones, which multiplies errors by 1 / |b|. None: all are kept."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 4
    """Layers of a segment: a layer of a pipeline. Outputs between two segments are kept."""
    largest_growth: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 4.0
    """With `inverse`: the product of 1 / |b| over consecutive layers of a segment above which it is
    refused. inf: it never is."""
    rope_base: Annotated[float, Field(gt=0)] = 10000.0
    """Of the rotary embedding."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"width = {self.width} with num_heads = {self.num_heads}; accepted: a width of an even "
                "number of values per head"
            )
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        if isinstance(self.rank, tuple) and len(self.rank) != self.num_layers:
            raise ValueError(
                f"rank = {list(self.rank)} with num_layers = {self.num_layers}; accepted: a number, or one "
                "for each layer"
            )
        largest = min(self.width, self.intermediate)
        for rank in ranks:
            if not 1 <= rank <= largest:
                raise ValueError(f"rank = {rank}; accepted: 1 to {largest}, the narrowest map")
        if self.residual == 0:
            raise ValueError("residual = 0, from which no b could go; accepted: another number")
        if self.num_layers % self.checkpoint_every:
            raise ValueError(
                f"checkpoint_every = {self.checkpoint_every} with num_layers = {self.num_layers}; accepted: "
                "a divisor of it"
            )
        return self

    def rank_of(self, layer: int) -> int:
        return self.rank[layer] if isinstance(self.rank, tuple) else self.rank

    @property
    def gain(self) -> float:
        """Of B where a layer adds to the one before."""
        return 1 / self.num_layers if self.low_rank_gain is None else self.low_rank_gain

    def sides(self, position: str) -> tuple[int, int]:
        """Values that a linear map takes, and gives, per token."""
        if position == "down":
            return self.intermediate, self.width
        return self.width, self.intermediate if position in ("gate", "up") else self.width

    def find_anchors(self, num_stages: int) -> set[int]:
        """The layers without a layer before, on so many stages of equally many segments. Raises ValueError
        where that cannot be."""
        num_segments = self.num_layers // self.checkpoint_every
        if num_stages < 1 or num_segments % num_stages:
            raise ValueError(
                f"{num_stages} stages with {num_segments} segments of checkpoint_every = "
                f"{self.checkpoint_every} layers; accepted: a divisor of the number of segments"
            )
        if self.anchor == "model":
            return {0}
        return set(range(0, self.num_layers, self.num_layers // num_stages))


def _size(width: int, intermediate: int, num_layers: int, num_heads: int, rank: int) -> Mapping[str, Any]:
    return {
        "width": width, "intermediate": intermediate, "num_layers": num_layers, "num_heads": num_heads,
        "rank": rank,
    }  # fmt: skip


SIZES: Mapping[str, Mapping[str, Any]] = {
    "60M": _size(512, 1376, 8, 8, 128),
    "130M": _size(768, 2048, 12, 12, 192),
    "350M": _size(1024, 2736, 24, 16, 256),
    "1B": _size(2048, 5461, 24, 32, 448),
    "7B": _size(4096, 11008, 32, 32, 512),
}
"""Keys of `CRNetConfig` by the paper's names. Ranks of 1B and 7B are the paper's; below it is a quarter of
the width."""
