"""Fine-tunes a pretrained LLM over torch.distributed.pipelining, as `launch.finetune` does over DeepSpeed.

    torchrun --nproc_per_node 2 -m launch.finetune_torch --config launch/finetune.json

One rank per stage, and nothing but the sizes of a step and the "clapping" block is read of the JSON: weights
are trained in the dtype that they were loaded in.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B

import clapping_ds
from clapping_ds.link.groups import Control
from launch import llm
from launch.data import Windows
from launch.finetuning import (
    CONTROL_S,
    Finetuning,
    Prepared,
    continue_prompt,
    gather,
    prepare_everywhere,
    report,
    save,
)
from launch.pretrain_gpt import parse
from launch.trainer import RunResult, learning_rate_schedule, optimizer, trained_steps

BATCH_SIZE, NUM_MICRO_BATCHES = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
"""DeepSpeed's keys."""

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Options:
    """What the script is started with."""

    config: Path
    """JSON with the "clapping" block and DeepSpeed's train_micro_batch_size_per_gpu and
    gradient_accumulation_steps."""
    run: Finetuning = field(default_factory=Finetuning)


class Trainer:
    """One stage of the model, its optimizer, and the steps of the pipeline."""

    def __init__(self, cuts: llm.Cuts, run: Finetuning, config: Mapping[str, Any]) -> None:
        index, num_stages = dist.get_rank(), cuts.num_stages
        on_gpu = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.stage = llm.Stage(cuts, index).to(device).train()
        cuts.model = None
        self.num_micro_batches = config[NUM_MICRO_BATCHES]
        self.tied_group = dist.new_group([0, num_stages - 1]) if cuts.is_tied else None
        schedule = Schedule1F1B(
            clapping_ds.ClappingStage(self.stage, index, num_stages, device),
            n_microbatches=self.num_micro_batches,
            loss_fn=llm.loss,
        )
        self.pipeline = clapping_ds.ClappingPipeline(config, schedule)
        self.optimizer = optimizer(self.stage, run)
        self.scheduler = learning_rate_schedule(self.optimizer, run)

    def step(self, batches: Iterator[Batch]) -> float:
        """One training step; the loss, on every rank."""
        losses: list[torch.Tensor] = []
        self.pipeline.step(batches, losses=losses, return_outputs=False)
        if self.tied_group is not None and (self.stage.is_first or self.stage.is_last):
            dist.all_reduce(self.stage.tied_weight.grad, group=self.tied_group)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return _tell(losses)

    def validate(self, batches: Iterator[Batch], num_batches: int) -> float:
        """The mean loss, with uncompressed messages; NaN of no batches."""
        found = []
        self.stage.eval()
        for _ in range(num_batches):
            micro_batches = [next(batches) for _ in range(self.num_micro_batches)]
            inputs, labels = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))
            losses: list[torch.Tensor] = []
            given = (inputs,) if self.stage.is_first else ()
            target = labels if self.stage.is_last else None
            with torch.no_grad():
                self.pipeline.schedule.eval(*given, target=target, losses=losses, return_outputs=False)
            found.append(_tell(losses))
        self.stage.train()
        return sum(found) / num_batches if found else math.nan


def _tell(losses: Sequence[torch.Tensor]) -> float:
    """The mean of what the last rank has."""
    items = [float(torch.stack(list(losses)).mean()) if losses else None]
    dist.broadcast_object_list(items, src=dist.get_world_size() - 1)
    return items[0]  # type: ignore[return-value]


def finetune(
    run: Finetuning, config: Mapping[str, Any], prepared: Prepared, folder: Path | None
) -> RunResult:
    """Trains, and saves the result. folder: as `launch.finetune.finetune`'s."""
    trainer, corpus, batch_size = Trainer(prepared.cuts, run, config), prepared.corpus, config[BATCH_SIZE]
    batches = Windows(corpus, run.length, batch_size, validation=False).batches(run.seed * 1000)
    held_out = Windows(corpus, run.length, batch_size, validation=True)
    result = RunResult()

    def validate(step: int) -> None:
        loss = trainer.validate(held_out.batches(run.seed), run.eval_batches)
        result.validate(step, trainer.pipeline.report(), loss)

    validate(0)
    tokens_per_step = batch_size * trainer.num_micro_batches * run.length
    for step in trained_steps(
        result, run.steps, tokens_per_step, partial(trainer.step, batches), None, "clapping_ds"
    ):
        if step % run.eval_interval == 0 or step == run.steps:
            validate(step)
    if folder is not None:
        save(prepared, trainer.stage, dist.get_rank(), folder, partial(gather, None))
    return result


def main() -> None:
    options = parse(Options, __doc__)
    run = options.run
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    control, is_first = Control(CONTROL_S), dist.get_rank() == 0
    config = control.check(lambda: _read(options.config))
    before = control.check(lambda: continue_prompt(run, None) if is_first and run.prompt else None)
    prepared = prepare_everywhere(control, run, dist.get_world_size())
    with TemporaryDirectory() as scratch:
        folder = run.save or (Path(scratch) if run.lora_rank else None)
        result = finetune(run, config, prepared, folder)
        control.wait_for_all()
        if is_first:
            report(run, {"clapping_ds": result}, before, folder)
    dist.destroy_process_group()


def _read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text())
    for key in (BATCH_SIZE, NUM_MICRO_BATCHES):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise ValueError(f"{key} = {config.get(key)!r} in {path}; accepted: a number from 1 on")
    return config


if __name__ == "__main__":
    main()
