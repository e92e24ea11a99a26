"""Validation loss of data-parallel training where replicas compress the gradients that they exchange.

    python -m benchmarks.training.replicas [--seeds 1 2 3] [--only NAME ...] [--replicas 4] [--tasks NAME ...]

The byte GPT of `launch.gpt` from scratch, or SmolLM2-135M fine-tuned with LoRA, in one process: the gradients
of each replica's micro-batches are computed one after the other, then exchanged as ranks do
(`benchmarks.model.replicas`). All runs of a task have the same data, batch and steps. `1-bit Adam`
(arXiv 2102.02888) and `LoCo` (arXiv 2407.04480) are written here from their papers, to compare with. What
`replicas.csv` has is not measured again.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.files import RESULTS, compare_losses, provenance, read_csv, write_json
from benchmarks.model.links import Links
from benchmarks.model.replicas import Replicas
from benchmarks.training import finetune, scratch
from benchmarks.training.compare import block
from benchmarks.training.finetune import NUM_SLOTS, Batch, add_rows, validate
from clapping_ds.codecs import Context, Eden, Quantizer
from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.layout import Parameter
from clapping_ds.report import format_table
from launch import llm
from launch.data import Windows, tokens
from launch.finetuning import C10
from launch.gpt import GPTConfig
from launch.trainer import Training, learning_rate_schedule, optimizer

UNCOMPRESSED = "uncompressed"
NUM_HELD_OUT = 20
WARM_UP = 40
"""Steps in which the byte GPT's learning rate rises, and some methods send gradients uncompressed."""


@dataclass(frozen=True)
class Method:
    """How replicas exchange gradients, and at which step size."""

    plan: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    """The learning rate, against that of the uncompressed run."""
    peer: str | None = None
    """A published method in place of the plan."""
    optimizer: str = "AdamW"
    warms_up: bool = False
    """Whether nothing is compressed while the learning rate rises."""


def both(codec: Any, **options: Any) -> dict[str, Any]:
    return {"scatter": codec, "gather": codec, **options}


def unbiased(bits: int) -> dict[str, Any]:
    return {"name": f"eden{bits}", "scale": "unbiased"}


SIGN = {"scatter": "sign"}
RAW_ERRORS = {"error_feedback": "none"}
AS_THEY_ARE = {"equalize": False}
"""Columns of matrices."""
METHODS: dict[str, Method] = {
    UNCOMPRESSED: Method(both("none")),
    "int8": Method(both("int8")),
    "eden4": Method(),
    "int4, stochastic": Method(both({"name": "int4", "stochastic": True})),
    "eden2, unbiased": Method({"scatter": unbiased(2), **RAW_ERRORS}),
    "eden1, unbiased": Method({"scatter": unbiased(1), **RAW_ERRORS}),
    "eden1, unbiased, not equalized": Method({"scatter": unbiased(1), **RAW_ERRORS, **AS_THEY_ARE}),
    "eden2 + EF": Method({"scatter": "eden2"}),
    "sign + EF": Method(SIGN, warms_up=True),
    "sign + EF, not equalized": Method({**SIGN, **AS_THEY_ARE}, warms_up=True),
    "sign + EF, no warm-up": Method(SIGN),
    "sign + EF, half the rate": Method(SIGN, rate=0.5, warms_up=True),
    "sign + EF, both ways": Method(both("sign"), warms_up=True),
    "sign, no feedback": Method({**SIGN, **RAW_ERRORS}, warms_up=True),
    "eden1 + EF": Method({"scatter": "eden1"}, warms_up=True),
    "topk 0.05 + EF": Method({"scatter": "topk"}),
    "lowrank 4 + EF": Method({"scatter": "lowrank"}),
    "1-bit Adam": Method(peer="1-bit Adam"),
    "LoCo": Method(peer="LoCo"),
    "uncompressed, SGD": Method(both("none"), optimizer="SGD"),
    "eden1, unbiased, both ways, SGD": Method(
        both(unbiased(1), **RAW_ERRORS, **AS_THEY_ARE), optimizer="SGD"
    ),
    "eden1, unbiased, both ways, by the rule, SGD": Method(
        both(unbiased(1), **RAW_ERRORS, **AS_THEY_ARE), rate=0.41, optimizer="SGD"
    ),
}
"""Where nothing is said of it, the mean goes back as `eden4`, unbiased."""


class OneBitAdam:
    """1-bit Adam: after a warm-up the second moment stays, and replicas exchange the signs of momentum, with
    feedback on both ways."""

    bits = 2
    """Per value, of both ways together."""

    def __init__(self, num_replicas: int, sizes: Sequence[int], warm_up: int) -> None:
        self.warm_up = warm_up
        numel = sum(sizes)
        self.errors = torch.zeros(num_replicas, numel)
        self.error = torch.zeros(numel)
        self.momentum = torch.zeros(numel)
        self.square = torch.zeros(numel)
        self.step = 0

    def direct_(self, gradients_RN: torch.Tensor) -> torch.Tensor:
        """[replicas, values] -> the direction of the update, [values]."""
        self.step += 1
        if self.step <= self.warm_up:
            gradient = gradients_RN.mean(0)
            self.momentum.lerp_(gradient, 0.1)
            self.square.lerp_(gradient.square(), 0.05)
            return self.momentum / (1 - 0.9**self.step) / self._denominator()
        compensated_RN = torch.lerp(self.momentum, gradients_RN, 0.1) + self.errors
        sent_RN = torch.stack([_as_signs(each) for each in compensated_RN])
        self.errors = compensated_RN - sent_RN
        total = sent_RN.mean(0) + self.error
        self.momentum = _as_signs(total)
        self.error = total - self.momentum
        return self.momentum / self._denominator()

    def _denominator(self) -> torch.Tensor:
        num_steps = min(self.step, self.warm_up)
        return (self.square / (1 - 0.95**num_steps)).sqrt() + 1e-8


def _as_signs(values: torch.Tensor) -> torch.Tensor:
    """One bit, and a scale for the whole of a message."""
    return values.sign() * values.abs().mean()


class LoCo:
    """LoCo: 4-bit gradients; what is added to the next is a running mean of errors, held in 8 bits, and
    forgotten from time to time. The mean goes back as it is."""

    bits = 4 + 16 / 128 + 32

    def __init__(self, num_replicas: int, sizes: Sequence[int], beta: float = 0.8, reset: int = 1024) -> None:
        self.beta, self.reset = beta, reset
        self.errors = torch.zeros(num_replicas, sum(sizes))
        self.step = 0

    def average(self, gradients_RN: torch.Tensor) -> torch.Tensor:
        """[replicas, values] -> [values]."""
        self.step += 1
        total = torch.zeros(gradients_RN.shape[1])
        for replica, gradient in enumerate(gradients_RN):
            compensated = gradient + self.errors[replica]
            sent = pass_through(Quantizer(name="int4"), compensated)
            error = self.errors[replica].lerp(compensated - sent, 1 - self.beta)
            self.errors[replica] = pass_through(Quantizer(name="int8"), error) * bool(self.step % self.reset)
            total += sent
        return total / len(gradients_RN)


def pass_through(codec: Quantizer | Eden, value: torch.Tensor) -> torch.Tensor:
    payload = torch.empty(codec.nbytes(value.shape, value.dtype), dtype=torch.uint8)
    received = torch.zeros_like(value)
    codec.encode_(value, payload, Context(received))
    return received


@dataclass
class Trainee:
    """What is trained."""

    model: Any
    blocks: Sequence[Any]
    """Of which the middle one is followed by a link, with two stages."""
    optimizer: torch.optim.Optimizer
    schedule: Any
    batches: Iterator[Batch]
    held_out: Sequence[Batch]
    steps: int
    warm_up: int
    """Steps in which the learning rate rises."""


def start_gpt(seed: int, method: Method) -> Trainee:
    training = Training(learning_rate=Training().learning_rate * method.rate)
    corpus, vocabulary = tokens(None)
    config = GPTConfig(vocabulary=vocabulary)
    model = scratch.Model(config)
    held_out = list(islice(scratch.draw_batches(corpus, config, True, 1), NUM_HELD_OUT))
    chosen = optimizer(model, training)
    if method.optimizer == "SGD":
        groups = [
            {"params": group["params"], "weight_decay": group["weight_decay"] * 1e-3}
            for group in chosen.param_groups
        ]
        chosen = torch.optim.SGD(groups, lr=SGD_RATE * method.rate, momentum=0.9)
    schedule = learning_rate_schedule(chosen, training)
    batches = scratch.draw_batches(corpus, config, False, seed)
    return Trainee(
        model, list(model.gpt.blocks), chosen, schedule, batches, held_out, training.steps, WARM_UP
    )


SGD_RATE = 0.1


def start_llm(seed: int, method: Method) -> Trainee:
    model: Any
    model, tokenizer = llm.load(llm.SMOLLM2)
    llm.add_lora(model, finetune.LORA_RANK)
    corpus, _ = tokens(C10, tokenizer.backend_tokenizer)
    held_out = list(islice(Windows(corpus, finetune.LENGTH, 1, validation=True).batches(1), NUM_HELD_OUT))
    batches = Windows(corpus, finetune.LENGTH, 1, validation=False).batches(seed * 1000)
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    rate = finetune.LEARNING_RATES["LoRA"] * method.rate
    adam = torch.optim.AdamW(wanted, rate, weight_decay=0.0)
    steps = finetune.WARM_UP_STEPS
    warm_up = torch.optim.lr_scheduler.LinearLR(adam, 1 / steps, total_iters=steps - 1)
    layers = list(model.base_model.layers)
    return Trainee(model, layers, adam, warm_up, batches, held_out, finetune.STEPS, finetune.WARM_UP_STEPS)


TASKS: dict[str, Callable[[int, Method], Trainee]] = {"byte GPT": start_gpt, "SmolLM2, LoRA": start_llm}


@dataclass(frozen=True)
class Run:
    task: str
    name: str
    num_replicas: int
    num_stages: int
    seed: int


def measure(run: Run) -> list[dict[str, Any]]:
    """One line of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    method = METHODS[run.name]
    trainee = TASKS[run.task](run.seed, method)
    named = [(name, weight) for name, weight in trainee.model.named_parameters() if weight.requires_grad]
    weights = [weight for _, weight in named]
    parameters = [Parameter(name, weight.shape) for name, weight in named]
    warm_up = {"warmup_steps": trainee.warm_up} if method.warms_up else {}
    plan = DataParallelConfig.model_validate({**method.plan, **warm_up})
    replicas = Replicas(plan, parameters, run.num_replicas, seed=run.seed)
    sizes = [weight.numel() for weight in weights]
    peer: Any = None
    if method.peer is not None:
        peer = LoCo(run.num_replicas, sizes) if method.peer == "LoCo" else None
        peer = peer or OneBitAdam(run.num_replicas, sizes, trainee.warm_up)
    codec = "eden4" if run.num_stages == 2 and run.name != UNCOMPRESSED else "none"
    links = Links(*[block("direct", codec)] * (run.num_stages - 1)) if run.num_stages > 1 else None
    losses = []
    for step in range(trainee.steps):
        gradients, loss = compute(trainee, weights, run.num_replicas, links, step)
        if isinstance(peer, LoCo):
            put(weights, peer.average(flatten(gradients)))
        elif peer is not None:
            step_along(trainee.optimizer, weights, peer.direct_(flatten(gradients)))
        elif step < plan.warmup_steps:
            put(weights, flatten(gradients).mean(0))
        else:
            replicas.average_(gradients)
            for weight, gradient in zip(weights, gradients[0].values(), strict=True):
                weight.grad = gradient
        if not isinstance(peer, OneBitAdam):
            trainee.optimizer.step()
        trainee.schedule.step()
        losses.append(loss)
    trainee.model.eval()
    num_bytes = replicas.payload_bytes // max(1, trainee.steps - plan.warmup_steps)
    if peer is not None:
        num_bytes = round((run.num_replicas - 1) / run.num_replicas * sum(sizes) * peer.bits / 8)
    return [
        {
            **vars(run),
            "steps": trainee.steps,
            "bytes per step": num_bytes,
            "held MiB": round(replicas.memory_nbytes / 2**20, 2),
            "training loss": round(mean(losses[-16:]), 4),
            "loss": round(validate(trainee.model, trainee.held_out), 4),
        }
    ]


def compute(
    trainee: Any,
    weights: Sequence[torch.Tensor],
    num_replicas: int,
    links: Links | None = None,
    step: int = 0,
) -> tuple[list[dict[int, torch.Tensor]], float]:
    """Each replica's gradients, the mean over its part of the step's micro-batches; the mean loss.

    trainee   has the model, the batches and, with links, the blocks
    """
    found, losses = [], []
    num_each = NUM_SLOTS // num_replicas
    if links is not None:
        links.begin_step(step, [True] * NUM_SLOTS, 0)
    for replica in range(num_replicas):
        for weight in weights:
            weight.grad = None
        for number in range(num_each):
            ids, labels = next(trainee.batches)
            if links is not None:
                links.slot = replica * num_each + number
                with links.behind([trainee.blocks[len(trainee.blocks) // 2 - 1]]):
                    loss = llm.loss(trainee.model(ids, use_cache=False).logits, labels)
                    (loss / num_each).backward()
            else:
                loss = llm.loss(trainee.model(ids, use_cache=False).logits, labels)
                (loss / num_each).backward()
            losses.append(loss.item())
        found.append(
            {number: weight.grad for number, weight in enumerate(weights) if weight.grad is not None}
        )
    return found, mean(losses)


def flatten(gradients: Sequence[dict[int, torch.Tensor]]) -> torch.Tensor:
    """fp32 [replicas, values]."""
    return torch.stack([torch.cat([each.flatten() for each in of.values()]) for of in gradients])


def put(weights: Sequence[torch.Tensor], values: torch.Tensor) -> None:
    """As the gradients of the weights."""
    parts = values.split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad = part.view_as(weight)


@torch.no_grad()
def step_along(
    chosen: torch.optim.Optimizer, weights: Sequence[torch.Tensor], direction: torch.Tensor
) -> None:
    """What AdamW does with a direction."""
    put(weights, direction)
    for group in chosen.param_groups:
        for weight in group["params"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(weight.grad, alpha=group["lr"])


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each run: the mean over seeds, and how much worse than uncompressed with the same seed."""
    base = {
        (row["task"], row["num_replicas"], row["seed"], name.endswith("SGD")): row["loss"]
        for row in rows
        if (name := row["name"]).startswith(UNCOMPRESSED) and row["num_stages"] == 1
    }
    found = []
    keys = ("task", "name", "num_replicas", "num_stages")
    for run in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        mine = [row for row in rows if tuple(row[key] for key in keys) == run]
        places = [(row["task"], row["num_replicas"], row["seed"], "SGD" in row["name"]) for row in mine]
        worse = [row["loss"] - base[place] for row, place in zip(mine, places, strict=True) if place in base]
        found.append({
            **dict(zip(keys, run, strict=True)), "bytes per step": mine[0]["bytes per step"],
            **compare_losses([row["loss"] for row in mine], worse, "uncompressed"),
        })  # fmt: skip
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    texts = ("task", "name")
    return [
        {
            key: cell if key in texts else float(cell) if "." in cell else int(cell)
            for key, cell in row.items()
        }
        for row in (read_csv(path) if path.exists() else [])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--tasks", nargs="+", default=["byte GPT"])
    parser.add_argument("--only", nargs="+", default=list(METHODS), help="names of methods")
    parser.add_argument("--replicas", type=int, nargs="+", default=[4])
    parser.add_argument("--stages", type=int, nargs="+", default=[1])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    target = options.results / "replicas.csv"
    rows = read_rows(target)
    known = {tuple(row[key] for key in Run.__dataclass_fields__) for row in rows}
    wanted = [
        Run(task, name, num_replicas, num_stages, seed)
        for seed in options.seeds
        for task in options.tasks
        for name in options.only
        for num_replicas in options.replicas
        for num_stages in options.stages
    ]
    jobs = [partial(measure, run) for run in wanted if tuple(vars(run).values()) not in known]
    add_rows(jobs, rows, target, options.processes)
    write_json(target.with_suffix(".json"), {**provenance(), "micro-batches of a step": NUM_SLOTS})
    print(format_table(summarize(rows)))


if __name__ == "__main__":
    main()
