"""Fine-tuning a pretrained LLM over compressed links: what is lost, at 1, 3 and 7 links.

    python -m benchmarks.training.finetune [--seeds 1 2 3] [--only NAME ...] [--links 1 3 7]

SmolLM2-135M on torch's C++ headers, all weights or LoRA, the whole pipeline in one process
(`benchmarks.model.links`): two at a time, about eight minutes each on one core. Validation is uncompressed.
Rows that `finetune.csv` has are not measured again.

Lazy sampling trains on fewer samples, each several times. What it costs is read against the run that uses the
same number of samples in shuffled epochs, uncompressed, as well as against all-fresh training.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks.files import RESULTS, compare_losses, provenance, read_csv, write_csv, write_json
from benchmarks.model.damage import CUTS
from benchmarks.model.links import Links
from benchmarks.training.compare import block
from clapping_ds.report import format_table
from clapping_ds.stage.sampling import Coin, LazySampler
from launch import llm
from launch.data import Windows, tokens
from launch.finetuning import C10

P_NEW = 0.25
LAZY = {"lazy": {"p_new": P_NEW, "refresh": "cycle"}}
LENGTH = 256
NUM_SLOTS = 4
NUM_HELD_OUT = 16
LORA_RANK = 8
STEPS = 32
WARM_UP_STEPS = 4
LEARNING_RATES = {"all weights": 1e-4, "LoRA": 5e-4}
LEARNED = {"basis": "eigen", "anchors": 1024, "refresh": 16}
"""A run has 128 messages per link and direction: from the 33rd on something is in use. In messages of 4,096
tokens, 256 to a period, it takes 0.04 bits per value; in these 3."""

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """What is trained, over how many links."""

    name: str
    block: dict[str, Any]
    num_links: int
    weights: str = "all weights"
    """Or "LoRA"."""
    in_epochs: bool = False
    """Of as many samples as lazy sampling draws."""


BLOCKS: dict[str, dict[str, Any]] = {
    "uncompressed": block("direct", "none"),
    "direct int8": block("direct", "int8"),
    "direct fp8_e4m3": block("direct", "fp8_e4m3"),
    "direct int4": block("direct", "int4"),
    "direct int4 rotated": block("direct", {"name": "int4", "rotate": True}),
    "direct eden4": block("direct", "eden4"),
    "direct eden3": block("direct", "eden3"),
    "direct eden2": block("direct", "eden2"),
    **{
        f"direct transform {bits}": block("direct", {"name": "transform", "bits": bits}) for bits in (3, 2, 1)
    },
    **{
        f"direct transform {bits}, learned": block("direct", {"name": "transform", "bits": bits, **LEARNED})
        for bits in (2, 1)
    },
    "uncompressed, lazy": {**block("fu", "none"), **LAZY},
    "fu eden2": {**block("fu", "eden2"), **LAZY},
    "fc eden4": {**block("fc", "eden4"), **LAZY},
    "key eden4, delta eden1": {**block("key_delta", "eden1", key="eden4"), **LAZY},
    "key eden4, delta lowrank 4": {
        **block("key_delta", {"name": "lowrank", "rank": 4}, key="eden4"),
        **LAZY,
    },
    **{
        f"key transform 3{', learned' if learned else ''}, delta transform 0.25": {
            **block(
                "key_delta",
                {"name": "transform", "bits": 0.25},
                key={"name": "transform", "bits": 3, **learned},
            ),
            **LAZY,
        }
        for learned in ({}, LEARNED)
    },
}
EPOCHS = "uncompressed, epochs of as many samples as lazy"
DEEP = ("direct int8", "direct eden4", "direct eden3", "direct transform 3", "direct transform 2")
"""At 1 and 7 links as well; all at 3."""
WITH_LORA = ("uncompressed", "direct eden4", "direct eden3")


def list_runs() -> list[Run]:
    runs = [Run(name, block, 3) for name, block in BLOCKS.items()]
    runs.append(Run(EPOCHS, BLOCKS["uncompressed"], 3, in_epochs=True))
    runs += [Run(name, BLOCKS[name], num_links) for num_links in (1, 7) for name in DEEP]
    return runs + [Run(name, BLOCKS[name], 3, "LoRA") for name in WITH_LORA]


def train(
    model: Any,
    blocks: Sequence[torch.nn.Module],
    links: Links,
    adam: torch.optim.Optimizer,
    schedule: Any,
    next_batch: Callable[[], Batch],
    steps: int,
) -> Iterator[float]:
    """Trains a model whose links are behind some of its blocks; the mean loss of each step, as a pipeline of
    real ranks would have it."""
    sampling = links.config.sampling
    coin = Coin(sampling.p_new, sampling.refresh, links.config.seed, sampling.pool)
    sampler = LazySampler()
    for step in range(steps):
        fresh, entry = coin.toss(step, NUM_SLOTS), coin.pick(step)
        sampler.draw(sum(fresh), next_batch)
        sampler.begin(fresh, entry)
        links.begin_step(step, fresh, entry)
        losses = []
        with links.behind(blocks):
            for links.slot in range(NUM_SLOTS):
                ids, labels = sampler.next()
                loss = llm.loss(model(ids, use_cache=False).logits, labels)
                (loss / NUM_SLOTS).backward()
                losses.append(loss.item())
        adam.step()
        adam.zero_grad()
        schedule.step()
        yield mean(losses)


def measure(run: Run, seed: int, steps: int) -> list[dict[str, Any]]:
    """One line of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model: Any
    model, tokenizer = llm.load(llm.SMOLLM2)
    if run.weights == "LoRA":
        llm.add_lora(model, LORA_RANK)
    corpus, _ = tokens(C10, tokenizer.backend_tokenizer)
    held_out = list(islice(Windows(corpus, LENGTH, 1, validation=True).batches(1), NUM_HELD_OUT))
    batches = Windows(corpus, LENGTH, 1, validation=False).batches(seed * 1000)
    if run.in_epochs:
        batches = iterate_epochs(batches, NUM_SLOTS + round((steps - 1) * NUM_SLOTS * P_NEW), seed)
    rate = LEARNING_RATES[run.weights]
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LinearLR(adam, 1 / WARM_UP_STEPS, total_iters=WARM_UP_STEPS - 1)
    links = Links(*[run.block] * run.num_links)
    blocks = [model.base_model.layers[number - 1] for number in CUTS[run.num_links]]
    before = validate(model.eval(), held_out)
    losses = list(train(model.train(), blocks, links, adam, warm_up, partial(next, batches), steps))
    return [
        {
            "run": run.name,
            "weights": run.weights,
            "links": run.num_links,
            "seed": seed,
            "steps": steps,
            "bits per value": round(links.bits_per_value, 3),
            "loss before": round(before, 4),
            "training loss": round(mean(losses[-8:]), 4),
            "loss": round(validate(model.eval(), held_out), 4),
        }
    ]


def iterate_epochs(batches: Iterator[Batch], number: int, seed: int) -> Iterator[Batch]:
    """So many batches, again and again, each time in another order."""
    held, generator = list(islice(batches, number)), np.random.default_rng(seed)
    while True:
        yield from (held[index] for index in generator.permutation(number))


@torch.no_grad()
def validate(model: Any, batches: Sequence[Batch]) -> float:
    return mean(llm.loss(model(ids, use_cache=False).logits, labels).item() for ids, labels in batches)


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each run: mean over seeds, and how much worse than uncompressed with the same seed."""
    plain = [row for row in rows if row["run"] == "uncompressed"]
    base = {(row["weights"], row["links"], row["seed"]): row["loss"] for row in plain}
    for row in plain:  # links change nothing there, where the model is the same
        for links in CUTS:
            base.setdefault((row["weights"], links, row["seed"]), row["loss"])
    found = []
    for run in dict.fromkeys((row["run"], row["weights"], row["links"]) for row in rows):
        mine = [row for row in rows if (row["run"], row["weights"], row["links"]) == run]
        keys = [(row["weights"], row["links"], row["seed"]) for row in mine]
        worse = [row["loss"] - base[key] for row, key in zip(mine, keys, strict=True) if key in base]
        found.append({
            "run": run[0], "weights": run[1], "links": run[2], "bits per value": mine[0]["bits per value"],
            **compare_losses([row["loss"] for row in mine], worse, "uncompressed"),
        })  # fmt: skip
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """As `measure` gives them."""
    return [
        {name: value if name in ("run", "weights") else json.loads(value) for name, value in row.items()}
        for row in read_csv(path)
    ]


def add_missing(
    measure: Callable[[str, int], list[dict[str, Any]]],
    name: str,
    names: Sequence[str],
    seeds: Sequence[int],
    target: Path,
    processes: int,
) -> list[dict[str, Any]]:
    """All rows of a table, once what it lacks is measured. name: the column that says what a row is of."""
    rows: list[dict[str, Any]] = list(read_csv(target)) if target.exists() else []
    known = {(row[name], int(row["seed"])) for row in rows}
    wanted = [(each, seed) for seed in seeds for each in names if (each, seed) not in known]
    add_rows([partial(measure, *each) for each in wanted], rows, target, processes)
    return rows


def add_rows(
    jobs: Sequence[Callable[[], list[dict[str, Any]]]],
    rows: list[dict[str, Any]],
    target: Path,
    processes: int,
) -> None:
    """Measures each in a process of its own, and writes the table after each."""
    with ProcessPoolExecutor(processes, max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(job) for job in jobs]):
            rows += done.result()
            print(rows[-1], flush=True)
            write_csv(target, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=[EPOCHS, *BLOCKS], help="names of runs")
    parser.add_argument("--links", type=int, nargs="+", default=list(CUTS))
    parser.add_argument("--weights", nargs="+", default=list(LEARNING_RATES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    target = options.results / "finetune.csv"
    rows = read_rows(target) if target.exists() else []
    known = {(row["run"], row["weights"], row["links"], row["seed"], row["steps"]) for row in rows}
    wanted = [
        (run, seed)
        for seed in options.seeds
        for run in list_runs()
        if run.name in options.only
        and run.num_links in options.links
        and run.weights in options.weights
        and (run.name, run.weights, run.num_links, seed, options.steps) not in known
    ]
    jobs = [partial(measure, run, seed, options.steps) for run, seed in wanted]
    add_rows(jobs, rows, target, options.processes)
    facts = {"model": llm.SMOLLM2, "steps": options.steps, "tokens per step": NUM_SLOTS * LENGTH}
    facts |= {"cuts": CUTS, "learning rates": LEARNING_RATES}
    write_json(target.with_suffix(".json"), {**provenance(), **facts})
    print(format_table(summarize([row for row in rows if row["steps"] == options.steps])))


if __name__ == "__main__":
    main()
