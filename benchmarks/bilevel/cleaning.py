"""Hyper-cleaning: which labels of scikit-learn's digits are wrong, found by sites that do not share data.

    python -m benchmarks.bilevel.cleaning [--seeds 1 2 3]

Each of eight sites has training samples, of which a share has wrong labels, and fewer validation samples,
whose labels are right. The lower level is a linear classifier, its loss the cross-entropy of the training
samples, each weighted by sigmoid(x_j); the upper level is x, one number per training sample, its loss that of
the validation samples. Most of a site's samples are of few digits. All sites lie in one process.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from benchmarks.bilevel.quadratic import NAMES, NUM_SITES, TOPOLOGIES
from benchmarks.files import RESULTS, new_figure, save_figure, write_results
from clapping_ds.bilevel import LocalGossip, Losses, Plan, Sparkle
from clapping_ds.codecs import AnyCodec, Eden, Raw
from clapping_ds.report import format_table

NUM_TRAIN, NUM_VALIDATION, NUM_CLASSES, NUM_PIXELS = 80, 40, 10, 64
SORTED_SHARE = 0.8
"""Of each site's samples, those that go to sites by their label."""
DECAY = 1e-3
NUM_STEPS, X_STEP = 300, 500.0
LOWER_STEPS = 1.0, 0.5, 0.25
"""Of y and z. At the first, strategies that mix before the direction is added are at the edge of what is
stable; each is to be judged by its best."""
STRIDE = 25
"""Steps between two points of a plot."""
Point = tuple[int, float, float]
"""Steps, MB sent per site, test loss."""


class Digits:
    """corrupted   share of training labels that are drawn anew"""

    def __init__(self, corrupted: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        images, labels = load_digits(return_X_y=True)
        images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        order = torch.randperm(len(labels), generator=generator)
        per_site = NUM_TRAIN + NUM_VALIDATION
        used, tested = order[: NUM_SITES * per_site], order[NUM_SITES * per_site :]
        num_sorted = int(SORTED_SHARE * len(used))
        by_label = used[:num_sorted][labels[used[:num_sorted]].argsort(stable=True)]
        sites = torch.cat([by_label.view(NUM_SITES, -1), used[num_sorted:].view(NUM_SITES, -1)], 1)
        sites = torch.stack([site[torch.randperm(per_site, generator=generator)] for site in sites])
        self.train, self.validation = sites[:, :NUM_TRAIN], sites[:, NUM_TRAIN:]
        self.images, self.labels, self.tested = images, labels, tested
        self.seen = labels[self.train].clone()
        drawn = torch.rand(self.train.shape, generator=generator) < corrupted
        shift = torch.randint(1, NUM_CLASSES, self.train.shape, generator=generator)
        self.seen[drawn] = (self.seen[drawn] + shift[drawn]) % NUM_CLASSES
        self.is_wrong = drawn

    def losses(self, site: int) -> Losses:
        own = slice(site * NUM_TRAIN, (site + 1) * NUM_TRAIN)

        def lower(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            each = F.cross_entropy(
                classify(y, self.images[self.train[site]]), self.seen[site], reduction="none"
            )
            return (x[own].sigmoid() * each).mean() + DECAY * y.square().sum()

        def upper(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            chosen = self.validation[site]
            return F.cross_entropy(classify(y, self.images[chosen]), self.labels[chosen])

        return Losses(upper, lower)

    def test(self, y: torch.Tensor) -> tuple[float, float]:
        """Loss, and share of errors."""
        told = classify(y, self.images[self.tested])
        expected = self.labels[self.tested]
        return float(F.cross_entropy(told, expected)), float((told.argmax(1) != expected).float().mean())


def classify(y: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    weights, bias = y.split([NUM_CLASSES * NUM_PIXELS, NUM_CLASSES])
    return F.linear(images, weights.view(NUM_CLASSES, NUM_PIXELS), bias)


@dataclass(frozen=True)
class Case:
    """One row, of all seeds."""

    strategies: str
    """Of x, y and z."""
    topology: str = "ring"
    corrupted: float = 0.2
    codec: str = "none"
    memory: bool = True
    x_step: float = X_STEP
    """0: all samples count alike, right or wrong."""
    lower_step: float = LOWER_STEPS[0]


CODECS: dict[str, AnyCodec] = {"none": Raw(), "eden4": Eden(name="eden4"), "eden2": Eden(name="eden2")}
CASES = [
    *(Case("ed", corrupted=share, x_step=0.0) for share in (0.1, 0.2, 0.3)),
    *(
        Case(name, corrupted=share, lower_step=step)
        for share in (0.1, 0.2, 0.3)
        for name in NAMES
        for step in LOWER_STEPS
    ),
    *(Case(name) for name in ("dsgd ed ed", "ed dsgd dsgd")),
    *(
        Case(name, topology, lower_step=step)
        for topology in TOPOLOGIES
        for name in ("dsgd", "gt", "extra", "ed")
        for step in LOWER_STEPS[:2]
    ),
    *(Case("ed", codec=codec, memory=memory) for codec in ("eden4", "eden2") for memory in (True, False)),
]


def measure(case: Case, seed: int) -> tuple[dict[str, Any], list[Point]]:
    """One row, and how it got there."""
    torch.set_num_threads(1)
    digits = Digits(case.corrupted, seed)
    names = case.strategies.split()
    strategies = dict(zip("xyz", names * (3 // len(names)), strict=True))
    plan = Plan.model_validate({
        **strategies, "x_step": case.x_step or 1.0, "y_step": case.lower_step, "z_step": case.lower_step,
        "momentum": 0.3,
    })  # fmt: skip
    gossip = LocalGossip(TOPOLOGIES[case.topology], CODECS[case.codec], case.memory)
    num_y = NUM_CLASSES * (NUM_PIXELS + 1)
    solver = Sparkle(gossip, torch.zeros(NUM_SITES * NUM_TRAIN), torch.zeros(num_y), plan)
    solver.steps["x"] = case.x_step
    losses = [digits.losses(site) for site in range(NUM_SITES)]
    path = []
    for step in range(1, NUM_STEPS + 1):
        solver.step(*losses)
        if step % STRIDE == 0:
            now = [digits.test(solver.value("y", site))[0] for site in range(NUM_SITES)]
            path.append((step, mb_sent(gossip), mean(now)))
    xs, ys = (torch.stack([solver.value(level, site) for site in range(NUM_SITES)]) for level in "xy")
    tests = [digits.test(y) for y in ys]
    row = {
        **asdict(case), "seed": seed,
        "upper loss": mean(float(each.upper(xs[0], y)) for y in ys for each in losses),
        "test loss": mean(loss for loss, _ in tests),
        "halfway": next(loss for step, _, loss in path if step >= NUM_STEPS / 2),
        "test error": mean(error for _, error in tests),
        "AUC": mean(float(roc_auc_score(digits.is_wrong.flatten(), -x)) for x in xs),
        "spread of y": float((ys - ys.mean(0)).norm() / ys.norm()),
        "MB sent per site": mb_sent(gossip),
    }  # fmt: skip
    return row, path


def mb_sent(gossip: LocalGossip) -> float:
    """By a site, in the mean."""
    return sum(site.bytes_sent for site in gossip.sites) / NUM_SITES / 1e6


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By case: the mean over seeds, and the spread of the upper loss."""
    measured = ("upper loss", "test loss", "halfway", "test error", "AUC", "spread of y", "MB sent per site")
    found = []
    for case in dict.fromkeys(tuple(row[key] for key in asdict(CASES[0])) for row in rows):
        mine = [row for row in rows if tuple(row[key] for key in asdict(CASES[0])) == case]
        spread = stdev([row["upper loss"] for row in mine]) if len(mine) > 1 else None
        found.append({
            **dict(zip(asdict(CASES[0]), case, strict=True)), "seeds": len(mine),
            **{key: round(mean(row[key] for row in mine), 4) for key in measured},
            "spread of upper loss": "-" if spread is None else round(spread, 4),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    paths: dict[Case, list[Point]] = {}
    for case in tqdm(dict.fromkeys(CASES)):
        for seed in options.seeds:
            row, path = measure(case, seed)
            rows.append(row)
            paths.setdefault(case, path)
    found = summarize(rows)
    print(format_table(found))
    write_results(options.results / "bilevel_cleaning", found, {"steps": NUM_STEPS, "seeds": options.seeds})
    save_figure(plot(paths), options.results / "bilevel_cleaning.png")


def plot(paths: Mapping[Case, Sequence[Point]]) -> Any:
    """Test losses of the first seed: against steps by strategy, and against bytes by codec."""
    figure, axes = new_figure(1, 2, (11, 4.5))
    strategies = {case.strategies: case for case in paths if case == Case(case.strategies)}
    codecs = {
        "none" if case.codec == "none" else f"{case.codec}{'' if case.memory else ' without memory'}": case
        for case in paths
        if case == Case("ed", codec=case.codec, memory=case.memory)
    }
    for axis, cases, column in zip(axes.flat, (strategies, codecs), (0, 1), strict=True):
        for name, case in cases.items():
            axis.plot(
                [point[column] for point in paths[case]], [point[2] for point in paths[case]], label=name
            )
        axis.set_yscale("log")
        axis.legend(fontsize=7)
    axes.flat[0].set_xlabel("steps")
    axes.flat[0].set_ylabel("test loss, mean over sites")
    axes.flat[1].set_xlabel("MB sent per site (ed)")
    return figure


if __name__ == "__main__":
    main()
