"""The tasks of `benchmarks.training.curves` as engines of two stages, for one of the ranks."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import deepspeed
import torch

import clapping_ds
from benchmarks.training import finetune
from benchmarks.training.curves import NUM_HELD_OUT, TASKS
from benchmarks.training.finetune import LEARNING_RATES, LORA_RANK, NUM_SLOTS
from benchmarks.training.scratch import NUM_SAMPLES
from launch import llm
from launch.data import Windows, tokens
from launch.finetune import pipeline
from launch.finetuning import C10
from launch.gpt import GPTConfig
from launch.gpt import pipeline as gpt_pipeline
from launch.trainer import Training, optimizer

SEED = 1


class Runner(NamedTuple):
    """An engine with its data."""

    engine: Any
    batches: Iterator[Any]
    held_out: list[Any]
    raw_bytes: int
    """Of a micro-batch's activations."""

    def validate(self) -> float:
        """The mean loss on what was held out."""
        batches = iter(self.held_out)
        losses = [float(self.engine.eval_batch(batches)) for _ in range(NUM_HELD_OUT // NUM_SLOTS)]
        return sum(losses) / len(losses)


def make_runner(task: str, block: dict[str, Any] | None) -> Runner:
    """block: None: stock DeepSpeed."""
    torch.manual_seed(SEED)
    if task == "byte GPT":
        corpus, vocabulary = tokens(None)
        config = GPTConfig(vocabulary=vocabulary, num_blocks=8)
        model = gpt_pipeline(config, 2, SEED)
        adam = optimizer(model, Training(learning_rate=1e-3))
        shape = NUM_SAMPLES, config.length, config.width
        windows = [Windows(corpus, config.length, NUM_SAMPLES, validation=held) for held in (False, True)]
        seed = SEED
    else:
        whole: Any
        whole, tokenizer = llm.load(llm.SMOLLM2)
        weights = task.rsplit(", ", maxsplit=1)[-1]
        if weights == "LoRA":
            llm.add_lora(whole, LORA_RANK)
        whole.get_input_embeddings().requires_grad_(False)  # both stages have it
        shape = 1, finetune.LENGTH, whole.config.hidden_size
        model = pipeline(llm.Cuts(whole, 2))
        wanted = [weight for weight in model.parameters() if weight.requires_grad]
        adam = torch.optim.AdamW(wanted, LEARNING_RATES[weights], weight_decay=0.0)
        corpus, _ = tokens(C10, tokenizer.backend_tokenizer)
        windows = [Windows(corpus, finetune.LENGTH, 1, validation=held) for held in (False, True)]
        seed = 1000 * SEED
    ds_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": shape[0],
        "gradient_accumulation_steps": NUM_SLOTS,
        "steps_per_print": 1_000_000,
        "zero_allow_untested_optimizer": True,
    }
    if block is not None:
        ds_config["clapping"] = block
    engine, *_ = (deepspeed.initialize if block is None else clapping_ds.initialize)(
        model=model,
        optimizer=adam,
        lr_scheduler=lambda adam: torch.optim.lr_scheduler.LambdaLR(adam, TASKS[task].warm_up),
        config=ds_config,
    )
    held_out = list(islice(windows[1].batches(1), NUM_HELD_OUT))
    return Runner(engine, windows[0].batches(seed), held_out, 4 * shape[0] * shape[1] * shape[2])
