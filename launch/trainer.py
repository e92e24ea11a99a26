"""One training run: engine, schedule, validation, progress, figures. Used by the script and the benchmark."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from tqdm import tqdm

from clapping_ds.link.traffic import Traffic
from clapping_ds.report import format_table
from launch.data import Windows, tokens
from launch.gpt import GPTConfig, pipeline

try:  # NVIDIA apex; the package of that name on the index is another project
    from apex.optimizers import FusedAdam
except ImportError:
    FusedAdam = None


@dataclass(frozen=True)
class Training:
    """How long is trained, and how. The rest is in the DeepSpeed JSON."""

    num_stages: int = 2
    """Stages of the pipeline; replicas of it fill the other ranks."""
    steps: int = 320
    """Optimizer steps."""
    learning_rate: float = 2e-3
    """At the end of the warm-up; a cosine takes it down to a tenth."""
    warmup_steps: int = 40
    """Steps in which the learning rate rises."""
    weight_decay: float = 0.1
    """Of AdamW, for matrices alone."""
    eval_interval: int = 40
    """Steps between two validations; there is one after the last step as well."""
    eval_batches: int = 5
    """Batches of each validation; 0: there is none."""
    seed: int = 1
    """Of new weights and of the order of the data."""


@dataclass(frozen=True)
class RunConfig(Training):
    """A GPT, trained from scratch."""

    data: Path | None = None
    """Folder or file of text, or a file of numbers (.u8, .u16, .u32); None: Python's own sources."""
    tokenizer: Path | None = None
    """A file of the tokenizers library; None: the tokens are bytes."""
    gpt: GPTConfig = field(default_factory=GPTConfig)
    """The size of the model."""
    save: Path | None = None
    """Folder for DeepSpeed's checkpoints, from the last of which a run goes on; None: no checkpoints."""
    save_interval: int = 320
    """Steps between two checkpoints; there is one after the last step as well."""
    checkpoint_interval: int = 0
    """Layers per activation checkpoint; 0: none."""


@dataclass
class RunResult:
    """Figures of one run; equal on every rank."""

    train_losses: list[float] = field(default_factory=list)
    """Mean loss of each step, in nats per token."""
    validations: list[tuple[int, float, int]] = field(default_factory=list)
    """(steps trained, validation loss, payload bytes so far on all links)."""
    tokens_per_s: float = 0.0
    report: list[dict[str, Any]] = field(default_factory=list)
    """The engine's `clapping_report`; empty for the stock engine."""

    def validate(self, step: int, report: list[dict[str, Any]], loss: float) -> None:
        """Notes a validation after so many steps."""
        self.report = report
        self.validations.append((step, loss, sum(row["payload_bytes"] for row in report)))

    def print(self) -> None:
        """On the first rank: every validation, and the report."""
        if dist.get_rank() == 0:
            for step, loss, sent in self.validations:
                print(f"step {step}: validation loss {loss:.4f}, {sent / 1e6:.1f} MB sent")
            if self.report:
                print(format_table(self.report))


def train(
    run: RunConfig,
    ds_config: dict[str, Any],
    initialize: Callable[..., Any] = deepspeed.initialize,
    title: str = "train",
) -> RunResult:
    """Trains from scratch. `initialize` is DeepSpeed's, or `clapping_ds.initialize`."""
    corpus, vocabulary = tokens(run.data, run.tokenizer)
    gpt = GPTConfig(**{**vars(run.gpt), "vocabulary": vocabulary})
    model = pipeline(gpt, run.num_stages, run.seed, run.checkpoint_interval)
    engine, *_ = initialize(
        model=model,
        optimizer=optimizer(model, run),
        lr_scheduler=lambda adam: learning_rate_schedule(adam, run),
        config=ds_config,
    )
    end_step = None
    if run.save is not None:
        load_last(engine, run.save)
        end_step = partial(save_at_times, engine, run.save, run.save_interval, run.steps)
    return train_engine(engine, run, corpus, gpt.length, title, end_step)


def load_last(engine: Any, folder: Path) -> None:
    """Loads an engine's last checkpoint, if there is one. The first rank alone has the file "latest", where
    machines share no disk: it tells the others. A collective of all ranks."""
    latest = folder / "latest"
    tag = [latest.read_text().strip() if dist.get_rank() == 0 and latest.exists() else None]
    dist.broadcast_object_list(tag)
    if tag[0] is not None:
        engine.load_checkpoint(str(folder), tag=tag[0])


def save_at_times(engine: Any, folder: Path, interval: int, last: int, step: int) -> None:
    """A checkpoint after every `interval` steps, and after the last."""
    if step % interval == 0 or step == last:
        engine.save_checkpoint(str(folder))


def train_engine(
    engine: Any,
    run: Training,
    corpus: np.ndarray,
    length: int,
    title: str,
    end_step: Callable[[int], None] | None = None,
    *,
    validates_first: bool = False,
) -> RunResult:
    """Trains an engine of DeepSpeed, stock or ours, on windows of `length` tokens. One that has loaded a
    checkpoint goes on in its data.

    end_step   called after each step with its number, from 1
    """
    replica, first = engine.grid.get_data_parallel_id(), engine.global_steps
    batch_size = engine.train_micro_batch_size_per_gpu()
    batches = Windows(corpus, length, batch_size, validation=False).batches(run.seed * 1000 + replica)
    num_drawn = getattr(engine, "clapping_num_drawn", first * engine.micro_batches)
    batches = islice(batches, num_drawn, None)
    held_out = Windows(corpus, length, batch_size, validation=True)
    tokens_per_step = engine.train_batch_size() * length

    result = RunResult()
    has_channels = getattr(engine, "clapping", None) is not None and engine.clapping.enabled

    def validate(step: int) -> None:
        report = engine.clapping_report() if has_channels else []
        loss = validation_loss(engine, held_out.batches(run.seed), run.eval_batches)
        result.validate(step, report, loss)

    if validates_first:
        validate(first)
    for step in trained_steps(
        result,
        run.steps,
        tokens_per_step,
        lambda: float(engine.train_batch(data_iter=batches)),
        engine.clapping_traffic if has_channels else None,
        title,
        first,
    ):
        if step % run.eval_interval == 0 or step == run.steps:
            validate(step)
        if end_step is not None:
            end_step(step)
    return result


def trained_steps(
    result: RunResult,
    num_steps: int,
    tokens_per_step: int,
    train_step: Callable[[], float],
    traffic: Callable[[], Traffic] | None,
    title: str,
    first: int = 0,
) -> Iterator[int]:
    """Calls `train_step`, which returns a loss, for each step; yields the number of each, from 1, with its
    figures in `result` and on a progress bar. What is done between two steps is not timed.

    traffic   this rank's counters; None for a stock engine
    first     steps that were trained before
    """
    busy_s = 0.0
    bar = tqdm(total=num_steps, initial=first, desc=title, disable=dist.get_rank() != 0, mininterval=1.0)
    for step in range(first + 1, num_steps + 1):
        start = time.perf_counter()
        result.train_losses.append(train_step())
        busy_s += time.perf_counter() - start
        result.tokens_per_s = (step - first) * tokens_per_step / busy_s
        bar.update()
        bar.set_postfix(_progress(result, None if traffic is None else traffic()), refresh=False)
        yield step
    bar.close()


def validation_loss(engine: Any, batches: Iterator[Any], num_batches: int) -> float:
    """Mean of `eval_batch` over `num_batches` batches; the same ones at every call. NaN without any."""
    losses = [float(engine.eval_batch(batches)) for _ in range(num_batches)]
    return sum(losses) / num_batches if losses else math.nan


def optimizer(model: torch.nn.Module, run: Training) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": run.weight_decay},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    if FusedAdam is not None and torch.cuda.is_available():
        return FusedAdam(groups, lr=run.learning_rate, betas=(0.9, 0.95), adam_w_mode=True)
    return torch.optim.AdamW(groups, lr=run.learning_rate, betas=(0.9, 0.95))


def learning_rate_schedule(adam: torch.optim.Optimizer, run: Training) -> LRScheduler:
    """From 1 / `warmup_steps` of the optimizer's rate up to all of it, then a cosine down to 0.1 of it."""
    warmup = LinearLR(adam, 1 / max(1, run.warmup_steps), total_iters=max(0, run.warmup_steps - 1))
    num_falling = max(1, run.steps - run.warmup_steps)
    cosine = CosineAnnealingLR(adam, num_falling, eta_min=0.1 * run.learning_rate)
    return SequentialLR(adam, [warmup, cosine], milestones=[run.warmup_steps])


def _progress(result: RunResult, traffic: Traffic | None) -> dict[str, str]:
    figures = {"loss": f"{result.train_losses[-1]:.3f}", "tokens/s": f"{result.tokens_per_s:.0f}"}
    if traffic is not None:
        figures |= {"ratio": f"{traffic.ratio:.1f}x", "fresh": f"{traffic.fresh_share:.0%}"}
    return figures
