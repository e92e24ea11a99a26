"""CR-Net: a Llama-like model whose layers send each other low-rank differences (arXiv 2509.18993).

For each linear map P of q, k, v, o, gate, up, down, in layer l with input X_l:

    first layer, or an anchor      Y_l = X_l W
    every other                    Y_l = sign(b) (|b| + 1e-6) Y_(l-1) + X_l A_l B_l     b: one number per map

Between two layers go x and the seven Y. Shapes: B batch, T tokens, D width, R rank, H heads, E of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from clapping_ds.crnet.config import POSITIONS, CRNetConfig

SMALLEST_RESIDUAL = 1e-6
NUM_OUTPUTS = len(POSITIONS)


class LowRank(torch.autograd.Function):
    """x A B, from x A where that is known. is_wanted: whether its value is; else zeros that take no room."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a_DR: torch.Tensor, b_RD: torch.Tensor, product: torch.Tensor | None,
        is_wanted: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if product is None:
            product = x @ a_DR
        ctx.save_for_backward(x, a_DR, b_RD, product)
        ctx.mark_non_differentiable(product)
        if is_wanted:
            return product @ b_RD, product
        return product.new_zeros(()).expand(*product.shape[:-1], b_RD.shape[1]), product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> Any:
        x, a_DR, b_RD, product = ctx.saved_tensors
        a_DR, b_RD = a_DR.to(product.dtype), b_RD.to(product.dtype)
        of_product = gradient @ b_RD.T
        of_a = x.flatten(0, -2).T.to(product.dtype) @ of_product.flatten(0, -2)
        of_b = product.flatten(0, -2).T @ gradient.flatten(0, -2)
        return of_product @ a_DR.T, of_a, of_b, None, None


class Known(torch.autograd.Function):
    """A value in place of another, whose gradients it gets: what that would have been."""

    @staticmethod
    def forward(ctx: Any, stand_in: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class CRLinear(nn.Module):
    """A linear map of full rank (rank None, or no output before), or a difference to the layer before's.

    x         [..., rows, num_in]
    y_before  [..., num_out], what the same map of the layer before gave; None for an anchor
    product   x A, where it is known
    known     y, where it is known and not of full rank: only gradients are found then
    Returns y [..., num_out], and x A; None of a map of full rank.
    """

    def __init__(
        self, num_in: int, num_out: int, rank: int | None, residual: float | None = 1.0, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.rank = rank
        self.residual = None if residual is None else nn.Parameter(torch.tensor([residual]))
        if rank is None:
            self.weight = nn.Parameter(torch.empty(num_out, num_in))
            nn.init.normal_(self.weight, std=0.02)
            return
        if rank > min(num_in, num_out):
            raise ValueError(f"rank = {rank}; accepted: at most {min(num_in, num_out)}, the narrower side")
        std = rank**-0.25 * (num_in + num_out) ** -0.25
        self.a_DR = nn.Parameter(torch.empty(num_in, rank))
        self.b_RD = nn.Parameter(torch.empty(rank, num_out))
        nn.init.normal_(self.a_DR, std=std)
        nn.init.normal_(self.b_RD, std=gain * std)

    @property
    def factor(self) -> torch.Tensor:
        """[1]: of the output before; never zero where b is not."""
        assert self.residual is not None
        return self.residual.sign() * (self.residual.abs() + SMALLEST_RESIDUAL)

    def forward(
        self,
        x: torch.Tensor,
        y_before: torch.Tensor | None = None,
        product: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.rank is None:
            return F.linear(x, self.weight), None
        y, product = LowRank.apply(x, self.a_DR, self.b_RD, product, known is None)
        if y_before is not None:
            y = self.add(y_before, y)
        return (y if known is None else Known.apply(y, known)), product

    def add(self, y_before: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
        return (self.factor.float() * y_before).to(difference.dtype) + difference

    def rebuild(self, y_before: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """The output again, without the input: the same bits."""
        return self.add(y_before, product @ self.b_RD)

    def invert(self, y: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """The output before, from this one: off by its rounding error divided by |b|."""
        return ((y - product @ self.b_RD) / self.factor.float()).to(y.dtype)


class Outputs(NamedTuple):
    """Of the seven maps of a layer."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


Products = Sequence[torch.Tensor | None]
"""x A of the seven maps."""


class CRLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    is_anchor   whether it has no layer before
    """

    def __init__(self, config: CRNetConfig, number: int, is_anchor: bool) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.rope_base = config.rope_base
        self.is_anchor = is_anchor
        rank = None if is_anchor and config.first_layer == "full" else config.rank_of(number)
        residual, gain = (None, 1.0) if is_anchor else (config.residual, config.gain)
        self.norm_attention = nn.RMSNorm(config.width, eps=1e-6)
        self.norm_mlp = nn.RMSNorm(config.width, eps=1e-6)
        self.maps = nn.ModuleDict({
            name: CRLinear(*config.sides(name), rank, residual, gain) for name in POSITIONS
        })  # fmt: skip

    def find_map(self, name: str) -> CRLinear:
        return cast(CRLinear, self.maps[name])

    def forward(
        self,
        x_BTD: torch.Tensor,
        before: Outputs | None,
        products: Products = (None,) * NUM_OUTPUTS,
        known: Outputs | None = None,
    ) -> tuple[torch.Tensor, Outputs, Products]:
        """products, known: of all maps, and the seven outputs, where they are known. Returns x, the outputs,
        and the products."""
        run = _Maps(self, before, products, known)
        normed = self.norm_attention(x_BTD)
        q, k, v = run("q", normed), run("k", normed), run("v", normed)
        o = run("o", self._attend(q, k, v))
        x_BTD = x_BTD + o
        normed = self.norm_mlp(x_BTD)
        gate, up = run("gate", normed), run("up", normed)
        down = run("down", F.silu(gate) * up)
        return x_BTD + down, Outputs(q, k, v, o, gate, up, down), run.products

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, length, width = q.shape
        q, k, v = (each.view(batch, length, self.num_heads, -1).transpose(1, 2) for each in (q, k, v))
        angle = _find_angles(length, q.shape[-1], self.rope_base, q.device)
        mixed = F.scaled_dot_product_attention(_rotate(q, angle), _rotate(k, angle), v, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, length, width)


class _Maps:
    """The seven maps of one layer, in the order in which they run."""

    def __init__(
        self, layer: CRLayer, before: Outputs | None, products: Products, known: Outputs | None
    ) -> None:
        nothing: Products = (None,) * NUM_OUTPUTS
        self.layer = layer
        self.given = zip(before or nothing, products, known or nothing, strict=True)
        self.products: list[torch.Tensor | None] = []

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y, product = self.layer.find_map(name)(x, *next(self.given))
        self.products.append(product)
        return y


def _find_angles(length: int, head: int, base: float, device: torch.device) -> torch.Tensor:
    """fp32 [T, head / 2]."""
    frequency = base ** -(torch.arange(0, head, 2, device=device, dtype=torch.float32) / head)
    return torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency


def _rotate(x_BHTE: torch.Tensor, angle_TE: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, of halves."""
    one, other = x_BHTE.float().chunk(2, -1)
    cos, sin = angle_TE.cos(), angle_TE.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1).to(x_BHTE.dtype)


class Embedding(nn.Embedding):
    """Tokens to x."""

    def __init__(self, config: CRNetConfig) -> None:
        super().__init__(config.vocabulary, config.width)
        nn.init.normal_(self.weight, std=0.02)


class Head(nn.Module):
    """What the last layer gives, to logits."""

    def __init__(self, config: CRNetConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.logits = nn.Linear(config.width, config.vocabulary, bias=False)
        nn.init.normal_(self.logits.weight, std=0.02)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.logits(self.norm(x_BTD))
