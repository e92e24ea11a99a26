"""What a training step of the published sizes keeps and computes, counted on fake tensors: nothing is timed.

    python -m benchmarks.training.crnet_costs [--sizes 130M 1B 7B]

The layers alone, without embeddings, head and optimizer, in bf16, 16 samples of 256 tokens.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.files import RESULTS, write_results
from clapping_ds import crnet
from clapping_ds.crnet import CRLayer, CRNetConfig
from clapping_ds.report import format_table

NUM_SAMPLES, LENGTH = 16, 256
GB = 1e9


class Checkpointed(nn.Module):
    """Modules in a row, each run again in the backward pass: torch's activation checkpointing."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, given: Any) -> Any:
        for part in self.parts:
            given = checkpoint(part, given, use_reentrant=False)
        return given


class FullRank(nn.Module):
    """A layer of the full-rank model."""

    def __init__(self, config: CRNetConfig) -> None:
        super().__init__()
        self.layer = CRLayer(config, 0, is_anchor=True)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.layer(x_BTD, None)[0]


def full_rank(config: CRNetConfig) -> list[nn.Module]:
    return [FullRank(config) for _ in range(config.num_layers)]


def segments(config: CRNetConfig) -> list[nn.Module]:
    return [part.make() for part in crnet.list_parts(config)[1:-1]]


def in_a_row(modules: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*modules)


FORMS: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., nn.Module], dict[str, Any]]] = {
    ("full rank", "none"): (full_rank, in_a_row, {}),
    ("full rank", "checkpoint every layer"): (full_rank, Checkpointed, {}),
    ("CR-Net", "none"): (segments, in_a_row, {}),
    ("CR-Net", "checkpoint every segment"): (segments, Checkpointed, {}),
    ("CR-Net", "forward"): (segments, in_a_row, {"recompute": "forward"}),
    ("CR-Net", "inverse"): (segments, in_a_row, {"recompute": "inverse", "largest_growth": math.inf}),
}
"""By model and recomputation: its layers, how they run, and options of the configuration."""


def measure(size: str, form: tuple[str, str]) -> dict[str, Any]:
    make, run, options = FORMS[form]
    config = CRNetConfig(
        **crnet.SIZES[size], checkpoint_every=4 if crnet.SIZES[size]["num_layers"] % 8 else 8, **options
    )
    with FakeTensorMode(), set_default_dtype(torch.bfloat16):
        layers = run(make(config))
        x = torch.empty(NUM_SAMPLES, LENGTH, config.width, requires_grad=True)
        tracker = MemTracker()
        tracker.track_external(layers, x)
        with tracker:
            y = layers(x)
            kept = count_bytes(tracker, "current")
            y.backward(torch.empty_like(y))
        peak = count_bytes(tracker, "peak")
        del y
        with FlopCounterMode(display=False) as counter:  # by itself: it keeps tensors alive
            layers(x).backward(torch.empty_like(x))
    parameters = sum(each.numel() for each in layers.parameters())
    kept -= 2 * parameters
    return {
        "size": size, "model": form[0], "recompute": form[1], "segment": config.checkpoint_every,
        "parameters": parameters, "kept GB": round(kept / GB, 2),
        "kept values per token and layer / width": round(kept / 2 / x.numel() / config.num_layers, 2),
        "peak GB": round(peak / GB, 2), "TFLOPs of a step": round(counter.get_total_flops() / 1e12, 2),
    }  # fmt: skip


@contextmanager
def set_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def count_bytes(tracker: MemTracker, when: str) -> int:
    """Of all tensors: weights, their gradients, what is kept, what lives for a moment."""
    (found,) = tracker.get_tracker_snapshot(when).values()
    return found["Total"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(crnet.SIZES), default=["130M", "1B", "7B"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        rows += [measure(size, form) for form in FORMS]
        print(format_table(rows[-len(FORMS) :]), flush=True)
    write_results(options.results / "crnet_costs", rows, {"samples": NUM_SAMPLES, "tokens": LENGTH})


if __name__ == "__main__":
    main()
