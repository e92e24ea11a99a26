"""Validation loss step by step of ways to train the same model, for `benchmarks.training.equal_time`.

    python -m benchmarks.training.ways [--seeds 1 2 3] [--tasks NAME ...] [--only NAME ...]

A byte GPT from scratch, and SmolLM2-135M fine-tuned on torch's C++ headers, as in
`benchmarks.training.curves`: a step is of four micro-batches, and the learning rate is constant after its
warm-up. All ways of a task have the same data in the same order, whether of four stages, or of four replicas
with a micro-batch each:

    uncompressed            whatever computes what one GPU would: a pipeline, data parallelism, ZeRO-3
    pipeline, CODEC         over three links, activations and gradients compressed
    data parallel, eden4    this package's: gradients there, and their mean back
    ZeRO++                  arXiv 2306.10209: passes with weights of 8 bits, gradients sent in 4
    DiLoCo, H = N           arXiv 2311.08105: N steps of AdamW alone, then one of Nesterov's along their mean
    LoRA                    and over three links; and with one micro-batch a step, which is what one GPU of
                            four has time for

ZeRO++ (groups of 2,048 values, each by its largest; gradients once a step) and DiLoCo (with its own step size
of 0.7 and momentum of 0.9) are written here from the papers. All in one process; a run takes 4 minutes (byte
GPT) to 25 on one core. Rows that `ways.csv` has are not measured again.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from benchmarks.files import RESULTS, provenance, write_json
from benchmarks.model.links import Links
from benchmarks.model.replicas import Replicas
from benchmarks.training import curves, finetune
from benchmarks.training.compare import block
from benchmarks.training.curves import UNCOMPRESSED, Task, Trainee, read_curves
from benchmarks.training.finetune import NUM_SLOTS, add_rows, validate
from benchmarks.training.replicas import compute
from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.layout import Parameter
from clapping_ds.plan.ways import CODECS
from launch import llm

NUM_LINKS = NUM_SLOTS - 1
GROUP = 2048
"""Values with a scale of their own, in ZeRO++."""
OUTER_RATE, OUTER_MOMENTUM = 0.7, 0.9


class Losses(NamedTuple):
    """A run: its model, and the training loss of each step, which is made as it is drawn."""

    trainee: Trainee
    of_steps: Iterator[float]
    interval: int
    """Steps between two validations."""


Begin = Callable[[Task, int], Losses]
"""Of a task and a seed."""


def start(task: Task, seed: int) -> Trainee:
    torch.manual_seed(seed)
    return task.start(seed)


def warm_up(trainee: Trainee, task: Task) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(trainee.adam, task.warm_up)


def over_links(codec: Any) -> Begin:
    def begin(task: Task, seed: int) -> Losses:
        trainee = start(task, seed)
        links = Links(*[block("direct", codec)] * NUM_LINKS)
        layers = [trainee.layers[number - 1] for number in task.cuts[NUM_LINKS]]
        next_batch = partial(next, trainee.batches)
        steps = finetune.train(
            trainee.model, layers, links, trainee.adam, warm_up(trainee, task), next_batch, 10**9
        )
        return Losses(trainee, steps, task.interval)

    return begin


def together(num_slots: int) -> Begin:
    """On one GPU, or as if: so many micro-batches a step."""

    def begin(task: Task, seed: int) -> Losses:
        trainee = start(task, seed)
        interval = task.interval * NUM_SLOTS // num_slots
        return Losses(trainee, _train_together(trainee, warm_up(trainee, task), num_slots), interval)

    return begin


def _train_together(trainee: Trainee, schedule: Any, num_slots: int) -> Iterator[float]:
    while True:
        losses = [_pass(trainee, 1 / num_slots, next(trainee.batches)) for _ in range(num_slots)]
        trainee.adam.step()
        trainee.adam.zero_grad()
        schedule.step()
        yield mean(losses)


def _pass(trainee: Trainee, weight: float, batch: finetune.Batch) -> float:
    """Adds a micro-batch's gradients. Its loss."""
    ids, labels = batch
    loss = llm.loss(trainee.model(ids, use_cache=False).logits, labels)
    (loss * weight).backward()
    return loss.item()


def data_parallel(task: Task, seed: int) -> Losses:
    """A micro-batch for each replica; gradients exchanged as the package does."""
    trainee = start(task, seed)
    named = [(name, weight) for name, weight in trainee.model.named_parameters() if weight.requires_grad]
    weights = [weight for _, weight in named]
    replicas = Replicas(
        DataParallelConfig(), [Parameter(name, weight.shape) for name, weight in named], NUM_SLOTS, seed=seed
    )
    schedule = warm_up(trainee, task)

    def steps() -> Iterator[float]:
        while True:
            gradients, loss = compute(trainee, weights, NUM_SLOTS)
            replicas.average_(gradients)
            _step(trainee, weights, list(gradients[0].values()))
            schedule.step()
            yield loss

    return Losses(trainee, steps(), task.interval)


def _step(trainee: Trainee, weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    trainee.adam.step()
    trainee.adam.zero_grad()


def zero_plus_plus(task: Task, seed: int) -> Losses:
    """A micro-batch for each replica, with weights of 8 bits; its gradients in 4 bits."""
    trainee = start(task, seed)
    weights = [weight for weight in trainee.model.parameters() if weight.requires_grad]
    schedule = warm_up(trainee, task)

    def steps() -> Iterator[float]:
        while True:
            exact = [weight.detach().clone() for weight in weights]
            _put(weights, [quantize(weight, 8) for weight in exact])
            gradients, loss = compute(trainee, weights, NUM_SLOTS)
            means = [torch.zeros_like(weight) for weight in exact]
            for of_replica in gradients:
                for total, gradient in zip(means, of_replica.values(), strict=True):
                    total.add_(quantize(gradient, 4), alpha=1 / NUM_SLOTS)
            _put(weights, exact)
            _step(trainee, weights, means)
            schedule.step()
            yield loss

    return Losses(trainee, steps(), task.interval)


@torch.no_grad()
def _put(weights: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def quantize(value: torch.Tensor, bits: int) -> torch.Tensor:
    """To the nearest of 2^bits - 1 levels about 0, up to the largest of each GROUP values. A tensor of one
    dimension stays as it is."""
    if value.dim() < 2:
        return value
    flat = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % GROUP)).view(-1, GROUP)
    most = 2 ** (bits - 1) - 1
    scale = flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(value.dtype).tiny) / most
    return ((flat / scale).round() * scale).flatten()[: value.numel()].view_as(value)


def diloco(every: int) -> Begin:
    def begin(task: Task, seed: int) -> Losses:
        replicas = [start(task, seed) for _ in range(NUM_SLOTS)]
        schedules = [warm_up(replica, task) for replica in replicas]
        sets = [
            [weight for weight in replica.model.parameters() if weight.requires_grad] for replica in replicas
        ]
        shared = [weight.detach().clone() for weight in sets[0]]
        outer = torch.optim.SGD(shared, OUTER_RATE, OUTER_MOMENTUM, nesterov=True)

        def steps() -> Iterator[float]:
            for step in count(1):
                losses = []
                for replica, schedule in zip(replicas, schedules, strict=True):
                    losses.append(_pass(replica, 1.0, next(replicas[0].batches)))
                    replica.adam.step()
                    replica.adam.zero_grad()
                    schedule.step()
                if step % every == 0:
                    average_(outer, shared, sets)
                yield mean(losses)

        return Losses(replicas[0], steps(), every)

    return begin


@torch.no_grad()
def average_(
    outer: torch.optim.Optimizer, shared: Sequence[torch.Tensor], sets: Sequence[Sequence[torch.Tensor]]
) -> None:
    """A step of `outer` on what all share, along the mean change of the replicas, which start from there."""
    for weight, each in zip(shared, zip(*sets, strict=True), strict=True):
        weight.grad = weight - sum(each) / len(each)
    outer.step()
    for mine in sets:
        _put(mine, shared)


class Way(NamedTuple):
    begin: Begin
    steps: int
    task: str | None = None
    """Of `curves`, where it is not the task's own."""


SCRATCH, TUNING = "from scratch", "fine-tuning"
OF_CURVES = {SCRATCH: "byte GPT", TUNING: "SmolLM2, all weights"}
LORA = "SmolLM2, LoRA"
SCRATCH_STEPS, TUNING_STEPS = 600, 60
WAYS: dict[str, dict[str, Way]] = {
    SCRATCH: {
        UNCOMPRESSED: Way(together(NUM_SLOTS), SCRATCH_STEPS),
        "DiLoCo, H = 30": Way(diloco(30), SCRATCH_STEPS),
        "DiLoCo, H = 100": Way(diloco(100), SCRATCH_STEPS),
        **{f"pipeline, {name}": Way(over_links(codec), SCRATCH_STEPS) for name, codec in CODECS.items()},
        "data parallel, eden4": Way(data_parallel, SCRATCH_STEPS),
        "ZeRO++": Way(zero_plus_plus, SCRATCH_STEPS),
    },
    TUNING: {
        UNCOMPRESSED: Way(together(NUM_SLOTS), TUNING_STEPS),
        "pipeline, eden4": Way(over_links("eden4"), TUNING_STEPS),
        "LoRA": Way(together(NUM_SLOTS), TUNING_STEPS, LORA),
        "DiLoCo, H = 30": Way(diloco(30), 90),
        "LoRA, a quarter of the batch": Way(together(1), TUNING_STEPS * NUM_SLOTS, LORA),
        "LoRA, pipeline, eden4": Way(over_links("eden4"), TUNING_STEPS, LORA),
        "ZeRO++": Way(zero_plus_plus, TUNING_STEPS),
        "DiLoCo, H = 100": Way(diloco(100), 100),
        "data parallel, eden4": Way(data_parallel, TUNING_STEPS),
    },
}


def measure(task: str, name: str, seed: int) -> list[dict[str, Any]]:
    """A row per validation."""
    torch.set_num_threads(1)
    way = WAYS[task][name]
    run = way.begin(curves.TASKS[way.task or OF_CURVES[task]], seed)
    model, rows, trained = run.trainee.model, [], []
    for step, loss in enumerate(islice(run.of_steps, way.steps), 1):
        trained.append(loss)
        if step % run.interval == 0:
            rows.append(
                {
                    "task": task,
                    "name": name,
                    "seed": seed,
                    "step": step,
                    "loss": round(validate(model.eval(), run.trainee.held_out), 4),
                    "training loss": round(mean(trained[-run.interval :]), 4),
                }
            )
            model.train()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--tasks", nargs="+", default=list(WAYS))
    parser.add_argument("--only", nargs="+", default=None, help="names of ways")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.results / "ways.csv"
    rows = read_curves(path)
    known = {(row["task"], row["name"], row["seed"]) for row in rows}
    wanted = [
        (task, name, seed)
        for seed in options.seeds
        for task in options.tasks
        for name in WAYS[task]
        if (options.only is None or name in options.only) and (task, name, seed) not in known
    ]
    add_rows([partial(measure, *each) for each in wanted], rows, path, options.processes)
    write_json(path.with_suffix(".json"), {**provenance(), "micro-batches": NUM_SLOTS})


if __name__ == "__main__":
    main()
