"""A module's parameters as one vector, as solvers have them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


def flatten(module: nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    """(its parameters in one vector, a function of such a vector and of the module's own arguments).

    Gradients flow to the vector. Buffers are the module's. Raises ValueError where parameters differ in dtype
    or device.
    """
    parameters = dict(module.named_parameters())
    kinds = {(each.dtype, each.device) for each in parameters.values()}
    if len(kinds) != 1:
        raise ValueError(f"parameters of {sorted(map(str, kinds))}; accepted: one dtype on one device")
    sizes = [each.numel() for each in parameters.values()]

    def call(vector: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        parts = {
            name: part.view_as(parameter)
            for (name, parameter), part in zip(parameters.items(), vector.split(sizes), strict=True)
        }
        return functional_call(module, parts, arguments, options)

    return torch.cat([each.detach().flatten() for each in parameters.values()]), call
