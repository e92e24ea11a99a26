"""Directions of a site for a problem of two levels,

    min over x of the mean of f_i(x, y*(x)),        y*(x) = argmin over y of the mean of g_i(x, y)

at x, y and z, the third level, which stands for (H_yy g)^-1 grad_y f:

    v = grad_y g        p = H_yy g z - grad_y f        u = grad_x f - H_xy g z             of y, z and x

Shapes: all of one dimension. `f` and `g` are a site's losses on a mini-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of x and y, to a scalar that autograd can differentiate."""


class Directions(NamedTuple):
    """Where x, y and z go against."""

    x: torch.Tensor
    y: torch.Tensor
    z: torch.Tensor


class Curvature(Protocol):
    """How second derivatives are found, or done without."""

    def start(self, y: torch.Tensor) -> torch.Tensor:
        """The first z."""

    def find(self, f: Loss, g: Loss, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Directions: ...


@dataclass(frozen=True)
class Autograd:
    """Exact, by differentiating gradients. Not with operations that torch can only differentiate once, as
    its fused attention."""

    def start(self, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(y)

    def find(self, f: Loss, g: Loss, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Directions:
        f_x, f_y = _gradients(f, x, y)
        x, y = _leaf(x), _leaf(y)
        g_y = _or_zero(torch.autograd.grad(g(x, y), y, create_graph=True, allow_unused=True)[0], y)
        mixed: torch.Tensor | None = None
        product: torch.Tensor | None = None
        if g_y.requires_grad:  # else g is linear
            mixed, product = torch.autograd.grad(g_y @ z, (x, y), allow_unused=True)
        return Directions(f_x - _or_zero(mixed, x), g_y.detach(), _or_zero(product, y) - f_y)


@dataclass(frozen=True)
class CentralDifference:
    """First derivatives alone: H z from the gradients at y + radius z / |z| and y - radius z / |z|. Off by
    radius^2 |z| / 6 times the third derivative along z / |z|, and by rounding errors over the radius. Three
    backward passes of g, and one of f, on the same mini-batch.
    """

    radius: float | None = None
    """How far from y; None: |y|, or 1 if that is more, times the cube root of the dtype's rounding error."""

    def __post_init__(self) -> None:
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius = {self.radius}; accepted: a number above zero, or None")

    def start(self, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(y)

    def find(self, f: Loss, g: Loss, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Directions:
        f_x, f_y = _gradients(f, x, y)
        _, g_y = _gradients(g, x, y)
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        length = float(wide.norm())
        if not length > 0:
            return Directions(f_x, g_y, -f_y)
        reach = max(1.0, float(y.to(wide.dtype).norm()))
        radius = self.radius or reach * torch.finfo(y.dtype).eps ** (1 / 3)
        offset = (wide * (radius / length)).to(y.dtype)
        ahead_x, ahead_y = _gradients(g, x, y + offset)
        behind_x, behind_y = _gradients(g, x, y - offset)
        scale = length / (2 * radius)
        return Directions(f_x - scale * (ahead_x - behind_x), g_y, scale * (ahead_y - behind_y) - f_y)


@dataclass(frozen=True)
class Penalty:
    """First derivatives alone, and no products: z is a second solution, of f + factor g, and

        u = grad_x f(x, z) + factor (grad_x g(x, z) - grad_x g(x, y))

    off by the order of 1 / factor. The step size of z must be below 1 / factor. (arXiv 2309.01753)
    """

    factor: float

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"factor = {self.factor}; accepted: a number above zero")

    def start(self, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    def find(self, f: Loss, g: Loss, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Directions:
        f_x, f_z = _gradients(f, x, z)
        of_z_x, of_z = _gradients(g, x, z)
        of_y_x, of_y = _gradients(g, x, y)
        return Directions(f_x + self.factor * (of_z_x - of_y_x), of_y, f_z + self.factor * of_z)


def _gradients(loss: Loss, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x and of y."""
    x, y = _leaf(x), _leaf(y)
    value = loss(x, y)
    if value.dim() or not value.requires_grad:
        lacks = "" if value.requires_grad else " that depends on neither x nor y"
        raise ValueError(f"a loss of shape {tuple(value.shape)}{lacks}; accepted: a scalar of x and y")
    of_x, of_y = torch.autograd.grad(value, (x, y), allow_unused=True)
    return _or_zero(of_x, x), _or_zero(of_y, y)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(True)


def _or_zero(gradient: torch.Tensor | None, of: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(of) if gradient is None else gradient
