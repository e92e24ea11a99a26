"""Fine-tunes a pretrained LLM over a DeepSpeed pipeline, and says what compression cost and saved.

    deepspeed --num_accelerators 2 --module launch.finetune \\
        --deepspeed_config launch/finetune.json --beside-stock

With `--beside-stock` the same run goes first over stock DeepSpeed's uncompressed links.
"""

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

import clapping_ds
from clapping_ds.link.groups import Control
from launch import llm
from launch.finetuning import CONTROL_S, Finetuning, continue_prompt, gather, prepare_everywhere, report, save
from launch.pretrain_gpt import parse, start_distributed
from launch.trainer import (
    RunResult,
    learning_rate_schedule,
    load_last,
    optimizer,
    save_at_times,
    train_engine,
)

STOCK = "stock DeepSpeed"


@dataclass(frozen=True)
class Checkpoints:
    """DeepSpeed's."""

    checkpoints: Path | None = None
    """Folder, on each machine's disk or a shared one, from whose last a run goes on. None: none."""
    checkpoint_steps: int = 50
    """Steps between two; there is one after the last step as well."""

    def __post_init__(self) -> None:
        if self.checkpoint_steps < 1:
            raise ValueError(f"--checkpoint-steps = {self.checkpoint_steps}; accepted: 1 or more")


@dataclass(frozen=True)
class Options:
    """What the script is started with."""

    deepspeed_config: Path
    """JSON of DeepSpeed, with the "clapping" block."""
    run: Finetuning = field(default_factory=Finetuning)
    kept: Checkpoints = field(default_factory=Checkpoints)
    beside_stock: bool = False
    """Trains over uncompressed links first, from the same seed."""
    local_rank: int = 0
    """Passed by the launcher, and not used."""


NO_CHECKPOINTS = Checkpoints()


def pipeline(cuts: llm.Cuts) -> PipelineModule:
    """The model's stages for DeepSpeed, of which this rank makes its own."""
    specs = [LayerSpec(llm.Stage, cuts, index) for index in range(cuts.num_stages)]
    if cuts.is_tied:
        for index in (0, cuts.num_stages - 1):
            specs[index] = TiedLayerSpec("embedding", llm.Stage, cuts, index, tied_weight_attr="tied_weight")
    module = PipelineModule(
        layers=specs, num_stages=cuts.num_stages, loss_fn=llm.loss, partition_method="uniform"
    )
    cuts.model = None
    for name, weight in module.named_parameters():
        if hasattr(weight, "ds_pipe_replicated"):  # DeepSpeed takes the whole stage for a copy of the first
            weight.ds_pipe_replicated = name.endswith(cuts.head_name)
    return module


def find_dtype(run: Finetuning, ds_config: Mapping[str, Any]) -> torch.dtype:
    """In which the model is loaded: the engine's own, if its weights are frozen. Where all are trained the
    optimizer's fp32 copies are made of what is loaded."""
    if run.lora_rank and ds_config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    if run.lora_rank and ds_config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.float32


def finetune(
    run: Finetuning,
    ds_config: dict[str, Any],
    initialize: Callable[..., Any],
    title: str,
    control: Control,
    folder: Path | None = None,
    kept: Checkpoints = NO_CHECKPOINTS,
) -> RunResult:
    """Trains, and saves the result. `initialize` is DeepSpeed's, or `clapping_ds.initialize`.

    folder   shared by all ranks, if all weights are trained; of adapters the first rank writes alone
    kept     in what folder, and how often
    Raises ValueError, on every rank, for what one rank cannot train or save.
    """
    prepared = prepare_everywhere(control, run, run.num_stages, find_dtype(run, ds_config))
    module = pipeline(prepared.cuts)
    engine, *_ = initialize(
        model=module,
        optimizer=optimizer(module, run),
        lr_scheduler=lambda adam: learning_rate_schedule(adam, run),
        config=ds_config,
    )
    end_step = None
    if kept.checkpoints is not None:
        load_last(engine, kept.checkpoints)
        end_step = partial(save_at_times, engine, kept.checkpoints, kept.checkpoint_steps, run.steps)
    result = train_engine(engine, run, prepared.corpus, run.length, title, end_step, validates_first=True)
    if folder is not None and engine.grid.get_data_parallel_id() == 0:
        (stage,) = (part for part in module.modules() if isinstance(part, llm.Stage))
        gather_stages = partial(gather, engine.grid.get_pipe_parallel_group())
        save(prepared, stage, engine.stage_id, folder, gather_stages)
    control.wait_for_all()
    return result


def main() -> None:
    options = parse(Options, __doc__)
    run = options.run
    start_distributed()
    control = Control(CONTROL_S)
    ds_config = json.loads(options.deepspeed_config.read_text())
    is_first, results = dist.get_rank() == 0, {}
    before = control.check(lambda: continue_prompt(run, None) if is_first and run.prompt else None)
    if options.beside_stock:
        stock = {key: value for key, value in ds_config.items() if key != "clapping"}
        results[STOCK] = finetune(run, stock, deepspeed.initialize, STOCK, control)
        gc.collect()  # its engine, before there is another
    with TemporaryDirectory() as scratch:
        folder = run.save or (Path(scratch) if run.lora_rank else None)
        results["clapping_ds"] = finetune(
            run, ds_config, clapping_ds.initialize, "clapping_ds", control, folder, options.kept
        )
        if is_first:
            report(run, results, before, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
