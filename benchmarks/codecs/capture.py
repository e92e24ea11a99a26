"""Real activations and gradients of a pretrained LLM, for `benchmarks.codecs.quality` to compress.

    python -m benchmarks.codecs.capture     # two minutes

SmolLM2-135M as `benchmarks.training.finetune` trains it, uncompressed. What would cross a stage boundary is
a block's output and the gradient with respect to it; both are kept twice, before and after one optimizer step
on the same micro-batch, because with lazy sampling their difference is what a delta message carries. Of each
sample only every 4th token is in the file, to keep it small. It is fp32: at these rates the change is a few
percent of the value, of which bfloat16 would round off a part.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks.files import RESULTS, provenance, write_json
from benchmarks.model.links import Links
from benchmarks.training.compare import block
from benchmarks.training.finetune import LEARNING_RATES, LENGTH, NUM_SLOTS, Batch, train
from launch import llm
from launch.data import Windows, tokens
from launch.finetuning import C10

STEPS = (1, 8)
DEPTHS = (4, 15, 26)
"""Blocks, from 1."""
TOKEN_STRIDE = 4
SEED = 1

Visit = dict[str, list[np.ndarray]]


def visit(model: Any, batch: Batch) -> Visit:
    """Activations and gradients of one micro-batch behind each of DEPTHS blocks; no weight is touched."""
    ids, labels = batch
    outputs: dict[int, torch.Tensor] = {}
    handles = [
        model.base_model.layers[depth - 1].register_forward_hook(partial(_note, outputs, depth))
        for depth in DEPTHS
    ]
    loss = llm.loss(model(ids, use_cache=False).logits, labels) / NUM_SLOTS
    for handle in handles:
        handle.remove()
    boundaries = [outputs[depth] for depth in DEPTHS]
    found = {"activations": boundaries, "gradients": torch.autograd.grad(loss, boundaries)}
    return {name: [x.detach()[:, ::TOKEN_STRIDE].numpy() for x in xs] for name, xs in found.items()}


def _note(
    outputs: dict[int, torch.Tensor], depth: int, module: nn.Module, given: Any, out: torch.Tensor
) -> None:
    outputs[depth] = out


def capture(
    model: Any, next_batch: Callable[[], Batch], rate: float
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Arrays by direction, fp32 [step, depth, visit, sample, token, width], and the losses reached."""
    adam = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    constant = torch.optim.lr_scheduler.ConstantLR(adam, 1.0)
    visits: list[list[Visit]] = []
    losses = {}
    coming: list[Batch] = []
    links = Links(block("direct", "none"))
    steps = train(model.train(), [], links, adam, constant, lambda: coming.pop(0), max(STEPS))
    for step in tqdm(range(1, max(STEPS) + 1), desc="capture", mininterval=1.0):
        coming += [next_batch() for _ in range(NUM_SLOTS)]
        watched = coming[0]
        before = visit(model, watched) if step in STEPS else None
        loss = next(steps)
        if before is not None:
            visits.append([before, visit(model, watched)])
            losses[f"training loss at step {step}"] = loss
    return {name: _stack(visits, name) for name in ("activations", "gradients")}, losses


def _stack(visits: list[list[Visit]], name: str) -> np.ndarray:
    """[step, depth, visit, ...] of one direction."""
    return np.stack([np.stack([np.stack(one[name]) for one in pair], axis=1) for pair in visits])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = llm.load(llm.SMOLLM2)
    corpus, _ = tokens(C10, tokenizer.backend_tokenizer)
    batches = Windows(corpus, LENGTH, 1, validation=False).batches(SEED * 1000)
    rate = LEARNING_RATES["all weights"]
    arrays, losses = capture(model, partial(next, batches), rate)

    options.results.mkdir(parents=True, exist_ok=True)
    target = options.results / "captured.npz"
    np.savez_compressed(target, activations=arrays["activations"], gradients=arrays["gradients"])
    write_json(target.with_suffix(".json"), {
        **provenance(),
        "model": llm.SMOLLM2,
        "seed": SEED,
        "learning rate": rate,
        "tokens per sample": LENGTH,
        "width": model.config.hidden_size,
        "steps": STEPS,
        "depths": DEPTHS,
        "token stride": TOKEN_STRIDE,
        **losses,
    })  # fmt: skip
    print(f"written to {target} and captured.json")


if __name__ == "__main__":
    main()
