"""The same samples used four times: plain epochs, a pool of mini-batches, AQ-SGD's pool of all of them.

    python -m benchmarks.training.reuse [--seeds 1 2 3]

SmolLM2-135M, all weights, on torch's C++ headers over 3 links, whole in one process: 64 steps on 16 mini-
batches. Every run has the same 16; epochs and AQ-SGD go through them four times, a pool of 4 takes a new one
for every fifth slot. Two at a time, about ten minutes each on one core; what `reuse.csv` has is not measured
again.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from benchmarks.files import RESULTS, provenance, write_json
from benchmarks.model.damage import CUTS
from benchmarks.model.links import Links
from benchmarks.training.compare import block
from benchmarks.training.curves import read_curves, start_llm
from benchmarks.training.finetune import (
    NUM_SLOTS,
    WARM_UP_STEPS,
    Batch,
    add_rows,
    iterate_epochs,
    train,
    validate,
)
from benchmarks.training.scratch import pooled
from clapping_ds.report import format_table

STEPS, NUM_LINKS = 64, 3
NUM_MINI_BATCHES = STEPS // 4
POOL, P_NEW = 4, 0.2
"""4 mini-batches, then a fifth of 60 more."""
LEARNING_RATE = 2e-5
EPOCHS = "plain epochs"
AQSGD = {"strategy": "aqsgd", "lazy": {"pool": NUM_MINI_BATCHES}}


def _both(**codecs: Any) -> dict[str, Any]:
    return {"activations": codecs, "gradients": codecs}


def transform(bits: float) -> dict[str, Any]:
    return {"name": "transform", "bits": bits}


BLOCKS: dict[str, dict[str, Any]] = {
    EPOCHS: block("direct", "none"),
    "pool, uncompressed": pooled(block("fu", "none"), POOL, P_NEW),
    "pool, key transform 3 + delta transform 0.25": pooled(
        block("key_delta", transform(0.25), key=transform(3)), POOL, P_NEW
    ),
    "aqsgd, int4": {**AQSGD, **_both(delta="int4")},
    "aqsgd, transform 0.25": {**AQSGD, **_both(delta=transform(0.25))},
}


class Run(NamedTuple):
    """One training."""

    name: str
    seed: int


def measure(run: Run) -> list[dict[str, Any]]:
    """One line of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    trainee = start_llm("all weights", run.seed)
    for group in trainee.adam.param_groups:
        group["lr"] = LEARNING_RATE
    warm_up = torch.optim.lr_scheduler.LinearLR(
        trainee.adam, 1 / WARM_UP_STEPS, total_iters=WARM_UP_STEPS - 1
    )
    batches: Iterator[Batch] = islice(trainee.batches, NUM_MINI_BATCHES * NUM_SLOTS)
    if run.name == EPOCHS:
        batches = iterate_epochs(batches, NUM_MINI_BATCHES * NUM_SLOTS, run.seed)
    links = Links(*[BLOCKS[run.name]] * NUM_LINKS)
    layers = [trainee.layers[number - 1] for number in CUTS[NUM_LINKS]]
    before = validate(trainee.model.eval(), trainee.held_out)
    steps = train(trainee.model.train(), layers, links, trainee.adam, warm_up, partial(next, batches), STEPS)
    losses = list(steps)
    return [{
        "name": run.name,
        "task": "SmolLM2, all weights",
        "seed": run.seed,
        "bits as sent": round(links.bits_per_value, 3),
        "memory MiB": round(links.memory_nbytes / 2**20, 1),
        "loss before": round(before, 4),
        "training loss": round(mean(losses[-NUM_MINI_BATCHES:]), 4),
        "loss": round(validate(trainee.model.eval(), trainee.held_out), 4),
    }]  # fmt: skip


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each run: mean over seeds, and how much worse than plain epochs with the same seed."""
    epochs = {row["seed"]: row["loss"] for row in rows if row["name"] == EPOCHS}
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        worse = [row["loss"] - epochs[row["seed"]] for row in mine if row["seed"] in epochs]
        found.append({
            "run": name, "seeds": len(mine), "bits as sent": mine[0]["bits as sent"],
            "memory MiB": mine[0]["memory MiB"], "loss": f"{mean(row['loss'] for row in mine):.4f}",
            "training loss": f"{mean(row['training loss'] for row in mine):.4f}",
            "against epochs": f"{mean(worse):+.4f}" if worse else "-",
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.results / "reuse.csv"
    rows = read_curves(path)
    known = {Run(row["name"], row["seed"]) for row in rows}
    wanted = [run for seed in options.seeds for name in BLOCKS if (run := Run(name, seed)) not in known]
    add_rows([partial(measure, run) for run in wanted], rows, path, options.processes)
    write_json(path.with_suffix(".json"), {**provenance(), "steps": STEPS, "learning rate": LEARNING_RATE})
    print(format_table(summarize(rows)))


if __name__ == "__main__":
    main()
