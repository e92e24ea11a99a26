"""Validation loss step by step over compressed links, for `benchmarks.training.time_to_loss`.

    python -m benchmarks.training.curves [--seeds 1 2 3] [--tasks NAME ...] [--only NAME ...] [--links 1 3 7]

Three tasks, each the same model over 1, 3 and 7 links, whole in one process (`benchmarks.model.links`): a
byte GPT from scratch, SmolLM2-135M fine-tuned on torch's C++ headers with all weights, and with LoRA. After a
warm-up the learning rate is constant, so that a run can end at any step: the uncompressed one after `steps`,
every other one once it has been as good as that at two validations, or after `most_steps`. Validation is
uncompressed. Two at a time, one to fifteen minutes each on one core; what `time_to_loss_curves.csv` has is
not measured again.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.codecs.peers import tah_quant
from benchmarks.files import RESULTS, provenance, read_csv, write_json
from benchmarks.model.damage import CUTS
from benchmarks.model.links import Links
from benchmarks.training import finetune, scratch
from benchmarks.training.compare import block
from benchmarks.training.finetune import LEARNING_RATES, LORA_RANK, NUM_SLOTS, Batch, train, validate
from benchmarks.training.scratch import pooled
from launch import llm
from launch.data import Windows, tokens
from launch.finetuning import C10
from launch.gpt import GPTConfig
from launch.trainer import Training, optimizer

UNCOMPRESSED = "uncompressed"
TAH_QUANT = "TAH-Quant"
NUM_HELD_OUT = 16


class Trainee(NamedTuple):
    """What a task starts from."""

    model: Any
    layers: Sequence[nn.Module]
    """Whose outputs may cross a link; the first is number 1."""
    adam: torch.optim.Optimizer
    batches: Iterator[Batch]
    held_out: Sequence[Batch]


@dataclass(frozen=True)
class Task:
    """What is trained, for how long, and where the links are."""

    start: Callable[[int], Trainee]
    """Of a seed."""
    cuts: dict[int, tuple[int, ...]]
    """By number of links: the layers whose output crosses one."""
    steps: int
    most_steps: int
    warm_up_steps: int
    interval: int
    """Steps between two validations."""
    pool: int
    """Mini-batches that lazy sampling holds."""
    start_steps: int
    """With more bits, of the runs that have a start."""
    learned: dict[str, Any]
    """Options of what is learned."""

    def warm_up(self, step: int) -> float:
        """The learning rate of a step, as a share of what it is from the last step of the warm-up on."""
        return min(1.0, (step + 1) / self.warm_up_steps)


def start_gpt(seed: int) -> Trainee:
    corpus, vocabulary = tokens(None)
    config = GPTConfig(vocabulary=vocabulary, num_blocks=8)
    model = scratch.Model(config)
    held_out = list(islice(scratch.draw_batches(corpus, config, True, 1), NUM_HELD_OUT))
    adam = optimizer(model, Training(learning_rate=1e-3))
    return Trainee(
        model, list(model.gpt.blocks), adam, scratch.draw_batches(corpus, config, False, seed), held_out
    )


def start_llm(weights: str, seed: int) -> Trainee:
    model: Any
    model, tokenizer = llm.load(llm.SMOLLM2)
    if weights == "LoRA":
        llm.add_lora(model, LORA_RANK)
    corpus, _ = tokens(C10, tokenizer.backend_tokenizer)
    held_out = list(islice(Windows(corpus, finetune.LENGTH, 1, validation=True).batches(1), NUM_HELD_OUT))
    batches = Windows(corpus, finetune.LENGTH, 1, validation=False).batches(seed * 1000)
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(wanted, LEARNING_RATES[weights], weight_decay=0.0)
    return Trainee(model, list(model.base_model.layers), adam, batches, held_out)


TASKS = {
    "byte GPT": Task(
        start_gpt,
        cuts={1: (4,), 3: (2, 4, 6), 7: (1, 2, 3, 4, 5, 6, 7)},
        steps=320,
        most_steps=640,
        warm_up_steps=40,
        interval=20,
        pool=16,
        start_steps=40,
        learned=scratch.ANCHORED | {"refresh": scratch.REFRESH},
    ),
    **{
        f"SmolLM2, {weights}": Task(
            partial(start_llm, weights),
            CUTS,
            steps=32,
            most_steps=64,
            warm_up_steps=finetune.WARM_UP_STEPS,
            interval=8,
            pool=4,
            start_steps=10,
            learned=finetune.LEARNED,
        )
        for weights in LEARNING_RATES
    },
}


def list_blocks(task: Task) -> dict[str, dict[str, Any]]:
    """The configurations of a task's runs by name; that of another's quantiser is not used."""

    def coded(bits: float, learns: bool = True) -> dict[str, Any]:
        return {"name": "transform", "bits": bits, **(task.learned if learns else {})}

    def started(bits: float) -> dict[str, Any]:
        direction = {"codec": coded(bits), "start": {"steps": task.start_steps}}
        return {"strategy": "direct", "activations": direction, "gradients": direction}

    return {
        UNCOMPRESSED: block("direct", "none"),
        "direct eden4": block("direct", "eden4"),
        TAH_QUANT: block("direct", "none"),
        "direct transform 3": block("direct", coded(3, learns=False)),
        **{f"direct transform {bits}, learned": block("direct", coded(bits)) for bits in (2, 1.5, 1)},
        **{f"direct transform {bits}, learned, start": started(bits) for bits in (1, 0.5)},
        "lazy, uncompressed, pool": pooled(block("fu", "none"), task.pool, 0.25),
        "Clapping-FU eden2": block("fu", "eden2"),
        "Clapping-FC eden4": block("fc", "eden4"),
        "key transform 3, learned + delta transform 0.5, pool": pooled(
            block("key_delta", coded(0.5, learns=False), key=coded(3)), task.pool, 0.25
        ),
        "key transform 2, learned + delta lowrank 4, transform 0.5, no pool": block(
            "key_delta", ["lowrank", coded(0.5, learns=False)], key=coded(2)
        ),
        "aqsgd int4": {
            "strategy": "aqsgd",
            "lazy": {"pool": task.steps // 4},
            **{name: {"delta": "int4"} for name in ("activations", "gradients")},
        },
    }


DEEP = (UNCOMPRESSED, "direct eden4", TAH_QUANT, "direct transform 3", "direct transform 2, learned",
        "direct transform 1.5, learned", "direct transform 1, learned",
        "direct transform 1, learned, start")  # fmt: skip
"""Over 1 and 7 links as well; all over 3."""


class Run(NamedTuple):
    """One training."""

    task: str
    name: str
    num_links: int
    seed: int


def list_runs(seeds: Sequence[int]) -> list[Run]:
    """Uncompressed ones first: links change nothing there, and the others end at their loss."""
    found = [Run(task, UNCOMPRESSED, 3, seed) for seed in seeds for task in TASKS]
    for seed in seeds:
        for name, task in TASKS.items():
            runs = [run for run in list_blocks(task) if run != UNCOMPRESSED]
            found += [Run(name, run, 3, seed) for run in runs]
            found += [Run(name, run, links, seed) for links in (1, 7) for run in runs if run in DEEP]
    return found


def measure(run: Run, target: float | None) -> list[dict[str, Any]]:
    """A row per validation. target: the loss that ends the run; None: it takes the task's steps."""
    task = TASKS[run.task]
    num_steps = task.steps if target is None else task.most_steps
    rows: list[dict[str, Any]] = []
    for row in validations(run, list_blocks(task)[run.name], num_steps, task.warm_up):
        rows.append(row)
        if target is not None and max(row["loss"] for row in rows[-2:]) <= target and len(rows) > 1:
            break
    return rows


def validations(
    run: Run, block: dict[str, Any], num_steps: int, rate: Callable[[int], float]
) -> Iterator[dict[str, Any]]:
    """Trains, and yields a row per validation. rate: of a step, as a share of the learning rate."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    task = TASKS[run.task]
    trainee = task.start(run.seed)
    peer = tah_quant() if run.name == TAH_QUANT else None
    links = Links(*[block] * run.num_links, peer=peer)
    schedule = torch.optim.lr_scheduler.LambdaLR(trainee.adam, rate)
    layers = [trainee.layers[number - 1] for number in task.cuts[run.num_links]]
    model, next_batch = trainee.model, partial(next, trainee.batches)
    training_losses: list[float] = []
    start_s, validation_s = time.thread_time(), 0.0
    for loss in train(model.train(), layers, links, trainee.adam, schedule, next_batch, num_steps):
        training_losses.append(loss)
        if len(training_losses) % task.interval:
            continue
        validation_start_s = time.thread_time()
        loss = validate(model.eval(), trainee.held_out)
        model.train()
        validation_s += time.thread_time() - validation_start_s
        compute_s = time.thread_time() - start_s - validation_s - links.codec_s
        yield {
            **run._asdict(),
            "step": len(training_losses),
            "loss": round(loss, 4),
            "training loss": round(sum(training_losses[-task.interval :]) / task.interval, 4),
            "bits as sent": round(links.bits_per_value, 3),
            "memory MiB": round(links.memory_nbytes / 2**20, 1),
            "codec share": round(links.codec_s / run.num_links / (compute_s / (run.num_links + 1)), 4),
        }  # fmt: skip


def read_curves(path: Path) -> list[dict[str, Any]]:
    texts = ("task", "name", "run")
    rows = read_csv(path) if path.exists() else []
    return [
        {key: cell if key in texts or not cell else json.loads(cell) for key, cell in row.items()}
        for row in rows
    ]


def find_target(rows: Sequence[Mapping[str, Any]], task: str, seed: int) -> float:
    """The uncompressed run's last loss."""
    mine = [row for row in rows if (row["task"], row["name"], row["seed"]) == (task, UNCOMPRESSED, seed)]
    loss: float = mine[-1]["loss"]
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--only", nargs="+", default=None, help="names of runs, in the order to be run")
    parser.add_argument("--links", type=int, nargs="+", default=[1, 3, 7])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.results / "time_to_loss_curves.csv"
    rows = read_curves(path)
    known = {Run(row["task"], row["name"], row["num_links"], row["seed"]) for row in rows}
    wanted = [
        run
        for run in list_runs(options.seeds)
        if run not in known
        and run.task in options.tasks
        and run.num_links in options.links
        and (options.only is None or run.name in options.only)
    ]
    wanted.sort(key=lambda run: options.only.index(run.name) if options.only else 0)
    for is_uncompressed in (True, False):
        jobs = [run for run in wanted if (run.name == UNCOMPRESSED) == is_uncompressed]
        targets = [None if is_uncompressed else find_target(rows, run.task, run.seed) for run in jobs]
        finetune.add_rows(
            [partial(measure, run, target) for run, target in zip(jobs, targets, strict=True)],
            rows,
            path,
            options.processes,
        )
    write_json(path.with_suffix(".json"), {**provenance(), "micro-batches": NUM_SLOTS})


if __name__ == "__main__":
    main()
