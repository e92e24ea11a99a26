"""CR-Net against other ways to spend the same parameters: byte-level Llama-like models from scratch.

    python -m benchmarks.training.crnet [--seeds 1 2 3] [--only NAME ...]

Eight layers of width 128 on the Python standard library's sources. All but `full rank` have the same number
of parameters in their layers, as near as whole ranks and heads allow. `CoLA` (arXiv 2502.10940) is written
here from its paper: B silu(A x) in place of every linear map. What `crnet.csv` has is not measured again.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.files import RESULTS, compare_losses, provenance, write_json
from benchmarks.training.finetune import add_missing
from clapping_ds import crnet
from clapping_ds.crnet import CRLayer, CRLinear, CRNetConfig, counts
from clapping_ds.report import format_table
from launch.data import Windows, tokens
from launch.trainer import Training, learning_rate_schedule, optimizer

SIZE = {"width": 128, "intermediate": 344, "num_layers": 8, "num_heads": 4, "checkpoint_every": 2}
BUDGET = 1_000_000
"""Parameters of all layers, without norms."""
LENGTH, NUM_SAMPLES, NUM_HELD_OUT = 128, 16, 5
XAVIER = (2 * SIZE["width"]) ** -0.5


@dataclass(frozen=True)
class Model:
    """What is trained."""

    kind: str
    """`full rank`, `low rank`, `CoLA`, `CR-Net`."""
    num_stages: int = 1
    """With an anchor each."""
    first_layer: str = "full"
    residual: float = 1.0
    gain: float | None = None
    """Of B at the start."""
    fits: bool = False
    """Whether b starts from the data."""
    rate: float = 2e-3
    """Learning rate: the best of 1e-3, 2e-3 and 4e-3 with one seed."""
    std: float = 0.02
    """Of full-rank weights at the start."""
    size: Mapping[str, int] = field(default_factory=lambda: SIZE)


MODELS = {
    "full rank": Model("full rank", std=XAVIER),
    "full rank, std 0.02": Model("full rank"),
    "full rank, narrower": Model("full rank", std=XAVIER, size={**SIZE, "width": 104, "intermediate": 256}),
    "low rank": Model("low rank", first_layer="low_rank"),
    "CoLA": Model("CoLA", first_layer="low_rank", rate=4e-3),
    "CR-Net": Model("CR-Net"),
    "CR-Net, b from 0.5": Model("CR-Net", residual=0.5),
    "CR-Net, b by least squares": Model("CR-Net", gain=1.0, fits=True),
    "CR-Net, B as CoLA's": Model("CR-Net", gain=1.0),
    "CR-Net, B by 1 / sqrt(L)": Model("CR-Net", gain=SIZE["num_layers"] ** -0.5),
    "CR-Net, low-rank first layer": Model("CR-Net", first_layer="low_rank"),
    "CR-Net, 2 stages with anchors": Model("CR-Net", num_stages=2),
    "CR-Net, 4 stages with anchors": Model("CR-Net", num_stages=4),
}


class Cola(nn.Module):
    """B silu(A x), called as a `CRLinear`."""

    def __init__(self, num_in: int, num_out: int, rank: int) -> None:
        super().__init__()
        std = rank**-0.25 * (num_in + num_out) ** -0.25
        self.a_DR = nn.Parameter(torch.randn(num_in, rank) * std)
        self.b_RD = nn.Parameter(torch.randn(rank, num_out) * std)

    def forward(self, x: torch.Tensor, *nothing: None) -> tuple[torch.Tensor, None]:
        return F.silu(x @ self.a_DR) @ self.b_RD, None


class Plain(nn.Module):
    """Layers without a layer before, full rank or low rank; or CoLA's."""

    def __init__(self, config: CRNetConfig, is_cola: bool) -> None:
        super().__init__()
        self.embedding = crnet.Embedding(config)
        self.layers = nn.ModuleList(CRLayer(config, n, is_anchor=True) for n in range(config.num_layers))
        self.head = crnet.Head(config)
        for layer in self.layers if is_cola else ():
            layer.maps = nn.ModuleDict({
                name: Cola(*config.sides(name), config.rank_of(0)) for name in crnet.POSITIONS
            })  # fmt: skip

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens_BT)
        for layer in self.layers:
            x, _, _ = layer(x, None)
        return self.head(x)


def find_rank(model: Model) -> int:
    """The largest that keeps to the budget."""
    h, f, num_layers = (model.size[key] for key in ("width", "intermediate", "num_layers"))
    full, per_rank = 4 * h * h + 3 * h * f, 11 * h + 3 * f
    num_full = model.num_stages if model.first_layer == "full" else 0
    return (BUDGET - num_full * full) // ((num_layers - num_full) * per_rank)


def make(model: Model, vocabulary: int) -> tuple[nn.Module, CRNetConfig]:
    config = CRNetConfig.model_validate({
        **model.size, "vocabulary": vocabulary, "residual": model.residual, "low_rank_gain": model.gain,
        "rank": find_rank(model) if model.kind != "full rank" else 1,
        "anchor": "stage" if model.num_stages > 1 else "model",
        "first_layer": model.first_layer,
    })  # fmt: skip
    if model.kind == "CR-Net":
        return crnet.build(config, model.num_stages), config
    plain = Plain(config, model.kind == "CoLA")
    for each in plain.modules():
        if isinstance(each, CRLinear) and each.rank is None:
            nn.init.normal_(each.weight, std=model.std)
    return plain, config


def measure(name: str, seed: int) -> list[dict[str, Any]]:
    """One line of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = MODELS[name]
    training = Training(learning_rate=model.rate)
    corpus, vocabulary = tokens(None)
    module, config = make(model, vocabulary)
    adam = optimizer(module, training)
    schedule = learning_rate_schedule(adam, training)
    windows = Windows(corpus, LENGTH, NUM_SAMPLES, validation=False).batches(seed)
    held_out = list(islice(Windows(corpus, LENGTH, NUM_SAMPLES, validation=True).batches(1), NUM_HELD_OUT))
    if model.fits:
        assert isinstance(module, nn.Sequential)
        crnet.fit_residuals(module, next(Windows(corpus, LENGTH, 4, validation=False).batches(seed))[0])
    losses = []
    for ids, labels in islice(windows, training.steps):
        loss = find_loss(module(ids), labels)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        validation = mean(float(find_loss(module(ids), labels)) for ids, labels in held_out)
    in_maps = sum(each.numel() for each in module.parameters() if each.dim() > 1)
    in_maps -= 2 * vocabulary * config.width
    crosses = config.width
    if model.kind == "CR-Net" and model.num_stages == 1:
        crosses = 6 * config.width + 2 * config.intermediate
    return [{
        "model": name, "seed": seed, "rank": config.rank if model.kind != "full rank" else config.width,
        "parameters of layers": in_maps,
        "linear FLOPs per token": 2 * in_maps,
        "values per token on a link": crosses, "steps": training.steps,
        "kept per token and layer": round(find_kept(config, model.num_stages), 1)
                                    if model.kind == "CR-Net" else "-",
        "training loss": round(mean(losses[-16:]), 4), "loss": round(validation, 4),
    }]  # fmt: skip


def find_loss(logits_BTV: torch.Tensor, label_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), label_BT.flatten())


def find_kept(config: CRNetConfig, num_stages: int) -> float:
    """Values that segments keep with recomputation, per token and layer."""
    anchors = config.find_anchors(num_stages)
    starts = range(0, config.num_layers, config.checkpoint_every)
    return sum(counts.count_kept(config, first, first in anchors) for first in starts) / config.num_layers


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By model: the mean over seeds, and its difference to CR-Net's with the same seed."""
    base = {int(row["seed"]): float(row["loss"]) for row in rows if row["model"] == "CR-Net"}
    found = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        more = [float(row["loss"]) - base[int(row["seed"])] for row in mine if int(row["seed"]) in base]
        found.append({
            **{key: mine[0][key] for key in mine[0] if key not in ("seed", "training loss", "loss")},
            **compare_losses([float(row["loss"]) for row in mine], more, "CR-Net"),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=list(MODELS), help="names of models")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    target = options.results / "crnet.csv"
    rows = add_missing(measure, "model", options.only, options.seeds, target, options.processes)
    write_json(target.with_suffix(".json"), {**provenance(), "size": SIZE, "budget": BUDGET})
    print(format_table(summarize(rows)))


if __name__ == "__main__":
    main()
