"""Fine-tunes a pretrained LLM over torch.distributed.pipelining, as `launch.finetune` does over DeepSpeed.

    torchrun --nproc_per_node 2 -m launch.finetune_torch --config launch/finetune.json

One rank per stage. Of the JSON, besides the "clapping" block, the sizes of a step are read.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch.distributed.pipelining import Schedule1F1B
from transformers import PreTrainedModel

import clapping_ds
from clapping_ds.report import format_table
from launch import llm
from launch.data import Windows, tokens
from launch.finetune import Finetuning, row
from launch.trainer import RunResult, learning_rate_schedule, optimizer, trained_steps


@dataclass(frozen=True)
class Options:
    """What the script is started with."""

    config: Path
    """JSON with the "clapping" block and DeepSpeed's train_micro_batch_size_per_gpu and
    gradient_accumulation_steps."""
    run: Finetuning = field(default_factory=Finetuning)


class Trainer:
    """One stage of the model, its optimizer, and the steps of the pipeline."""

    def __init__(self, model: PreTrainedModel, run: Finetuning, config: dict[str, Any]) -> None:
        index, num_stages = dist.get_rank(), dist.get_world_size()
        on_gpu = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.cuts = llm.Cuts(model, num_stages)
        self.stage = llm.Stage(self.cuts, index).to(device).train()
        self.cuts.model = None
        self.num_micro_batches = config["gradient_accumulation_steps"]
        self.tied_group = dist.new_group([0, num_stages - 1]) if self.cuts.is_tied else None
        schedule = Schedule1F1B(
            clapping_ds.ClappingStage(self.stage, index, num_stages, device),
            n_microbatches=self.num_micro_batches,
            loss_fn=llm.loss,
        )
        self.pipeline = clapping_ds.ClappingPipeline(config, schedule)
        self.optimizer = optimizer(self.stage, run)
        self.scheduler = learning_rate_schedule(self.optimizer, run)

    def step(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """One training step; the loss, on every rank."""
        losses: list[torch.Tensor] = []
        self.pipeline.step(batches, losses=losses)
        if self.tied_group is not None and (self.stage.is_first or self.stage.is_last):
            dist.all_reduce(self.stage.tied_weight.grad, group=self.tied_group)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return _tell(losses)

    def validate(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], num_batches: int) -> float:
        """The mean loss, with uncompressed messages."""
        found = []
        for _ in range(num_batches):
            micro_batches = [next(batches) for _ in range(self.num_micro_batches)]
            inputs, labels = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))
            losses: list[torch.Tensor] = []
            given = (inputs,) if self.stage.is_first else ()
            target = labels if self.stage.is_last else None
            self.pipeline.schedule.eval(*given, target=target, losses=losses)
            found.append(_tell(losses))
        return sum(found) / num_batches


def _tell(losses: Sequence[torch.Tensor]) -> float:
    """The mean of what the last rank has."""
    items = [float(torch.stack(list(losses)).mean()) if losses else None]
    dist.broadcast_object_list(items, src=dist.get_world_size() - 1)
    return items[0]  # type: ignore[return-value]


def finetune(run: Finetuning, config: dict[str, Any]) -> RunResult:
    """Trains, and saves the result where `run.save` says."""
    torch.manual_seed(run.seed)
    model, tokenizer = llm.load(run.model)
    configuration = model.config
    lora = llm.add_lora(model, run.lora_rank) if run.lora_rank else None
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = Trainer(model, run, config)
    del model
    batch_size = config["train_micro_batch_size_per_gpu"]
    corpus, _ = tokens(run.data, tokenizer.backend_tokenizer)
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
    if run.save is not None:
        llm.save(trainer.stage, dist.get_rank(), trainer.cuts, run.save, _gather, lora)
        if dist.get_rank() == 0:
            tokenizer.save_pretrained(run.save)
            if lora is None:
                configuration.save_pretrained(run.save)
    return result


def _gather(item: Any) -> list[Any]:
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def main() -> None:
    options = tyro.cli(Options, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    result = finetune(options.run, json.loads(options.config.read_text()))
    if dist.get_rank() == 0:
        raw_bytes = sum(channel["raw_bytes"] for channel in result.report)
        print(format_table([row("clapping_ds", result, raw_bytes)]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
