"""Learned shares of four corpora against fixed ones: the loss of a byte-level GPT on a target.

    python -m benchmarks.bilevel.mixture [--seeds 1 2 3] [--only NAME ...]

What `launch.mixture` trains on four ranks, in one process, with gradients that are not compressed. The
target is half Python of installed packages and half C++ headers; of the four corpora two are like it. Each
seed draws the files of corpora and target anew. A corpus alone has as many samples in a step as its site has
in all other runs, or as all four sites together. What `bilevel_mixture.csv` has is not measured again.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.files import RESULTS, compare_losses, provenance, write_json
from benchmarks.training.finetune import add_missing
from clapping_ds import bilevel
from clapping_ds.bilevel import LocalGossip
from clapping_ds.report import format_table
from launch.mixture import TARGET, MixtureRun, Trainer, find_corpora

NAMES = ("python", "headers", "licences", "data")
FIXED = {"uniform": (0.25, 0.25, 0.25, 0.25), "as the target": (0.5, 0.5, 0.0, 0.0)}
NUM_HELD_OUT = 40
"""Batches of the target."""
ALONE = {" alone": 1, " alone, four times the samples": len(NAMES)}
"""By end of the run's name: samples in a step, by those of a site."""
RUNS = ("uniform", "learned", *(name + end for end in ALONE for name in NAMES), "as the target")


def measure(name: str, seed: int) -> list[dict[str, Any]]:
    """One line of the table."""
    torch.set_num_threads(1)
    shares = () if name == "learned" else FIXED.get(name, FIXED["uniform"])
    run = MixtureRun(seed=seed, eval_batches=NUM_HELD_OUT, fixed_shares=shares)
    corpora = find_corpora(run)
    for end, times in ALONE.items():
        if name.endswith(end):
            own, fewer = corpora[name.removesuffix(end)], len(NAMES) // times
            corpora = {f"{name} {number}": own for number in range(len(NAMES))} | {TARGET: corpora[TARGET]}
            run = replace(run, batch_size=run.batch_size // fewer, eval_batches=fewer * NUM_HELD_OUT)
    gossip = LocalGossip(bilevel.ring(len(NAMES)))
    trainer = Trainer(run, corpora, gossip, [each for each in corpora if each != TARGET])
    for _ in range(run.steps):
        trainer.step()
    found = trainer.shares()
    return [{
        "shares": name, "seed": seed, "steps": run.steps,
        **dict(zip(NAMES, found if name in ("learned", *FIXED) else ["-"] * len(NAMES), strict=True)),
        "bytes of gossip per site": gossip.sites[0].bytes_sent,
        "loss on the target": round(trainer.validate(), 4),
    }]  # fmt: skip


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By run: means over seeds, and the difference to uniform shares with the same seed."""
    base = {int(row["seed"]): float(row["loss on the target"]) for row in rows if row["shares"] == "uniform"}
    found = []
    for name in dict.fromkeys(row["shares"] for row in rows):
        mine = [row for row in rows if row["shares"] == name]
        losses = [float(row["loss on the target"]) for row in mine]
        seeds = [int(row["seed"]) for row in mine]
        more = [loss - base[seed] for loss, seed in zip(losses, seeds, strict=True) if seed in base]
        shares = {each: [float(row[each]) for row in mine if row[each] != "-"] for each in NAMES}
        found.append({
            "shares": name,
            **{each: round(mean(values), 3) if values else "-" for each, values in shares.items()},
            "bytes of gossip per site": mine[0]["bytes of gossip per site"],
            **compare_losses(losses, more, "uniform", "loss on the target"),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    target = options.results / "bilevel_mixture.csv"
    rows = add_missing(measure, "shares", options.only, options.seeds, target, options.processes)
    write_json(target.with_suffix(".json"), provenance())
    print(format_table(summarize(rows)))


if __name__ == "__main__":
    main()
