"""Megatron-Core on CPU ranks: the few places where it names CUDA are changed while it runs.

Only tests and benchmarks use this; Megatron-Core itself is for GPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from torch.overrides import TorchFunctionMode


class CpuForCuda(TorchFunctionMode):
    """What is asked to be on a GPU is on the CPU. Types of tensors have the names of a GPU's: optimizers know
    no others."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return args[0]
        result = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _no_tracker(seed: int, *options: Any, **more: Any) -> None:
    """In place of GPU random states by region: nothing here draws in a tensor-parallel region."""
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Around everything that Megatron-Core does."""
    with (
        CpuForCuda(),
        mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")),
        mock.patch("torch.cuda.current_stream"),
        mock.patch("torch.cuda.synchronize"),
        mock.patch("megatron.core.tensor_parallel.model_parallel_cuda_manual_seed", _no_tracker),
    ):
        yield
