"""Trains a CR-Net over a DeepSpeed pipeline.

deepspeed --num_accelerators 2 --module launch.pretrain_crnet --deepspeed_config launch/ds_config.json
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule

import clapping_ds
from clapping_ds import crnet
from clapping_ds.crnet import CRNetConfig
from launch.data import tokens
from launch.gpt import cut_into_stages
from launch.pretrain_gpt import parse, start_distributed
from launch.trainer import RunResult, Training, learning_rate_schedule, optimizer, train_engine


@dataclass(frozen=True)
class CRNetRun(Training):
    """A CR-Net, trained from scratch."""

    data: Path | None = None
    """Folder or file of text, or a file of numbers (.u8, .u16, .u32); None: Python's own sources."""
    tokenizer: Path | None = None
    """A file of the tokenizers library; None: the tokens are bytes."""
    length: int = 128
    """Tokens of a sample."""
    size: Literal["small", "60M", "130M", "350M", "1B", "7B"] = "small"
    """The paper's, or 0.5M parameters."""
    anchor: Literal["model", "stage"] = "stage"
    """Which layers are full rank: the model's first, or each stage's, so that one tensor crosses a link."""
    recompute: Literal["forward", "inverse", "none"] = "forward"
    """How outputs are rebuilt in the backward pass."""
    checkpoint_every: int = 2
    """Layers of a segment."""


@dataclass(frozen=True)
class Options:
    """What the script is started with."""

    deepspeed_config: Path
    """JSON of DeepSpeed, with the "clapping" block."""
    run: CRNetRun = field(default_factory=CRNetRun)
    local_rank: int = 0
    """Passed by the launcher, and not used."""


SMALL = {"width": 128, "intermediate": 344, "num_layers": 8, "num_heads": 4, "rank": 32}


def configure(run: CRNetRun, vocabulary: int) -> CRNetConfig:
    size = SMALL if run.size == "small" else crnet.SIZES[run.size]
    return CRNetConfig.model_validate({
        **size, "vocabulary": vocabulary, "anchor": run.anchor, "checkpoint_every": run.checkpoint_every,
        "recompute": None if run.recompute == "none" else run.recompute,
    })  # fmt: skip


def pipeline(config: CRNetConfig, num_stages: int, seed: int) -> PipelineModule:
    """Cut into `num_stages` stages of equally many segments. The weights depend on the seed, on which layers
    are anchors and on the length of segments."""
    parts = crnet.list_parts(config, num_stages)
    layers = [LayerSpec(part.kind, *part.arguments) for part in parts]
    return cut_into_stages(layers, crnet.Segment, num_stages, seed)


def train(run: CRNetRun, ds_config: dict[str, object]) -> RunResult:
    corpus, vocabulary = tokens(run.data, run.tokenizer)
    model = pipeline(configure(run, vocabulary), run.num_stages, run.seed)
    engine, *_ = clapping_ds.initialize(
        model=model,
        optimizer=optimizer(model, run),
        lr_scheduler=lambda adam: learning_rate_schedule(adam, run),
        config=ds_config,
    )
    return train_engine(engine, run, corpus, run.length, "train")


def main() -> None:
    options = parse(Options, __doc__)
    start_distributed()
    result = train(options.run, json.loads(options.deepspeed_config.read_text()))
    result.print()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
