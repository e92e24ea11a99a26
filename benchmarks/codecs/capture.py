"""Real activations and gradients of the GPT in `launch/`, for `benchmarks.codecs.quality` to compress.

    python -m benchmarks.codecs.capture

The run of `launch.trainer` (its data, seed, optimizer and schedule) in one process and plain torch. What
would cross a stage boundary is a block's output and the gradient with respect to it; both are kept twice,
before and after one optimizer step on the same micro-batch, because with lazy sampling their difference
is what a delta message carries. Of each sample only every 8th token is in the file, to keep it small. It
is fp32: late in the run the change is 1.5 % of the value, a seventh of which bfloat16 would round off.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks.files import RESULTS, provenance, write_json
from launch.data import Windows, tokens
from launch.gpt import Block, Embedding, GPTConfig, LayerNorm, logits, loss
from launch.trainer import RunConfig, learning_rate_schedule, optimizer

STEPS = (1, 40, 160, 320)
DEPTHS = (1, 2, 3)
TOKEN_STRIDE = 8
BATCH_SIZE = 4
NUM_MICRO_BATCHES = 4
MAX_GRADIENT_NORM = 1.0
"""DeepSpeed's default for `gradient_clipping`."""

Batch = tuple[torch.Tensor, torch.Tensor]
Visit = dict[str, list[np.ndarray]]


class GPT(nn.Module):
    """The layers of `launch.gpt.pipeline` in one piece, with the same initial weights."""

    def __init__(self, config: GPTConfig, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList()
        for index in range(1, config.num_blocks + 1):
            torch.manual_seed(seed + index)
            self.blocks.append(Block(config))
        self.norm = LayerNorm(config.width)

    def forward(self, token_BT: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(logits, output of each block)."""
        x_BTD = self.embedding(token_BT)
        outputs = []
        for block in self.blocks:
            x_BTD = block(x_BTD)
            outputs.append(x_BTD)
        return logits(self.embedding, self.norm(x_BTD)), outputs


def visit(model: GPT, batch: Batch) -> Visit:
    """Activations and gradients of one micro-batch after each of DEPTHS blocks; no weight is touched."""
    token_BT, label_BT = batch
    logits_BTV, outputs = model(token_BT)
    boundaries = [outputs[depth - 1] for depth in DEPTHS]
    gradients = torch.autograd.grad(loss(logits_BTV, label_BT) / NUM_MICRO_BATCHES, boundaries)
    found = {"activations": boundaries, "gradients": gradients}
    return {name: [x.detach()[:, ::TOKEN_STRIDE].numpy() for x in xs] for name, xs in found.items()}


def train_step(model: GPT, adam: torch.optim.Optimizer, batches: list[Batch]) -> float:
    """One optimizer step; returns the mean loss before it."""
    losses = []
    for token_BT, label_BT in batches:
        part = loss(model(token_BT)[0], label_BT) / NUM_MICRO_BATCHES
        part.backward()
        losses.append(part.item())
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    adam.step()
    adam.zero_grad()
    return sum(losses)


@torch.no_grad()
def validation_loss(model: GPT, batches: Iterator[Batch], num_batches: int) -> float:
    losses = [
        loss(model(token_BT)[0], label_BT).item() for token_BT, label_BT in islice(batches, num_batches)
    ]
    return sum(losses) / num_batches


def capture(run: RunConfig) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Arrays by direction, fp32 [step, depth, visit, sample, token, width], and the losses reached."""
    corpus, vocabulary = tokens(run.data, run.tokenizer)
    gpt = GPTConfig(**{**vars(run.gpt), "vocabulary": vocabulary})
    model = GPT(gpt, run.seed)
    adam = optimizer(model, run)
    schedule = learning_rate_schedule(adam, run)
    batches = Windows(corpus, gpt.length, BATCH_SIZE, validation=False).batches(run.seed * 1000)

    visits: list[list[Visit]] = []
    losses = {}
    for step in tqdm(range(1, run.steps + 1), desc="capture", mininterval=1.0):
        micro_batches = list(islice(batches, NUM_MICRO_BATCHES))
        before = visit(model, micro_batches[0]) if step in STEPS else None
        train_loss = train_step(model, adam, micro_batches)
        schedule.step()
        if before is not None:
            visits.append([before, visit(model, micro_batches[0])])
            losses[f"training loss at step {step}"] = train_loss
    held_out = Windows(corpus, gpt.length, BATCH_SIZE, validation=True).batches(run.seed)
    losses["validation loss"] = validation_loss(model, held_out, run.eval_batches * NUM_MICRO_BATCHES)
    return {name: stacked(visits, name) for name in ("activations", "gradients")}, losses


def stacked(visits: list[list[Visit]], name: str) -> np.ndarray:
    """[step, depth, visit, ...] of one direction."""
    return np.stack([np.stack([np.stack(one[name]) for one in pair], axis=1) for pair in visits])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = RunConfig(data=options.data, steps=max(STEPS))
    arrays, losses = capture(run)

    options.results.mkdir(parents=True, exist_ok=True)
    target = options.results / "captured.npz"
    np.savez_compressed(target, activations=arrays["activations"], gradients=arrays["gradients"])
    write_json(target.with_suffix(".json"), {
        **provenance(),
        "seed": run.seed,
        "gpt": vars(run.gpt),
        "steps": STEPS,
        "depths": DEPTHS,
        "token stride": TOKEN_STRIDE,
        **losses,
    })  # fmt: skip
    print(f"validation loss {losses['validation loss']:.4f}; written to {target} and captured.json")


if __name__ == "__main__":
    main()
